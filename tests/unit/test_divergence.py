"""The guard against divergence: decided by a history alone, and refused where it would promise too much."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from raytune.config.sections.divergence import DivergenceSection
from raytune.config.sections.run import RunConfig
from raytune.errors import PlanError, UserError
from raytune.metrics.follower import Follower
from raytune.metrics.history import History
from raytune.metrics.points import Point, RollBack, standing
from raytune.metrics.writer import MetricsWriter
from raytune.plan.choosing.stages import possible_stages
from raytune.plan.run_plan import CheckpointPlan
from raytune.plan.strategies.divergence import guard_in_words, guard_notes, guard_of
from raytune.training.steps.divergence import findings, logged_steps, rate_scale
from raytune.training.steps.spikes import Logged, highest_ordinary, spike_at, spikes_in_a_row, where_it_diverged
from raytune.training.steps.stopping import Findings
from tests.tiny import PATIENT, tiny_plan

values = st.floats(0.01, 100, allow_nan=False)


def rule(**changes: Any) -> DivergenceSection:
    return DivergenceSection.model_validate({"window": 4, "patience": 1} | changes)


def logged(losses: list[float], norms: list[float] | None = None) -> list[Logged]:
    return [
        Logged(step=index + 1, values={"train/loss": loss, "train/grad_norm": norms[index] if norms else 1.0})
        for index, loss in enumerate(losses)
    ]


@PATIENT
@given(st.lists(values, max_size=40), st.integers(4, 30), st.sampled_from([1.0, 3.0, 6.0]))
def test_a_spike_is_above_the_median_by_so_many_deviations_of_the_window(
    seen: list[float], window: int, threshold: float
) -> None:
    limit = highest_ordinary(seen, rule(window=window, threshold=threshold))
    last = seen[-window:]
    if len(last) < min(16, window):
        assert limit == math.inf
        return
    middle = statistics.median(last)
    spread = sorted(abs(value - middle) for value in last)
    spread_middle = (spread[(len(spread) - 1) // 2] + spread[len(spread) // 2]) / 2
    assert limit == pytest.approx(middle + threshold * max(1.4826 * spread_middle, middle / 100))
    assert limit > middle


@PATIENT
@given(st.lists(values, min_size=4, max_size=20), st.floats(0.1, 10))
def test_what_is_a_spike_does_not_depend_on_the_unit(seen: list[float], unit: float) -> None:
    assert highest_ordinary([unit * value for value in seen], rule()) == pytest.approx(unit * highest_ordinary(seen, rule()))


@PATIENT
@given(st.lists(values, min_size=12, max_size=30), st.integers(1, 3))
def test_spikes_in_a_row_are_those_that_the_steps_have_one_by_one(losses: list[float], patience: int) -> None:
    guard = rule(window=8, patience=patience, threshold=1.0)
    steps = logged(losses)
    is_spike = [spike_at(steps, index, guard) is not None for index in range(len(steps))]
    in_a_row, began = 0, []
    for end in range(1, len(steps) + 1):
        in_a_row = in_a_row + 1 if is_spike[end - 1] else 0
        assert [spike.step for spike in spikes_in_a_row(steps[:end], guard)] == list(range(end - in_a_row + 1, end + 1))
        began += [end] if in_a_row == patience else []
    assert [noted.step for noted in where_it_diverged(steps, guard)] == began


def test_falling_losses_are_no_spikes_and_neither_is_a_small_rise_of_what_hardly_differs() -> None:
    falling = [5 * 0.97**step for step in range(60)]
    assert where_it_diverged(logged(falling), rule(window=16)) == []
    flat = [2.0] * 20
    assert spike_at(logged([*flat, 2.1]), 20, rule()) is None
    assert spike_at(logged([*flat, 2.2]), 20, rule()) is not None


def test_a_level_that_stays_is_ordinary_after_half_a_window() -> None:
    losses = [1.0 + 0.01 * (step % 3) for step in range(16)] + [3.0 + 0.01 * (step % 3) for step in range(16)]
    steps = logged(losses)
    spiking = [step.step for index, step in enumerate(steps) if spike_at(steps, index, rule(window=8))]
    assert spiking == [17, 18, 19, 20]


def test_only_what_is_watched_is_looked_at_and_overflow_is_no_value() -> None:
    norms = [1.0, 1.1, math.inf, 1.2, 0.9, 50.0]
    steps = logged([2.0] * 6, norms)
    assert spike_at(steps, 5, rule(watch="loss")) is None
    assert spike_at(steps, 5, rule()) is None, "three finite values are too few"
    steps = logged([2.0] * 7, [1.0, *norms])
    assert spike_at(steps, 6, rule(window=5, patience=1)) is None
    assert spike_at(logged([2.0] * 7, [1.0, 1.0, 1.1, 1.2, 1.0, 0.9, math.inf]), 6, rule()) is None
    spike = spike_at(logged([2.0] * 6, [1.0, 1.1, 1.3, 1.2, 0.9, 50.0]), 5, rule(watch="grad_norm"))
    assert spike is not None
    assert (spike.metric, spike.value, spike.median) == ("train/grad_norm", 50.0, 1.15)
    assert "train/grad_norm 50 at step 6" in spike.text


# --- The history ---------------------------------------------------------------------------------------------------------------


def write(path: Path, attempt: int, resumed_step: int, steps: range, back: RollBack | None = None) -> None:
    with MetricsWriter(path, attempt=attempt, resumed_step=resumed_step, roll_back=back, clock=lambda: 0.0) as writer:
        for step in steps:
            writer.write(step, {"train/loss": attempt + step / 100, "train/grad_norm": 1.0, "train/skipped": 0.0})


def test_steps_after_a_roll_back_take_the_place_of_those_before(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path)
    write(path, 1, 0, range(1, 8))
    assert [point.step for point in follower.look()] == [1, 2, 3, 4, 5, 6, 7]
    back = RollBack(bad_step=7, to=4, rate_factor=0.5)
    write(path, 1, 4, range(5, 7), back)
    assert [point.step for point in follower.look()] == [5, 6]
    history = History.read(path)
    assert [point.step for point in history.points] == [1, 2, 3, 4, 5, 6]
    assert history.roll_backs == (back,)
    assert [step.step for step in logged_steps(history, log_every=2)] == [2, 4, 6]
    assert [step.step for step in logged_steps(history, log_every=1, last_step=3)] == [1, 2, 3]
    assert json.loads(path.read_text().splitlines()[8])["rate_factor"] == 0.5


@pytest.mark.parametrize(
    ("tos", "step", "left"), [([20], 20, [20]), ([20], 30, [20]), ([20], 10, []), ([20, 10], 15, [20, 10]), ([10, 20], 15, [10])]
)
def test_a_resume_forgets_the_roll_backs_that_came_after_its_checkpoint(tos: list[int], step: int, left: list[int]) -> None:
    backs = [RollBack(bad_step=to + 5, to=to, rate_factor=0.5) for to in tos]
    assert [back.to for back in standing(backs, step)] == left
    assert rate_scale(standing(backs, step)) == 0.5 ** len(left)


def test_an_attempt_that_resumes_before_a_roll_back_has_none(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 0, range(1, 8))
    write(path, 1, 4, range(5, 7), RollBack(bad_step=7, to=4, rate_factor=0.5))
    write(path, 2, 5, range(6, 8))
    assert len(History.read(path).roll_backs) == 1
    write(path, 3, 2, range(3, 5))
    assert History.read(path).roll_backs == ()


def test_the_findings_say_what_was_done_and_survive_the_result(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 0, range(1, 8))
    write(path, 1, 4, range(5, 7), RollBack(bad_step=7, to=4, rate_factor=0.5))
    write(path, 1, 4, range(5, 7), RollBack(bad_step=6, to=4, rate_factor=0.5))
    with MetricsWriter(path, attempt=2, resumed_step=6) as writer:
        writer.write(7, {"train/loss": 1.0, "train/grad_norm": 9.0, "train/skipped": 2.0})
    found = findings(History.read(path), None, 1)
    assert [noted.step for noted in found] == [7, 6, 7]
    assert "times 0.25" in found[1].reason
    assert "2 updates were not made" in found[2].reason
    assert Findings.from_json(json.loads(json.dumps(Findings(divergence=found).to_json()))).divergence == found
    assert Findings.from_json({"stopped": None}).divergence == ()
    calm, spiking = [2.0] * 20, [9.0] * 3
    points = tuple(Point(step=one.step, time=0.0, attempt=1, values=one.values) for one in logged([*calm, *spiking]))
    warned = findings(History(points), rule(patience=3, window=16), 1)
    assert [noted.step for noted in warned] == [23]
    assert findings(History(points), rule(patience=3, window=16, policy="stop"), 1) == ()


# --- The plan ------------------------------------------------------------------------------------------------------------------


def config(**sections: Any) -> RunConfig:
    return RunConfig.model_validate({"training": {"divergence": {"policy": "roll_back"}}} | sections)


def checkpoint(**changes: Any) -> CheckpointPlan:
    return tiny_plan().checkpoint.model_copy(update=changes)


def test_a_guard_that_could_not_roll_back_is_refused_with_the_way_out() -> None:
    assert guard_of(config(), checkpoint(every_steps=10, keep_last=2)) is not None
    with pytest.raises(UserError, match=r"Set checkpoint.keep_last to 4 or more, or checkpoint.every_steps to more than 3"):
        guard_of(config(), checkpoint(every_steps=1, keep_last=3))
    assert guard_of(config(), checkpoint(every_steps=1, keep_last=4)) is not None
    with pytest.raises(UserError, match=r"strategy.unfreeze"):
        guard_of(
            config(strategy={"unfreeze": [{"last_layers": 1}, {"from_step": 5, "last_layers": 2}]}), checkpoint(every_steps=10)
        )
    assert guard_of(RunConfig(), checkpoint(every_steps=1, keep_last=1)) is None


def test_deepspeed_does_not_skip_spikes_in_fp16() -> None:
    training = RunConfig.model_validate({"training": {"divergence": {"policy": "skip"}}}).training
    assert possible_stages(training, [], "cuda", 2, "bf16") == [0, 1, 2, 3]
    assert possible_stages(training, [], "cuda", 2, "fp16") == [0]
    sharded = training.model_copy(update={"zero": training.zero.model_copy(update={"stage": 2})})
    with pytest.raises(PlanError, match=r"training.divergence.policy is skip"):
        possible_stages(sharded, [], "cuda", 2, "fp16")


def test_patience_that_cannot_be_reached_is_refused() -> None:
    with pytest.raises(ValidationError, match="less than half of window"):
        rule(window=6, patience=3)
    with pytest.raises(ValidationError, match="watch cannot be loss"):
        rule(policy="skip", watch="loss")


def test_the_plan_says_what_is_done_and_what_cannot_happen() -> None:
    plan = tiny_plan(divergence={"policy": "roll_back"})
    assert "rolls back to the newest checkpoint before, at 0.5 of the rate; at most 3 times" in guard_in_words(plan)
    assert "cannot find a spike" in next(guard_notes(plan)), "four steps are too few"
    assert guard_in_words(tiny_plan()) == ""
    assert list(guard_notes(tiny_plan())) == []
