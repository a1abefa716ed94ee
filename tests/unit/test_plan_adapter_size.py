"""Trained parameters against PEFT itself."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from raytune.config.sections.adapter import FullAdapter, LoraAdapter
from raytune.errors import ModelError
from raytune.model.adapters import add_adapter
from raytune.plan.methods import trained_by
from raytune.plan.methods.targets import target_modules
from raytune.plan.model.architectures import model_shape
from tests.unit.test_plan_shapes import CONFIGS

FAMILIES = ["llama with biases", "gemma3", "phi3", "gpt2", "gpt_neox", "qwen2"]
ADAPTERS = {
    "all-linear": LoraAdapter(rank=3),
    "attention": LoraAdapter(rank=4, target_modules="attention"),
    "mlp with DoRA": LoraAdapter(rank=2, target_modules="mlp", use_dora=True),
    "own biases": LoraAdapter(rank=2, bias="lora_only", target_modules="attention"),
    "all biases": LoraAdapter(rank=2, bias="all"),
    "ranks by pattern": LoraAdapter(rank=2, rank_pattern={r".*\.1\..*(proj|dense|c_attn)": 5}),
    "one layer by regex": LoraAdapter(rank=2, target_modules=r".*\.0\..*(proj|dense|c_attn|c_proj)"),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ADAPTERS)
def test_trained_parameters_are_exactly_those_of_peft(family: str, name: str) -> None:
    config, adapter = CONFIGS[family], ADAPTERS[name]
    model = add_adapter(AutoModelForCausalLM.from_config(config), adapter, revision=None, seed=0)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained_by(adapter, model_shape(config.to_dict(), "x")).num_trainable == trained


@pytest.mark.parametrize(
    ("family", "adapter"),
    [
        ("qwen2", LoraAdapter(rank=2, target_modules=["q_proj", "embed_tokens", "lm_head"])),
        ("qwen2", LoraAdapter(rank=2, target_modules=["q_proj", "embed_tokens"], use_dora=True)),
        ("qwen2", LoraAdapter(rank=2, modules_to_save=["embed_tokens", "lm_head"])),
        ("qwen2", LoraAdapter(rank=2, modules_to_save=["norm"], bias="all")),
        ("qwen2", LoraAdapter(rank=2, exclude_modules=["down_proj", "model.layers.0.self_attn.q_proj"])),
        ("gpt2", LoraAdapter(rank=2, target_modules=["attn.c_proj"], modules_to_save=["wte"])),
    ],
)
def test_embeddings_heads_exclusions_and_copies_count_as_in_peft(family: str, adapter: LoraAdapter) -> None:
    config = CONFIGS[family]
    model = add_adapter(AutoModelForCausalLM.from_config(config), adapter, revision=None, seed=0)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained_by(adapter, model_shape(config.to_dict(), "x")).num_trainable == trained


@pytest.mark.parametrize(
    ("family", "adapter"),
    [
        (family, adapter)
        for family in ("mixtral", "qwen3_moe", "qwen2_moe")
        for adapter in (
            LoraAdapter(rank=3),
            LoraAdapter(rank=3, target_modules="mlp"),
            LoraAdapter(rank=3, target_modules="attention"),
            LoraAdapter(rank=3, target_modules=[], target_parameters=["experts.down_proj"]),
            LoraAdapter(rank=3, target_modules=["q_proj"], target_parameters=["gate_up_proj", "mlp.gate.weight"]),
            LoraAdapter(rank=3, exclude_modules=["mlp.experts", "k_proj"]),
            LoraAdapter(rank=3, exclude_modules=["model.layers.1.mlp.experts.down_proj"]),
            LoraAdapter(rank=3, modules_to_save=["1.mlp.experts"]),
            LoraAdapter(rank=3, target_modules=r".*\.0\..*q_proj"),
            LoraAdapter(rank=3, rank_pattern={"experts.down_proj": 2, r"layers.1.mlp.experts.gate_up_proj": 5}),
        )
    ],
)
def test_updates_of_fused_experts_count_as_in_peft(family: str, adapter: LoraAdapter) -> None:
    config = CONFIGS[family]
    model = add_adapter(AutoModelForCausalLM.from_config(config), adapter, revision=None, seed=0)
    trained = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}
    size = trained_by(adapter, model_shape(config.to_dict(), "x"))
    assert size.num_trainable == sum(trained.values())
    assert size.num_in_experts == sum(number for name, number in trained.items() if ".experts." in name and ".lora_" in name)


def test_full_fine_tuning_trains_everything() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS["gemma2"])
    shape = model_shape(CONFIGS["gemma2"].to_dict(), "x")
    assert trained_by(FullAdapter(method="full"), shape).num_trainable == sum(
        parameter.numel() for parameter in model.parameters()
    )


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (LoraAdapter(target_modules=["query"]), r"\['query'\] matches no module of this llama model. .* down_proj, gate_proj"),
        (LoraAdapter(target_modules=["q_proj", "gate_up_proj"]), r"\['gate_up_proj'\] matches no module"),
        (LoraAdapter(target_modules="q_proj"), r"A single string is a regular expression that must match a whole name"),
        (LoraAdapter(target_modules="(q_proj"), r"adapter.target_modules: '\(q_proj' is not a regular expression"),
        (LoraAdapter(rank_pattern={"(": 2}), r"adapter.rank_pattern: '\(' is not a regular expression: .* position 0"),
        (
            LoraAdapter(target_modules=["q_proj"], exclude_modules=["q_proj"]),
            r"no module .* that adapter.exclude_modules leaves to it",
        ),
        (LoraAdapter(modules_to_save=["model"]), r"'all-linear' matches no module .* that adapter.modules_to_save leaves to it"),
        (
            LoraAdapter(modules_to_save=["score"]),
            r"adapter.modules_to_save names 'score'.*model.embed_tokens, model.norm, lm_head",
        ),
    ],
)
def test_names_that_match_nothing_are_refused(adapter: LoraAdapter, message: str) -> None:
    shape = model_shape(CONFIGS["llama"].to_dict(), "x")
    with pytest.raises(ModelError, match=message):
        trained_by(adapter, shape)


def test_groups_hold_layers_only() -> None:
    shape = model_shape(CONFIGS["gpt2"].to_dict(), "x")
    names = {module.name for module in target_modules(LoraAdapter(target_modules="mlp"), shape)}
    assert names == {f"transformer.h.{layer}.mlp.{name}" for layer in range(3) for name in ("c_fc", "c_proj")}
