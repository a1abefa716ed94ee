"""How long a step waits for its rows is measured, and is that of the rank that waits longest."""

import time
from collections.abc import Sequence

import pytest

from raytune.data.batches.batches import Batch
from raytune.plan.run_plan import RunPlan
from tests.numerics.processes import run_on_ranks
from tests.numerics.runs import Change, Material, make_plan, start, steps_of

WAIT_S = 0.25


def waits(plan: RunPlan, slow_rank: int) -> list[float]:
    """Seconds that each of two lines says, the first of two steps, the second of one; one rank has a slow disk."""
    engine, loss_sum, batches_of = start(plan)

    def from_a_slow_disk(step: int) -> Sequence[Batch]:
        time.sleep(WAIT_S * (engine.rank == slow_rank))
        return batches_of(step)

    steps = steps_of(plan, engine, loss_sum, from_a_slow_disk, Change(stop=3))
    return [result.read(engine).waited_s for result in steps if result.step > 1]


@pytest.mark.parametrize("slow_rank", [1, None], ids=["one slow disk", "none"])
def test_the_wait_is_that_of_the_rank_that_waits_longest(slow_rank: int | None, material: Material) -> None:
    told = run_on_ranks(waits, 2, make_plan(material, workers=2), slow_rank)
    assert told[0] == told[1], "every rank knows it"
    two_steps, one_step = told[0]
    expected = WAIT_S if slow_rank is not None else 0.0
    assert 2 * expected <= two_steps < 2 * expected + WAIT_S  # room for a busy machine; what is read itself takes milliseconds
    assert expected <= one_step < expected + WAIT_S
