"""Biases that an adapter trained are part of what ranks load again to score or to go on, whole or sharded."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raytune.model.files.export import save_adapter
from raytune.model.load import load_model
from raytune.plan.run_plan import RunPlan
from raytune.training.start.start import prepare_process, start_engine
from tests.numerics.processes import run_on_ranks
from tests.numerics.runs import LORA, Material, make_plan, rank_and_world
from tests.tiny import save_tiny_model


def loaded_again(plan: RunPlan, folder: Path) -> dict[str, Tensor | None]:
    rank, world = rank_and_world()
    engine, _ = start_engine(plan, prepare_process(plan, rank), rank, world, saved=folder)
    return dict(engine.trainable_state())


@pytest.mark.parametrize("bias", ["all", pytest.param("lora_only", marks=pytest.mark.slow)])
def test_biases_that_were_saved_are_loaded_by_ranks_that_shard_their_base(bias: str, material: Material, tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", attention_bias=True, mlp_bias=True)
    plan = make_plan(replace(material, model=base), workers=2, stage=3, adapter=LORA | {"bias": bias})
    model: Any = load_model(plan.model, plan.adapter, device=torch.device("cpu"), seed=0)
    torch.manual_seed(1)
    state = {name: torch.randn_like(one) for name, one in model.named_parameters() if one.requires_grad}
    assert any(name.endswith(".bias") for name in state)
    save_adapter(model, state, tmp_path / "adapter")
    again = run_on_ranks(loaded_again, 2, plan, tmp_path / "adapter")[0]
    assert again.keys() == state.keys()
    for name, value in state.items():
        found = again[name]
        assert found is not None
        assert found.equal(value), name
