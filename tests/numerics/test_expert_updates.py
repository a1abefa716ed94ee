"""Updates of fused experts against plain PEFT, and divided against whole."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.numerics.oracles import plain_expert_losses
from tests.numerics.runs import LORA, SAME_SUMS, Material, largest_difference, make_plan, relative_difference, run, train
from tests.unit.test_expert_updates import saved_base
from tests.variants import variants

CHECKPOINTING: dict[str, Any] = {"gradient_checkpointing": True}


@pytest.fixture
def mixtral(material: Material, tmp_path: Path) -> Material:
    return replace(material, model=saved_base("mixtral", tmp_path))


def test_experts_train_as_in_plain_peft(mixtral: Material) -> None:
    plan = make_plan(mixtral, adapter=LORA)
    ours = train(plan)
    assert relative_difference(ours.losses, plain_expert_losses(plan)) <= SAME_SUMS
    assert any(".experts." in name for name in ours.weights)


@pytest.mark.parametrize("stage", variants([3], [2]))
def test_experts_on_two_ranks_train_as_on_one(stage: int, mixtral: Material) -> None:
    """With checkpointing, which at stage 3 gathers the experts once more."""
    alone = train(make_plan(mixtral, adapter=LORA))
    sharded = run(make_plan(mixtral, workers=2, stage=stage, adapter=LORA, model=CHECKPOINTING))[0]
    assert relative_difference(sharded.losses, alone.losses) <= SAME_SUMS
    assert largest_difference(sharded, alone) <= SAME_SUMS
