"""(IA)^3 in a plan: which layers get factors and how many, in numbers that are PEFT's own; and what is refused."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from raytune.config.adapter import Ia3Adapter
from raytune.errors import ModelError, UserError
from raytune.model.adapters import add_adapter
from raytune.plan.activations import layer_activation_bytes
from raytune.plan.architectures import model_shape
from raytune.plan.describe import plan_table
from raytune.plan.methods import trained_by
from tests.unit.plan_cases import CPU, DEMO, LLAMA_3_8B, gpus, planned
from tests.unit.test_plan_memory import saved_bytes, workload
from tests.unit.test_plan_shapes import CONFIGS

FAMILIES = ["llama with biases", "gemma3", "phi3", "gpt2", "gpt_neox", "qwen2", "mixtral", "qwen2_moe"]
SECTIONS: dict[str, dict[str, Any]] = {
    "as in the paper": {},
    "all-linear": {"target_modules": "all-linear"},
    "attention": {"target_modules": "attention"},
    "by regular expression": {"target_modules": r".*\.1\..*(proj|dense|c_attn|c_proj)"},
}


def ia3(**fields: Any) -> Ia3Adapter:
    return Ia3Adapter(method="ia3", **fields)


def adapted(family: str, adapter: Ia3Adapter) -> Any:
    return add_adapter(AutoModelForCausalLM.from_config(CONFIGS[family]), adapter, revision=None, seed=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SECTIONS)
def test_trained_factors_are_exactly_those_of_peft(family: str, name: str) -> None:
    adapter = ia3(**SECTIONS[name])
    model = adapted(family, adapter)
    counts = {
        name.removeprefix("base_model.model.").partition(".ia3_l")[0]: parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    trained = trained_by(adapter, model_shape(CONFIGS[family].to_dict(), "x"))
    assert {part.name: part.num_parameters for part in trained.parts} == counts
    assert {part.how for part in trained.parts} == {"scale"}


def test_the_paper_s_layers_are_keys_values_and_the_way_back_which_is_multiplied_in_front() -> None:
    model = adapted("qwen2", ia3())
    sides = {
        name.rpartition(".")[2]: module.is_feedforward
        for name, module in model.named_modules()
        if hasattr(module, "is_feedforward")
    }
    assert sides == {"k_proj": False, "v_proj": False, "down_proj": True}
    attention_alone = adapted("gpt2", ia3(target_modules=["attn.c_proj"], feedforward_modules=["attn.c_proj"]))
    assert [name for name, module in attention_alone.named_modules() if getattr(module, "is_feedforward", False)]


def test_modules_to_save_and_exclusions_count() -> None:
    adapter = ia3(modules_to_save=["lm_head"], exclude_modules=["k_proj"])
    model = adapted("qwen2", adapter)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained_by(adapter, model_shape(CONFIGS["qwen2"].to_dict(), "x")).num_trainable == trained


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"target_modules": ["q_porj"]}, r"\['q_porj'\] matches no module"),
        ({"target_modules": ["embed_tokens"]}, "takes in the embedding model.embed_tokens, for which PEFT has no factors"),
        (
            {"feedforward_modules": ["gate_proj"]},
            "'gate_proj', which is not among the layers that get factors: down_proj, k_proj",
        ),
        ({"exclude_modules": ["nothing"]}, "'nothing', which this llama model does not have"),
        ({"modules_to_save": ["nothing"]}, "'nothing', which this llama model does not have"),
    ],
)
def test_what_peft_would_not_take_is_refused_by_the_plan(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        planned(CPU, DEMO, adapter={"method": "ia3"} | section)


def test_a_plan_says_what_is_trained_and_over_what() -> None:
    plan = planned(gpus(1, 24), LLAMA_3_8B, adapter={"method": "ia3"}, model={"quantization": "nf4"})
    # 32 layers of 1024 keys, 1024 values and 14336 inputs of the way back.
    assert plan.num_trainable == 32 * (1024 + 1024 + 14336)
    assert dict(plan_table(plan))["method"] == (
        "ia3 on keys-values-mlp over a base in nf4, 524k trained parameters (0.00653% of the base)"
    )
    assert plan.optimization.learning_rate == 2e-3
    assert plan.optimization.weight_decay == 0
    assert plan.model.quantization is not None


def test_advice_of_a_run_that_does_not_fit_names_the_quantised_base() -> None:
    with pytest.raises(UserError, match=r"model\.quantization=nf4"):
        planned(gpus(1, 14), LLAMA_3_8B, adapter={"method": "ia3"})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama with biases", "qwen2"])
def test_planned_activations_are_those_that_autograd_keeps(family: str, precision: Any) -> None:
    """As tests/unit/test_plan_memory.py holds it for the other methods: within 20 %."""
    wide: dict[str, Any] = {"num_hidden_layers": 3, "vocab_size": 101, "pad_token_id": 0}
    wide |= {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = type(CONFIGS[family])(**wide)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    model = model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    adapted_model: Any = add_adapter(model, ia3(), revision=None, seed=0)
    for parameter in adapted_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    shape = model_shape(config.to_dict(), "x")
    work = workload(shape, ia3(), precision=precision, num_tokens=512)
    planned_bytes = shape.num_layers * layer_activation_bytes(work)
    assert planned_bytes == pytest.approx(saved_bytes(adapted_model, precision, num_tokens=512), rel=0.2)
