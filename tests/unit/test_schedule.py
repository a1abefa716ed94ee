"""The learning rate against transformers' schedulers, step by step."""

from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_with_hard_restarts_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
    get_wsd_schedule,
)

from raytune.config.sections.training import Schedule
from raytune.plan.run_plan import OptimizationPlan
from raytune.training.steps.schedule import learning_rate
from tests.tiny import tiny_plan

PEAK = 3e-4
STEPS = 50


def plan(schedule: Schedule, **changes: Any) -> OptimizationPlan:
    defaults = {"schedule": schedule, "num_steps": STEPS, "learning_rate": PEAK, "warmup_steps": 7}
    return tiny_plan(optimization=defaults | changes).optimization


def rates_of(make_scheduler: Any, **settings: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = make_scheduler(optimizer, **settings)
    rates = []
    for _ in range(STEPS + 3):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def our_rates(ours: OptimizationPlan) -> list[float]:
    return [learning_rate(step, ours) for step in range(STEPS + 3)]


@pytest.mark.parametrize("warmup", [0, 1, 7, STEPS - 1])
def test_rates_are_those_of_transformers(warmup: int) -> None:
    steps = {"num_warmup_steps": warmup, "num_training_steps": STEPS}
    theirs: list[tuple[OptimizationPlan, list[float]]] = [
        (plan("linear", warmup_steps=warmup), rates_of(get_linear_schedule_with_warmup, **steps)),
        (plan("constant", warmup_steps=warmup), rates_of(get_constant_schedule_with_warmup, num_warmup_steps=warmup)),
        (
            plan("cosine_with_restarts", warmup_steps=warmup, num_cycles=3),
            rates_of(get_cosine_with_hard_restarts_schedule_with_warmup, num_cycles=3, **steps),
        ),
        *(
            (
                plan("cosine", warmup_steps=warmup, min_lr_ratio=ratio),
                # After the last step theirs turns back up; ours stays.
                rates_of(get_cosine_with_min_lr_schedule_with_warmup, min_lr_rate=ratio, **steps)[:-2] + 2 * [PEAK * ratio],
            )
            for ratio in (0.0, 0.1)
        ),
        *(
            (
                plan("polynomial", warmup_steps=warmup, min_lr_ratio=ratio, polynomial_power=power),
                rates_of(get_polynomial_decay_schedule_with_warmup, lr_end=PEAK * ratio, power=power, **steps),
            )
            for ratio, power in ((0.0, 2.0), (0.1, 1.0), (0.1, 0.5))
        ),
    ]
    for ours, rates in theirs:
        assert our_rates(ours) == pytest.approx(rates, rel=1e-12, abs=1e-20), ours.schedule


@pytest.mark.parametrize("warmup", [0, 7])
def test_wsd_is_that_of_transformers_with_a_linear_decay(warmup: int) -> None:
    steps: dict[str, Any] = {"num_decay_steps": 10, "num_training_steps": STEPS, "decay_type": "linear"}
    theirs = rates_of(get_wsd_schedule, num_warmup_steps=warmup, **steps)
    assert our_rates(plan("wsd", warmup_steps=warmup)) == pytest.approx(theirs, rel=1e-12, abs=1e-20)
    # With a minimum, transformers also begins the warm-up there; ours begins at 0, as every other schedule does.
    theirs = rates_of(get_wsd_schedule, num_warmup_steps=0, min_lr_ratio=0.1, **steps)
    assert our_rates(plan("wsd", warmup_steps=warmup, min_lr_ratio=0.1))[warmup:] == pytest.approx(theirs[warmup:], rel=1e-12)


def test_wsd_is_constant_until_it_decays() -> None:
    rates = our_rates(plan("wsd", min_lr_ratio=0.25))
    assert set(rates[7:41]) == {PEAK}
    assert rates[45] == pytest.approx(PEAK * (1 - 0.5 * 0.75))
    assert rates[STEPS] == pytest.approx(PEAK * 0.25)


@given(
    schedule=st.sampled_from(get_args(Schedule)),
    num_steps=st.integers(1, 300),
    warmup=st.integers(0, 300),
    step=st.integers(0, 400),
    minimum=st.floats(0, 1),
    shape=st.fixed_dictionaries(
        {"decay_ratio": st.floats(0, 1), "polynomial_power": st.floats(0.1, 5), "num_cycles": st.integers(1, 9)}
    ),
)
def test_a_rate_is_between_zero_and_the_peak_and_after_the_warm_up_above_the_minimum(
    schedule: Schedule, num_steps: int, warmup: int, step: int, minimum: float, shape: dict[str, Any]
) -> None:
    warmup = min(warmup, num_steps)
    rate = learning_rate(step, plan(schedule, num_steps=num_steps, warmup_steps=warmup, min_lr_ratio=minimum, **shape))
    lowest = PEAK * minimum if step >= warmup else 0.0
    assert lowest * (1 - 1e-12) <= rate <= PEAK * (1 + 1e-12)
