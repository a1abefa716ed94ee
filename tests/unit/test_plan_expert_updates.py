"""Fused experts in a plan: what it says of them, and what it refuses before a worker would."""

from typing import Any

import pytest
import transformers
from transformers import AutoModelForCausalLM

from raytune.config.sections.adapter import LoraAdapter
from raytune.errors import RaytuneError
from raytune.model.adapters import add_adapter
from raytune.plan.describe import plan_table, plan_text
from raytune.plan.model.architectures import model_shape
from tests.unit.plan_cases import gpus, planned
from tests.unit.test_plan_shapes import CONFIGS

MIXTRAL = model_shape(transformers.MixtralConfig().to_dict(), "x")


def noted(**adapter: Any) -> str:
    plan = planned(gpus(8, 400), MIXTRAL, adapter=adapter)
    assert plan_text(plan).count("\nTo be noted:\n") == 1
    (note,) = plan.notes
    return note


def test_a_plan_says_which_part_of_a_mixture_is_trained_and_quantised() -> None:
    fused = "The 8 experts of a layer are fused in mlp.experts.gate_up_proj and mlp.experts.down_proj"
    have = f"{fused}: 45.1B of 46.7B parameters (97%)."
    assert noted(method="lora") == (
        f"{have} Every expert's down_proj and gate_up_proj gets an update of its own in 32 of 32 layers: 210M of 223M trained "
        "parameters."
    )
    assert noted(method="qlora", target_modules="attention") == (
        f"{have} They are not trained; adapter.target_parameters: [mlp.experts.gate_up_proj, mlp.experts.down_proj] would train "
        "them. nf4 holds them like linear layers, 99.4% of the parameters; a pass expands those of one layer at a time."
    )
    one = noted(method="lora", target_modules="attention", target_parameters=["layers.3.mlp.experts.down_proj"])
    assert "Every expert's down_proj gets an update of its own in 1 of 32 layers" in one


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        (
            {},
            "nf4 holds linear layers only, 2.9% of the parameters; experts that are trained stay in the run's precision; to "
            "pack them too, leave the experts frozen with adapter.exclude_modules: [mlp.experts].",
        ),
        (
            {"target_modules": "attention", "quantization": "int8"},
            "int8 holds linear layers only, 2.9% of the parameters; the experts stay in the run's precision, since bitsandbytes "
            "packs them in 4 bits only.",
        ),
        (
            {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"], "quantization": "fp4"},
            "fp4 holds linear layers, and the experts that nothing changes, 67.2% of the parameters; experts that are trained "
            "stay in the run's precision.",
        ),
        (
            {"target_modules": "attention", "modules_to_save": ["mlp.experts"]},
            "adapter.modules_to_save trains them in full. nf4 holds linear layers only, 2.9% of the parameters; experts that are "
            "trained stay in the run's precision.",
        ),
    ],
)
def test_a_plan_says_why_experts_are_not_packed(adapter: dict[str, Any], said: str) -> None:
    assert noted(method="qlora", **adapter).endswith(said)


def test_a_plan_says_which_experts_are_more_than_bitsandbytes_packs_at_once() -> None:
    """gpt-oss-120b with twice its experts; a parameter of the original is just within the 32 bits of a kernel's counter."""
    config = transformers.MixtralConfig(num_hidden_layers=2, num_local_experts=256, hidden_size=2880, intermediate_size=2880)
    plan = planned(
        gpus(8, 500), model_shape(config.to_dict(), "x"), adapter={"method": "qlora", "target_modules": "attention", "rank": 4}
    )
    assert (
        "; mlp.experts.gate_up_proj stays in the run's precision, since bitsandbytes cannot pack its 4246732800 weights"
        in (plan.notes[0])
    )


def test_a_plan_counts_experts_as_they_are_held() -> None:
    """Trained ones in 16 bits, 90 GB; frozen ones in 4, with their scales 23 GB."""
    for target, most, least in (("all-linear", 94e9, 90e9), ("attention", 25e9, 23e9)):
        adapter = {"method": "qlora", "target_modules": target}
        plan = planned(gpus(1, 200), MIXTRAL, adapter=adapter, training={"zero": {"stage": 0}})
        (weights,) = (part.num_bytes for part in plan.memory if part.name == "weights")
        assert least < weights < most


def test_a_plan_counts_the_experts_of_a_layer_that_a_pass_expands() -> None:
    adapter = {"method": "qlora", "target_modules": "attention"}
    of_layer, largest = 8 * 3 * 4096 * 14336, 8 * 2 * 4096 * 14336
    parts = {}
    for recomputes in (True, False):
        changes = {"zero": {"stage": 0}, "gradient_checkpointing": recomputes}
        plan = planned(gpus(1, 200), MIXTRAL, adapter=adapter, training=changes)
        parts[recomputes] = {part.name: part for part in plan.memory}
        assert parts[recomputes]["experts out of 4 bits"].num_bytes == 2 * of_layer
    assert parts[True]["experts out of 4 bits"].moments == ("forward", "last layer", "first layer")
    assert parts[False]["experts out of 4 bits"].moments == ("forward",)
    assert parts[False]["a weight out of 4 or 8 bits"].num_bytes == 2 * largest, "one parameter at a time on the way back"


def test_freezing_experts_is_advised_where_only_their_four_bits_fit() -> None:
    with pytest.raises(RaytuneError, match=r"adapter.method=qlora adapter.exclude_modules=\[mlp.experts\]"):
        planned(gpus(1, 80), MIXTRAL, adapter={"method": "lora"}, training={"zero": {"stage": 0}})
    with pytest.raises(RaytuneError, match=r"[:;] (or )?adapter.exclude_modules=\[mlp.experts\]"):
        planned(gpus(1, 80), MIXTRAL, adapter={"method": "qlora"}, training={"zero": {"stage": 0}})


def test_a_dense_model_has_no_notes() -> None:
    assert planned().notes == []
    assert "To be noted" not in plan_text(planned())


def test_the_table_names_parameters_beside_layers() -> None:
    asked = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
    plan = planned(gpus(8), MIXTRAL, adapter={"method": "lora"} | asked)
    assert dict(plan_table(plan))["method"].startswith("lora rank 16 on q_proj, experts.down_proj, ")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"dropout": 0.1}, r"adapter.dropout is 0.1, but mlp.experts.gate_up_proj is a parameter.*Set adapter.dropout to 0"),
    ({"use_dora": True}, r"adapter.use_dora is true, .*Set adapter.use_dora to false"),
    *(({"init": init}, rf"adapter.init is {init}, .*default or gaussian") for init in ("pissa", "olora", "eva", "orthogonal")),
]


@pytest.mark.parametrize(("adapter", "said"), REFUSED)
def test_what_peft_cannot_do_for_experts_is_refused_with_what_it_can(adapter: dict[str, Any], said: str) -> None:
    config = CONFIGS["mixtral"]
    shape = model_shape(config.to_dict(), "x")
    with pytest.raises(RaytuneError, match=said + r".*leave the experts frozen with adapter.exclude_modules: \[mlp.experts\]"):
        planned(shape=shape, adapter={"method": "lora", "rank": 4} | adapter)
    assert (
        planned(shape=shape, adapter={"method": "lora", "rank": 4, **adapter, "exclude_modules": ["mlp.experts"]}).num_trainable
        > 0
    )
    if adapter.get("init") != "eva":  # which fails at the first batch
        with pytest.raises((ValueError, AttributeError)):  # not for nothing
            add_adapter(AutoModelForCausalLM.from_config(config), LoraAdapter(rank=2, **adapter), revision=None, seed=0)


def test_experts_are_trained_once() -> None:
    twice = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"], "modules_to_save": ["mlp.experts"]}
    with pytest.raises(RaytuneError, match=r"which adapter.modules_to_save trains in full. Take it out of one of the two"):
        planned(shape=model_shape(CONFIGS["mixtral"].to_dict(), "x"), adapter={"method": "lora"} | twice)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("self_attn.q_proj.weight", r"It is a linear layer: name it in adapter.target_modules"),
        ("experts.w1", r"It has mlp.experts.down_proj, mlp.experts.gate_up_proj, mlp.gate.weight"),
    ],
)
def test_a_parameter_that_does_not_exist_is_refused(name: str, said: str) -> None:
    with pytest.raises(RaytuneError, match=said):
        planned(shape=model_shape(CONFIGS["mixtral"].to_dict(), "x"), adapter={"method": "lora", "target_parameters": [name]})
    with pytest.raises(RaytuneError, match="It has none; leave the key out"):
        planned(adapter={"method": "lora", "target_parameters": ["experts.w1"]})


def test_compiling_around_experts_is_refused() -> None:
    with pytest.raises(RaytuneError, match=r"training.compile is true, .*Set training.compile to false"):
        planned(shape=model_shape(CONFIGS["mixtral"].to_dict(), "x"), training={"compile": True})
