"""A second copy of sharded weights in each node changes no number, and takes what the plan says; pairs of ranks are the nodes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch.distributed as dist
from deepspeed.utils import groups
from torch import Tensor

from raytune.plan.costs.memory import NODE_COPY, memory_parts
from raytune.plan.run_plan import RunPlan
from tests.numerics.measured_bytes import measure_all
from tests.numerics.processes import run_on_ranks
from tests.numerics.runs import (
    LORA,
    QLORA,
    SAME_SUMS,
    Change,
    Material,
    Outcome,
    largest_difference,
    make_plan,
    relative_difference,
    train,
)
from tests.numerics.test_plan_bytes import planned
from tests.numerics.test_resume_engine import assert_resumes_exactly
from tests.variants import variants

RANKS, STEPS = 4, 2
ADAPTERS: dict[str, dict[str, Any]] = {"lora": LORA, "full": {"method": "full"}, "qlora": QLORA}


class Gathers:
    """Bytes that a rank received in gathers while it is entered, by the number of ranks in the group."""

    def __init__(self) -> None:
        self.by_size: dict[int, int] = {}

    def __enter__(self) -> "Gathers":
        self._original = deepspeed.comm.allgather_fn
        deepspeed.comm.allgather_fn = self._watched
        return self

    def __exit__(self, *error: Any) -> None:
        deepspeed.comm.allgather_fn = self._original

    def _watched(self, output: Tensor, given: Tensor, group: Any = None, **options: Any) -> Any:
        size = dist.get_world_size(group)
        self.by_size[size] = self.by_size.get(size, 0) + output.numel() * output.element_size()
        return self._original(output, given, group=group, **options)


def trained_with_and_without(plans: list[RunPlan]) -> list[tuple[Outcome, dict[int, int]]]:
    """One after the other in one process, as a sweep's workers do."""
    found = []
    for plan in plans:
        with Gathers() as gathers:
            outcome = train(plan, Change(stop=STEPS))
        found.append((outcome, gathers.by_size))
        assert (groups._get_zero_param_intra_parallel_group() is not None) == (plan.engine.copy_over > 1)
    return found


@pytest.mark.parametrize("adapter", variants(["lora"], ["full", "qlora"]))
def test_a_copy_in_each_node_changes_no_number_and_keeps_a_frozen_base_inside(adapter: str, material: Material) -> None:
    def plan(copy_over: int) -> RunPlan:
        engine = {"copy_over": copy_over, "buckets": {"persistent_elements": 0}}
        division = {"workers": RANKS, "stage": 3, "accumulation": 2}
        # The first update has to change weights, for the second step to show them.
        return make_plan(material, **division, adapter=ADAPTERS[adapter], engine=engine, optimization={"warmup_steps": 0})

    of_ranks = run_on_ranks(trained_with_and_without, RANKS, [plan(2), plan(1), plan(2)])
    (first, _), (without, _), _ = of_ranks[0]
    assert largest_difference(first, without) <= SAME_SUMS
    trained = sum(value.numel() * value.element_size() for value in without.weights.values())
    for (one, gathered), (other, everywhere), (again, _) in of_ranks:
        assert relative_difference(one.losses, other.losses) <= SAME_SUMS
        assert again.numbers == one.numbers
        assert set(everywhere) == {RANKS}
        assert sum(gathered.values()) == sum(everywhere.values())
        # Once after each update; until the first one the copy is there that was made when the weights were loaded.
        assert gathered[RANKS] == pytest.approx((STEPS - 1) * trained, rel=0.05)
        # Trained weights have no copy between an update and the next pass, and constants of 4-bit weights are whole anyway.
        base = RANKS * other.held.weights - trained
        assert one.held.weights - other.held.weights == pytest.approx(0 if adapter == "full" else base / 2, rel=0.04, abs=64)


def test_the_planned_copy_is_what_a_rank_holds_of_it(material: Material) -> None:
    work, plan = planned(material, 3, LORA)
    work = replace(work, workers=RANKS, copy_over=2)
    changes = {
        "batch": plan.batch.model_copy(update={"workers": RANKS}),
        "engine": plan.engine.model_copy(update={"copy_over": 2}),
    }
    parts = {part.name: part.num_bytes for part in memory_parts(work)}
    for (measured,) in run_on_ranks(measure_all, RANKS, [plan.model_copy(update=changes)]):
        of_adapter = 2 * work.trained.num_trainable / 2  # which DeepSpeed drops with each update
        assert measured.weights == pytest.approx(parts["weights"] + parts[NODE_COPY] - of_adapter, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("is_full", [True, False], ids=["full", "lora"])
def test_a_run_with_copies_goes_on_as_if_it_had_not_stopped(is_full: bool, material: Material, tmp_path: Path) -> None:
    """In full training from other weights, of which the copies that were made as they were loaded must go."""

    def plan(model: Path) -> RunPlan:
        engine = {"copy_over": 2, "buckets": {"persistent_elements": 0}}
        adapter = ADAPTERS["full" if is_full else "lora"]
        return make_plan(material, workers=RANKS, stage=3, adapter=adapter, engine=engine, model={"path": str(model)})

    other = material.other_with_dropout if is_full else material.with_dropout
    assert_resumes_exactly(plan(material.with_dropout), plan(other), tmp_path)
