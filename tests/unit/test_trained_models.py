"""What a plan says is trained, and how fast, is what a model has, parameter by parameter, whatever it calls its modules."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from raytune.model.adapters import add_adapter
from raytune.model.meta_shape import shape_of
from raytune.model.parts.freezing import freeze
from raytune.training.engines.optimizer import parameter_groups
from tests.hybrids import HYBRIDS
from tests.peft_methods import METHODS
from tests.unit.plan_cases import planned
from tests.unit.test_meta_shape import OTHERS
from tests.unit.test_plan_shapes import CONFIGS

FULL = {"method": "full"}
LORA = {"method": "lora", "rank": 2, "target_modules": "attention"}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": CONFIGS["llama tied"],
    "opt": OTHERS["opt"],
    "gpt_oss": OTHERS["gpt_oss"],
    "granitemoeshared": OTHERS["granite with a shared expert"],
    "mamba2": HYBRIDS["mamba2"](),
}


def built(family: str, adapter: dict[str, Any], **strategy: Any) -> tuple[Any, Any]:
    """The plan, and the model as a worker has it, without storage."""
    config = FAMILIES[family]
    # PEFT looks at the numbers of BOFT's permutations.
    with torch.device("cpu" if adapter["method"] == "boft" else "meta"):
        model = AutoModelForCausalLM.from_config(config)
        shape = shape_of(model)
        plan = planned(
            shape=shape, adapter=adapter, strategy=strategy, data={"packing": "none" if shape.why_lone else "best_fit"}
        )
        adapted = add_adapter(model, plan.adapter, revision=None, seed=0)
    freeze(adapted, plan.model.frozen)
    return plan, adapted


def trained_names(model: Any) -> set[str]:
    return {name.removeprefix("base_model.model.") for name, value in model.named_parameters() if value.requires_grad}


TRAINED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "sinks of attention are no norms": ("gpt_oss", FULL, {"train_only": ["norms"]}, "norm.weight"),
    "sinks beside frozen projections": ("gpt_oss", FULL, {"modules": [".*_proj", "experts"]}, "sinks"),
    "a state beside trained projections": ("mamba2", FULL, {"train_only": ["in_proj"]}, "in_proj.weight"),
    "a state's own norm": ("mamba2", FULL, {"train_only": [".*mixer.norm"]}, "mixer.norm.weight"),
    "an MLP in the layer itself": ("opt", {"method": "ia3"}, {"first_layers": 1}, "fc2.ia3_l.default"),
    "a group of such an MLP": ("opt", {"method": "lora", "target_modules": "mlp"}, {}, "fc1.lora_A.default.weight"),
    "what ends in a saved name": ("granitemoeshared", LORA | {"modules_to_save": ["mlp"]}, {}, "output_linear.weight"),
}


@pytest.mark.parametrize("case", TRAINED)
def test_what_is_trained_is_what_the_plan_counts(case: str) -> None:
    family, adapter, frozen, example = TRAINED[case]
    plan, model = built(family, adapter, freeze=frozen)
    assert plan.num_trainable == sum(value.numel() for value in model.parameters() if value.requires_grad)
    names = trained_names(model)
    assert any(name.endswith(example) for name in names)
    if "train_only" in frozen:
        assert all(name.endswith(example) for name in names)


@pytest.mark.parametrize(
    ("family", "adapter", "mark"),
    [
        ("llama", FULL, "down_proj.weight"),
        ("llama", LORA | {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}, "down_proj.weight"),
        ("gpt_oss", FULL, "k_proj.weight"),
        ("mamba2", FULL, "mixer.in_proj.weight"),
        *(("llama", row.section, "q_proj") for name, row in METHODS.items() if name not in ("layernorm", "ia3", "bottleneck")),
        ("llama", METHODS["bottleneck"].section, "o_proj"),
    ],
    ids=str,
)
def test_a_rate_and_a_decay_reach_the_modules_that_they_name(family: str, adapter: dict[str, Any], mark: str) -> None:
    wanted = mark.removesuffix(".weight").rpartition(".")[2]
    plan, model = built(family, adapter, rate_scales={wanted: 3.0}, weight_decay_of={wanted: 0.25})
    groups = parameter_groups(model, plan.optimization)
    found = {name: (group["lr_scale"], group["weight_decay"]) for group in groups for name in group["names"]}
    meant = {name for name in found if f".{wanted}." in name and not name.endswith("bias")}
    assert meant
    assert {found[name] for name in meant} == {(3.0, 0.25)}
    assert all(scale == 1 and decay != 0.25 for name, (scale, decay) in found.items() if f".{wanted}." not in name)
