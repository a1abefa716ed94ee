"""Methods of PEFT in a plan: what each trains, in numbers that are PEFT's own, what it keeps, and what is refused."""

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from transformers import AutoModelForCausalLM

from raytune.config.load import config_from
from raytune.config.sections.adapter import Adapter
from raytune.config.sections.quantization import HeldBase
from raytune.errors import ModelError, UserError
from raytune.model.adapters import add_adapter
from raytune.plan.costs.activations import layer_activation_bytes
from raytune.plan.costs.memory import memory_parts
from raytune.plan.describe import plan_table
from raytune.plan.methods import METHODS as METHOD_ROWS
from raytune.plan.methods import expert_notes, trained_by
from raytune.plan.model.architectures import model_shape
from tests.peft_methods import METHODS
from tests.unit.plan_cases import CPU, DEMO, LLAMA_3_8B, gpus, planned
from tests.unit.test_plan_memory import saved_bytes, workload
from tests.unit.test_plan_shapes import CONFIGS
from tests.variants import chequered

FAMILIES = ["llama with biases", "llama tied", "gemma3", "phi3", "gpt2", "gpt_neox", "qwen2", "mixtral", "qwen2_moe"]
WIDE: dict[str, Any] = {
    "num_hidden_layers": 2,
    "vocab_size": 101,
    "pad_token_id": 0,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
}


def section(method: str, **changes: Any) -> Any:
    return TypeAdapter(Adapter).validate_python(METHODS[method].section | changes)


def adapted(family: str, adapter: Adapter) -> Any:
    return add_adapter(AutoModelForCausalLM.from_config(CONFIGS[family]), adapter, revision=None, seed=0)


def trained_counts(model: Any, mark: str) -> dict[str, int]:
    """Trained parameters of each module of the base."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = name.removeprefix("base_model.model.").partition(mark)[0]
            own = own.partition(".modules_to_save.")[0]
            counts[own] = counts.get(own, 0) + parameter.numel()
    return counts


@pytest.mark.parametrize(("method", "family"), chequered([*METHODS], FAMILIES))
def test_what_is_trained_is_exactly_what_peft_trains(method: str, family: str) -> None:
    shape = model_shape(CONFIGS[family].to_dict(), "x")
    if family == "gpt2" and not METHODS[method].takes_conv1d:
        config = config_from({"data": {"train": {"path": "demo:train"}}, "adapter": METHODS[method].section})
        with pytest.raises(ModelError, match="transformers' Conv1D"):
            METHOD_ROWS[method].check(section(method), config, HeldBase(quantization=None), shape)
        return
    for changes in METHODS[method].variants:
        adapter = section(method, **changes)
        model = adapted(family, adapter)
        trained = trained_by(adapter, shape)
        counts = trained_counts(model, f".{model.base_model.prefix}")
        assert {part.name: part.num_parameters for part in trained.parts} == counts, changes
        assert trained.num_trainable == sum(one.numel() for one in model.parameters() if one.requires_grad)


@pytest.mark.parametrize("method", METHODS)
def test_modules_to_save_and_exclusions_count(method: str) -> None:
    shape = model_shape(CONFIGS["qwen2"].to_dict(), "x")
    excluded = METHODS[method].excluded
    adapter = section(method, modules_to_save=["lm_head"], exclude_modules=[excluded])
    model = adapted("qwen2", adapter)
    trained = trained_by(adapter, shape)
    assert trained.num_trainable == sum(one.numel() for one in model.parameters() if one.requires_grad)
    assert not [part.name for part in trained.parts if part.name.endswith(f".{excluded}")]
    assert [part.name for part in trained.parts if part.how == "whole" and part.kind == "head"] == ["lm_head"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["q_porj"]}, r"\['q_porj'\]"),
        ({"target_modules": ["embed_tokens"]}, r"takes in (the embedding )?model\.embed_tokens"),
        ({"target_modules": "(("}, "is not a regular expression"),
        ({"exclude_modules": ["nothing"]}, "'nothing', which this llama model does not have"),
        ({"modules_to_save": ["nothing"]}, "'nothing', which this llama model does not have"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_names_that_peft_would_not_take_are_refused_by_the_plan(method: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        planned(CPU, DEMO, adapter=METHODS[method].section | changes)


def test_a_norm_is_not_trained_twice():
    """PEFT 0.21 takes `norm` for the end of every norm's name, and would fail in the worker."""
    with pytest.raises(ModelError, match=r"\['norm'\] takes in model\.layers\.0\.input_layernorm"):
        planned(CPU, DEMO, adapter={"method": "layernorm", "modules_to_save": ["norm"]})
    assert planned(CPU, DEMO, adapter={"method": "layernorm", "modules_to_save": ["lm_head"]}).num_trainable


@pytest.mark.parametrize(
    ("targets", "multiplied_in_front"),
    [
        ({}, {"k_proj": False, "v_proj": False, "down_proj": True}),
        ({"target_modules": ["o_proj"], "feedforward_modules": ["o_proj"]}, {"o_proj": True}),
    ],
)
def test_ia3_multiplies_what_keys_and_values_give_and_what_enters_the_way_back(
    targets: dict[str, Any], multiplied_in_front: dict[str, bool]
) -> None:
    layers = adapted("qwen2", section("ia3", **targets)).named_modules()
    sides = {name.rpartition(".")[2]: layer.is_feedforward for name, layer in layers if hasattr(layer, "is_feedforward")}
    assert sides == multiplied_in_front


def test_ia3_multiplies_in_front_only_what_gets_factors() -> None:
    message = "'gate_proj', which is not among the layers that get factors: down_proj, k_proj"
    with pytest.raises(ModelError, match=message):
        planned(CPU, DEMO, adapter={"method": "ia3", "feedforward_modules": ["gate_proj"]})


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_says_what_is_trained_and_over_what(method: str) -> None:
    held = {"model": {"quantization": "nf4"}} if METHODS[method].takes_nf4 else {}
    plan = planned(gpus(1, 80), LLAMA_3_8B, adapter=METHODS[method].section, **held)
    said = dict(plan_table(plan))["method"]
    assert said.startswith(f"{method} "), said
    assert (" over a base in nf4, " in said) == bool(held)
    assert said.endswith("of the base)")
    assert plan.optimization.weight_decay == 0
    assert 1e-4 <= plan.optimization.learning_rate <= 1e-2


def test_advice_of_a_run_that_does_not_fit_names_the_quantised_base() -> None:
    with pytest.raises(UserError, match=r"model\.quantization=nf4"):
        planned(gpus(1, 14), LLAMA_3_8B, adapter={"method": "ia3"})


@pytest.mark.parametrize("method", METHODS)
def test_fused_experts_get_nothing_and_the_plan_says_so(method: str) -> None:
    shape = model_shape(CONFIGS["mixtral"].to_dict(), "x")
    adapter = section(method)
    notes = expert_notes(adapter, shape, trained_by(adapter, shape), None)
    assert "They are not trained" in notes[0]
    assert not [part for part in trained_by(adapter, shape).parts if part.kind == "experts"]


@pytest.mark.parametrize(
    ("method", "family", "precision"), chequered([*METHODS], ["llama with biases", "qwen2", "gemma3"], ["fp32", "bf16"])
)
def test_planned_activations_are_those_that_autograd_keeps(method: str, family: str, precision: Any) -> None:
    """As tests/unit/test_plan_memory.py holds it for the other methods: within 20 %."""
    config = type(CONFIGS[family])(**WIDE)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    model = model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    adapted_model: Any = add_adapter(model, section(method), revision=None, seed=0)
    for parameter in adapted_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    shape = model_shape(config.to_dict(), "x")
    work = workload(shape, section(method), precision=precision, num_tokens=512)
    casts = next((part.num_bytes for part in memory_parts(work) if part.name == "weights in compute precision"), 0)
    planned_bytes = shape.num_layers * layer_activation_bytes(work) + casts
    assert planned_bytes == pytest.approx(saved_bytes(adapted_model, precision, num_tokens=512), rel=0.2)
