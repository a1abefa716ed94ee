"""Asynchronous halving decides as Ray Tune's ASHA does, and better where a trial is dead."""

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from raytune.sweeps.cost import expected_cost
from raytune.sweeps.halving import Halving, Standings, Verdict, halving_rungs
from raytune.sweeps.rungs import rungs_of
from tests.tiny import PATIENT

GRACE_AND_BUDGET = st.tuples(st.integers(1, 20), st.integers(2, 30)).map(lambda pair: (pair[0], pair[0] * pair[1]))


@st.composite
def arrivals(draw: Any) -> list[tuple[str, int, float]]:
    """Results of several trials in some order: (trial, steps since its last result, value)."""
    trial = st.integers(0, draw(st.integers(0, 11))).map(lambda number: f"trial-{number}")
    value = st.floats(-100, 100).map(lambda value: round(value, 2))
    return draw(st.lists(st.tuples(trial, st.integers(1, 15), value), min_size=1, max_size=60))


@PATIENT
@given(
    arrivals=arrivals(),
    grace_and_budget=GRACE_AND_BUDGET,
    factor=st.sampled_from([2, 3, 4, 2.5]),
    mode=st.sampled_from(["min", "max"]),
)
def test_choices_equal_those_of_ray_tunes_asha(
    arrivals: list[tuple[str, int, float]], grace_and_budget: tuple[int, int], factor: float, mode: Any
) -> None:
    grace, budget = grace_and_budget
    theirs = ASHAScheduler(
        time_attr="step", metric="loss", mode=mode, max_t=budget, grace_period=grace, reduction_factor=factor, brackets=1
    )
    ours = Halving(rungs=halving_rungs(grace, budget, factor), reduction_factor=factor, mode=mode)
    standings = Standings()
    ended: set[str] = set()
    steps: dict[str, int] = {}
    for name, more, value in arrivals:
        if name in ended:
            continue
        trial: Any = SimpleNamespace(trial_id=name)
        if name not in steps:
            theirs.on_trial_add(None, trial)  # pyright: ignore[reportArgumentType]
        # Trials of a sweep are evaluated at every rung. Of one that leaps over a rung, Ray notes its last value there at its end.
        ahead = (rung for index, rung in enumerate(ours.rungs) if name not in standings.at(index))
        step = steps[name] = min(steps.get(name, 0) + more, math.ceil(next(ahead, budget)))
        result = {"step": step, "loss": value}
        action = theirs.on_trial_result(None, trial, result)  # pyright: ignore[reportArgumentType]
        decision = ours.decide(standings, name, step, value)
        if step >= budget:  # Ray stops what has trained to its end, and notes it then
            theirs.on_trial_complete(None, trial, result)  # pyright: ignore[reportArgumentType]
            ended.add(name)
            continue
        assert (decision.verdict is Verdict.STOP) == (action == TrialScheduler.STOP), (name, step, value)
        if action == TrialScheduler.STOP:
            theirs.on_trial_complete(None, trial, result)  # pyright: ignore[reportArgumentType]
            ended.add(name)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_fails_its_trial_at_once_and_moves_no_cut(value: float) -> None:
    halving = Halving(rungs=(10.0, 30.0), reduction_factor=2, mode="min")
    standings = Standings()
    halving.decide(standings, "good", 10, 1.0)
    cut = halving.cut(standings.at(0))
    assert halving.decide(standings, "dead", 10, value).verdict is Verdict.FAIL
    assert halving.cut(standings.at(0)) == cut
    assert halving.decide(Standings(), "dead", 5, value).verdict is Verdict.FAIL, "also between rungs"


def test_rays_asha_lets_a_dead_trial_train_on() -> None:
    """The reason for our own rule; when this fails, Ray has mended it."""
    theirs = ASHAScheduler(time_attr="step", metric="loss", mode="min", max_t=100, grace_period=10, reduction_factor=2)
    good, dead = SimpleNamespace(trial_id="good"), SimpleNamespace(trial_id="dead")
    for trial in (good, dead):
        theirs.on_trial_add(None, trial)  # pyright: ignore[reportArgumentType]
    theirs.on_trial_result(None, good, {"step": 10, "loss": 1.0})  # pyright: ignore[reportArgumentType]
    assert theirs.on_trial_result(None, dead, {"step": 10, "loss": math.nan}) == TrialScheduler.CONTINUE  # pyright: ignore[reportArgumentType]


def test_the_same_trial_is_judged_once_per_rung() -> None:
    halving = Halving(rungs=(10.0,), reduction_factor=2, mode="max")
    standings = Standings()
    halving.decide(standings, "a", 10, 5.0)
    assert halving.decide(standings, "b", 10, 1.0).verdict is Verdict.STOP
    again = halving.decide(standings, "a", 20, 0.0)
    assert (again.verdict, again.rung) == (Verdict.GO_ON, None)


@PATIENT
@given(grace_and_budget=GRACE_AND_BUDGET, factor=st.sampled_from([2, 3, 4]))
def test_rungs_ascend_from_the_grace_and_stay_below_the_budget(grace_and_budget: tuple[int, int], factor: int) -> None:
    grace, budget = grace_and_budget
    rungs = halving_rungs(grace, budget, factor)
    assert rungs[0] == grace
    assert all(later == earlier * factor for earlier, later in pairwise(rungs))
    assert rungs[-1] < budget <= rungs[-1] * factor


def test_hyperband_compares_at_every_power_of_the_factor_below_the_budget() -> None:
    assert rungs_of("hyperband", 27.0, 3.0) == (1.0, 3.0, 9.0)


def test_the_median_rule_compares_every_round() -> None:
    assert rungs_of("median", 5.0, 3.0) == (1.0, 2.0, 3.0, 4.0)


def test_without_a_rule_nothing_is_compared() -> None:
    assert rungs_of("none", 9.0, 3.0) == ()


def test_halving_is_expected_to_cost_about_a_third_of_the_grid() -> None:
    """Recorded curves gave 34-35 % with rungs 6, 18, 54 and a factor of 3."""
    cost = expected_cost(Halving(rungs=(6.0, 18.0), reduction_factor=3, mode="min"), num_trials=16, budget=54.0)
    assert cost.full == 16 * 54
    assert 0.2 < cost.share < 0.5


def test_trials_that_arrive_from_worst_to_best_are_all_trained_to_the_end() -> None:
    halving = Halving(rungs=(1.0, 3.0), reduction_factor=3, mode="min")
    standings = Standings()
    verdicts = [halving.decide(standings, str(number), 1.0, 100.0 - number).verdict for number in range(10)]
    assert set(verdicts) == {Verdict.GO_ON}
