"""Bottlenecks in a plan: where they stand, behind what of a mixture, what is refused, and what stays when layers are frozen."""

from typing import Any

import pytest
from pydantic import TypeAdapter
from transformers import AutoModelForCausalLM

from raytune.config.sections.adapter import Adapter
from raytune.config.sections.strategy import FreezeSection
from raytune.errors import ModelError
from raytune.model.adapters import add_adapter
from raytune.plan.methods import trained_by
from raytune.plan.model.architectures import model_shape
from raytune.plan.strategies.freezing import narrowed
from tests.unit.plan_cases import CPU, DEMO, planned
from tests.unit.test_plan_shapes import CONFIGS


def section(**changes: Any) -> Any:
    return TypeAdapter(Adapter).validate_python({"method": "bottleneck"} | changes)


@pytest.mark.parametrize(
    ("family", "where", "names"),
    [
        ("llama", "attention-mlp", ["self_attn.o_proj", "mlp.down_proj"]),
        ("llama", "mlp", ["mlp.down_proj"]),
        ("gpt2", "attention", ["attn.c_proj"]),
        ("gpt_neox", "attention-mlp", ["attention.dense", "mlp.dense_4h_to_h"]),
        # One behind all of a mixture, and none behind its shared expert.
        ("qwen2_moe", "attention-mlp", ["self_attn.o_proj", "mlp"]),
    ],
)
def test_one_stands_behind_each_place_of_a_layer(family: str, where: str, names: list[str]) -> None:
    shape = model_shape(CONFIGS[family].to_dict(), "x")
    first = [part.name for part in trained_by(section(target_modules=where), shape).parts if ".0." in part.name]
    assert [name.partition(".0.")[2] for name in first] == names


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
def test_frozen_layers_get_none_in_plan_and_model(family: str) -> None:
    config = CONFIGS[family]
    shape = model_shape(config.to_dict(), "x")
    kept = narrowed(section(), shape, FreezeSection(first_layers=2))
    trained = trained_by(kept, shape)
    assert trained.lowest_layer == 2
    model: Any = add_adapter(AutoModelForCausalLM.from_config(config), kept, revision=None, seed=0)
    assert trained.num_trainable == sum(one.numel() for one in model.parameters() if one.requires_grad)


def test_a_group_of_linear_layers_is_no_place() -> None:
    with pytest.raises(ModelError, match=r"all-linear is no place of a bottleneck\. Set it to attention-mlp or"):
        planned(CPU, DEMO, adapter={"method": "bottleneck", "target_modules": "all-linear"})


def test_a_plan_says_that_nothing_merges() -> None:
    assert any("nothing merges" in reason for reason in planned(CPU, DEMO, adapter={"method": "bottleneck"}).reasons)
