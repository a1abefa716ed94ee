"""A sweep is resolved before its first trial: budget, rungs of each trial, and how many trials run at once."""

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from raytune.config.load import config_from
from raytune.errors import UserError
from raytune.plan.facts.machine import Machine
from raytune.plan.run_plan import RunPlan
from raytune.sweeps.sweep_plan import SweepPlan, num_slots, plan_sweep, share_of, units_per_step
from tests.tiny import PATIENT, tiny_plan

GIB = 2**30
VALIDATED: dict[str, Any] = {"data": {"validation_fraction": 0.1}}


def trial_plan(num_steps: int = 81, global_batch: int = 4, tokens_per_row: int = 100) -> RunPlan:
    return tiny_plan(
        optimization={"num_steps": num_steps},
        batch={"workers": 1, "micro_batch_size": global_batch, "accumulation": 1},
        data={"train": {"name": "t", "path": "x", "num_rows": 10, "num_tokens": 10 * tokens_per_row, "num_targets": 100}},
    )


def sweep_plan(plans: list[RunPlan], **stopping: Any) -> SweepPlan:
    section = config_from({"sweep": {"space": {"training.seed": [1, 2]}, "stopping": stopping}, **VALIDATED}).sweep
    assert section is not None
    return plan_sweep(section, "s", num_trials=2, plans=plans, slots=1)


def test_without_a_grace_there_are_three_comparisons() -> None:
    plan = sweep_plan([trial_plan(81)])
    assert (plan.grace, plan.rungs, plan.rung_steps(trial_plan(81))) == (3.0, (1.0, 3.0, 9.0), (3, 9, 27))


def test_rungs_in_tokens_fall_on_the_first_step_that_has_seen_as_many() -> None:
    small, large = trial_plan(global_batch=2), trial_plan(global_batch=8)
    plan = sweep_plan([small, large], unit="tokens", grace=3000)
    assert (units_per_step(small, "tokens"), units_per_step(large, "tokens")) == (200.0, 800.0)
    assert plan.rung_steps(small)[:2] == (15, 45)
    assert plan.rung_steps(large)[:2] == (4, 12)


@PATIENT
@given(grace=st.integers(1, 5000), tokens_per_row=st.integers(1, 997), batch=st.integers(1, 32))
def test_the_amount_after_a_rungs_step_reaches_the_rung_and_one_step_earlier_does_not(
    grace: int, tokens_per_row: int, batch: int
) -> None:
    trial = trial_plan(num_steps=400, global_batch=batch, tokens_per_row=tokens_per_row)
    if grace >= 400 * units_per_step(trial, "tokens"):
        return
    plan = sweep_plan([trial], unit="tokens", grace=grace)
    steps = plan.rung_steps(trial)
    assert list(steps) == sorted(set(steps))
    for rung in plan.rungs:
        step = next((step for step in steps if plan.amount_at(trial, step) >= rung), None)
        if step is not None and step > 1:
            before = plan.amount_at(trial, step - 1)
            assert before < rung or step - 1 in steps


def test_a_grace_beyond_the_end_of_all_trials_is_refused() -> None:
    with pytest.raises(UserError, match=r"sweep\.stopping\.grace is 100 steps, but trials end after 81"):
        sweep_plan([trial_plan(81)], grace=100)


def test_the_rung_of_an_amount_is_the_last_one_below_it() -> None:
    plan = sweep_plan([trial_plan(81)])
    assert [plan.rung_at(amount) for amount in (0.5, 1.0, 2.9, 3.0, 100.0)] == [None, 0, 0, 1, 2]


def machine(**facts: Any) -> Machine:
    values = {
        "num_nodes": 2,
        "num_cpus": 16,
        "host_memory_bytes": 64 * GIB,
        "num_gpus": 0,
        "gpu_name": None,
        "gpu_memory_bytes": None,
        "supports_bf16": True,
        "attention": ("varlen",),
    }
    return Machine(**(values | facts))


@pytest.mark.parametrize(
    ("facts", "cluster", "max_concurrent", "slots"),
    [
        ({}, {}, "auto", 16),
        ({}, {"cpus_per_worker": 4.0}, "auto", 4),
        ({}, {"workers": 3}, "auto", 5),
        ({"num_gpus": 8, "gpu_name": "H100", "gpu_memory_bytes": 80 * GIB}, {}, "auto", 8),
        ({"num_gpus": 8, "gpu_name": "H100", "gpu_memory_bytes": 80 * GIB}, {"workers": 4}, "auto", 2),
        ({"num_gpus": 8, "gpu_name": "H100", "gpu_memory_bytes": 80 * GIB}, {"gpus_per_worker": 0}, "auto", 16),
        ({}, {}, 3, 3),
        ({"num_cpus": 2}, {"workers": 2}, 5, 1),
    ],
)
def test_as_many_trials_run_at_once_as_their_workers_find_room(
    facts: dict[str, Any], cluster: dict[str, Any], max_concurrent: Any, slots: int
) -> None:
    section = {"space": {"training.seed": [1, 2]}, "max_concurrent": max_concurrent}
    run = config_from({"cluster": cluster, "sweep": section, **VALIDATED})
    workers = cluster.get("workers", 1)
    assert num_slots(machine(**facts), run, workers) == slots


@PATIENT
@given(slots=st.integers(1, 16))
def test_the_shares_of_all_trials_fit_the_cluster_together(slots: int) -> None:
    whole = machine(num_gpus=16, gpu_name="A100", gpu_memory_bytes=80 * GIB)
    share = share_of(whole, slots)
    assert slots * share.num_cpus <= whole.num_cpus
    assert slots * share.num_gpus <= whole.num_gpus
    trials_of_a_node = -(-slots // whole.num_nodes)
    assert trials_of_a_node * share.host_memory_bytes <= whole.host_memory_bytes
