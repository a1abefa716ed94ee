"""Plans of models whose forward pass may hold one document only."""

from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from raytune.config.sections.adapter import LoraAdapter
from raytune.errors import RaytuneError
from raytune.model.adapters import add_adapter
from raytune.model.meta_shape import shape_of
from raytune.plan.describe import plan_text
from raytune.plan.methods import trained_by
from raytune.plan.model.shapes import ModelShape
from tests.hybrids import HYBRIDS
from tests.unit.plan_cases import gpus, planned

ALONE = {"packing": "none", "max_length": 512}


@cache
def shape(name: str) -> ModelShape:
    with torch.device("meta"):
        return shape_of(AutoModelForCausalLM.from_config(HYBRIDS[name]()))


@pytest.mark.parametrize("name", HYBRIDS)
def test_every_parameter_of_every_layer_is_counted(name: str) -> None:
    model = AutoModelForCausalLM.from_config(HYBRIDS[name]())
    modules = dict(model.named_modules())
    for module in shape(name).modules():
        held = sum(parameter.numel() for parameter in modules[module.name].parameters(recurse=False))
        assert module.num_parameters == held, module.name
    assert shape(name).num_parameters == sum(parameter.numel() for parameter in model.parameters())
    adapter = LoraAdapter(rank=2)
    adapted = add_adapter(model, adapter, revision=None, seed=0)
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert trained_by(adapter, shape(name)).num_trainable == trained


@pytest.mark.parametrize("name", HYBRIDS)
def test_packed_rows_are_refused_with_the_way_out(name: str) -> None:
    with pytest.raises(RaytuneError, match=r"data\.packing is best_fit\. Set data\.packing to none"):
        planned(gpus(2), shape(name), data={"max_length": 512})
    plan = planned(gpus(2), shape(name), data=ALONE)
    assert (plan.batch.micro_batch_size, plan.model.packs) == (1, False)
    assert plan.model.attention in ("sdpa", "eager", "flash_attention_2")
    assert "each forward pass has one document" in plan_text(plan)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"training": {"per_device_train_batch_size": 4}}, "Set it to 1; training.gradient_accumulation_steps 4 makes as many"),
        ({"model": {"attention": "varlen"}}, "model.attention varlen does not work for this jamba model here"),
        ({"adapter": {"method": "qlora"}}, "hands the weight of mamba.dt_proj to a kernel.*Set adapter.method to lora"),
        ({"adapter": {"method": "lora", "target_modules": ["dt_proj"]}}, "an update of the layer would not be seen"),
    ],
)
def test_what_such_a_model_cannot_do_is_refused(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(RaytuneError, match=said):
        planned(gpus(2), shape("jamba"), data=ALONE, **sections)


def test_layers_that_a_group_leaves_out_are_named() -> None:
    notes = " ".join(planned(gpus(2), shape("qwen3_next"), data=ALONE).notes)
    assert "all-linear leaves out mlp.shared_expert.gate_proj, mlp.shared_expert.up_proj, mlp.shared_expert.down_proj" in notes
    assert "Groups of target modules leave out mamba.out_proj" in " ".join(planned(gpus(2), shape("bamba"), data=ALONE).notes)


def test_rows_per_step_are_made_by_accumulation() -> None:
    plan = planned(gpus(2), shape("lfm2"), data=ALONE, training={"global_batch_size": 16})
    assert (plan.batch.micro_batch_size, plan.batch.accumulation) == (1, 8)
    with pytest.raises(RaytuneError, match="per_device_train_batch_size 1"):
        planned(gpus(2), shape("lfm2"), data=ALONE, training={"global_batch_size": 16, "gradient_accumulation_steps": 2})
