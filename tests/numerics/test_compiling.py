"""Compiled layers compute what they are compiled from, and are not compiled again for each length of rows."""

from typing import Any

import pytest
from torch._dynamo.utils import counters

from raytune.plan.run_plan import RunPlan
from tests.numerics.processes import run_on_ranks
from tests.numerics.runs import (
    LORA,
    SAME_SUMS,
    Material,
    Outcome,
    largest_difference,
    make_plan,
    outcome,
    relative_difference,
    start,
    steps_of,
    train,
)

pytestmark = pytest.mark.slow  # half a minute of compiling


def train_and_count(plan: RunPlan) -> tuple[Outcome, list[int], set[int]]:
    """A run, how many functions had been compiled after each step, and the lengths of its rows."""
    engine, loss_sum, batches_of = start(plan)
    lengths = {batch.num_tokens for step in range(plan.optimization.num_steps) for batch in batches_of(step)}
    numbers, compiled = [], []
    for result in steps_of(plan, engine, loss_sum, batches_of):
        numbers.append(result.read(engine))
        compiled.append(counters["frames"]["ok"])
    return outcome(engine, numbers), compiled, lengths


@pytest.mark.parametrize("adapter", [LORA, {"method": "full"}], ids=["lora", "full"])
def test_compiled_layers_change_nothing_and_are_compiled_once(adapter: dict[str, Any], material: Material) -> None:
    plan = make_plan(material, adapter=adapter, model={"compile": True})
    ((compiled, functions, lengths),) = run_on_ranks(train_and_count, 1, plan)
    alone = train(make_plan(material, adapter=adapter))
    assert relative_difference(compiled.losses, alone.losses) <= SAME_SUMS
    assert largest_difference(compiled, alone) <= SAME_SUMS
    assert functions[0] > 0
    assert len(set(functions)) == 1, "all in the first step"
    assert len(lengths) > 2


@pytest.mark.parametrize("stage", [0, 2])
def test_compiled_layers_of_two_ranks_equal_one_process(stage: int, material: Material) -> None:
    plan = make_plan(material, workers=2, stage=stage, adapter=LORA, model={"compile": True})
    for compiled, functions, _ in run_on_ranks(train_and_count, 2, plan):
        assert functions[0] > 0
        assert relative_difference(compiled.losses, train(make_plan(material, adapter=LORA)).losses) <= SAME_SUMS
