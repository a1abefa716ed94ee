"""Rules of stopping: decided by a history alone, equal to an independent wording of them, and not by chance."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune.config.load import config_from
from raytune.config.sections.stopping import EarlyStoppingSection, OverfittingSection
from raytune.errors import PlanError
from raytune.metrics.history import History
from raytune.metrics.writer import MetricsWriter
from raytune.plan.run_plan import StoppingPlan
from raytune.plan.strategies.stopping import check_gap
from raytune.training.steps.stopping import (
    Curve,
    Evaluated,
    Findings,
    Stopping,
    overfits,
    reason_to_stop,
    verdict,
    where_overfitting_began,
)
from tests.tiny import PATIENT

NEVER = 10**6

values = st.one_of(st.integers(0, 8).map(lambda tenths: tenths / 8), st.just(math.nan), st.just(math.inf))


def evaluations(losses: list[float], train: list[float] | None = None) -> list[Evaluated]:
    return [
        Evaluated(step=index + 1, values={"validation/loss": loss}, train_loss=train[index] if train else 0.0)
        for index, loss in enumerate(losses)
    ]


def keras_stop(losses: list[float], patience: int, min_delta: float, sign: int) -> int | None:
    """How many values are seen before the end: a counter that a better value puts back, as Keras has it."""
    best, waited = math.inf, 0
    for seen, loss in enumerate(losses, start=1):
        waited += 1
        if math.isfinite(loss) and sign * loss + min_delta < best:
            best, waited = sign * loss, 0
        if waited >= patience:
            return seen
    return None


@PATIENT
@given(st.lists(values, max_size=12), st.integers(1, 4), st.sampled_from([0.0, 0.125, 0.25]), st.sampled_from(["min", "max"]))
def test_early_stopping_is_a_counter_that_better_values_put_back(
    losses: list[float], patience: int, min_delta: float, mode: Any
) -> None:
    rule = EarlyStoppingSection(patience=patience, min_delta=min_delta, mode=mode)
    seen = next((end for end in range(len(losses) + 1) if reason_to_stop(evaluations(losses[:end]), rule)), None)
    assert seen == keras_stop(losses, patience, min_delta, 1 if mode == "min" else -1)


def test_small_gains_count_once_they_add_up() -> None:
    rule = EarlyStoppingSection(patience=3, min_delta=0.25)
    creeping = [1.0 - k / 8 for k in range(9)]
    assert not any(reason_to_stop(evaluations(creeping[:end]), rule) for end in range(10))
    assert reason_to_stop(evaluations([1.0, 0.875, 0.875, 0.875]), rule)


def test_any_metric_can_be_looked_at() -> None:
    rule = EarlyStoppingSection(patience=1, metric="validation/code/loss")
    curve = [Evaluated(step=k, values={"validation/loss": -k, "validation/code/loss": k}, train_loss=0.0) for k in (1, 2)]
    assert reason_to_stop(curve, rule) == "validation/code/loss was not better than 1 (step 1) at 1 evaluation in a row"


@pytest.mark.parametrize(
    ("losses", "train", "found"),
    [
        ([3.0, 2.0, 2.1, 2.2], [3.0, 2.0, 1.0, 0.5], True),
        ([3.0, 2.0, 2.1, 2.1], [3.0, 2.0, 1.0, 0.5], False),  # it no longer rises
        ([3.0, 2.0, 2.1, 2.2], [3.0, 2.0, 2.5, 2.6], False),  # both rise: that is no overfitting
        ([2.0, 2.1], [2.0, 1.0], False),  # too short
        ([2.0, math.nan, 2.2], [2.0, 1.0, 0.5], False),
    ],
)
def test_overfitting_is_a_validation_loss_that_rises_while_the_training_loss_falls(
    losses: list[float], train: list[float], found: bool
) -> None:
    assert bool(overfits(evaluations(losses, train), OverfittingSection(patience=2))) is found


def test_overfitting_is_a_gap_that_stays_too_wide_where_that_is_asked_for() -> None:
    curve = evaluations([2.0, 2.0, 2.0, 2.0], [1.9, 1.0, 1.0, 1.0])
    rule = OverfittingSection(patience=3, max_gap=0.5)
    assert [bool(overfits(curve[:end], rule)) for end in range(5)] == [False, False, False, False, True]
    assert not overfits(curve, OverfittingSection(patience=3))


@PATIENT
@given(st.lists(values, max_size=14), st.lists(values, min_size=14, max_size=14), st.integers(1, 3))
def test_overfitting_is_told_once_each_time_it_begins(losses: list[float], train: list[float], patience: int) -> None:
    curve, rule = evaluations(losses, train), OverfittingSection(patience=patience, max_gap=0.25)
    verdicts = [bool(overfits(curve[:end], rule)) for end in range(len(curve) + 1)]
    began = [step for step in range(1, len(curve) + 1) if verdicts[step] and not verdicts[step - 1]]
    assert [found.step for found in where_overfitting_began(curve, rule)] == began


def test_only_a_policy_to_stop_stops() -> None:
    curve = Curve(1, 1)
    curve.evaluations = evaluations([2.0, 2.1, 2.2], [2.0, 1.0, 0.5])
    warns = verdict(curve, StoppingPlan(overfitting=OverfittingSection(patience=2)), 3)
    assert (warns.stopped, [found.step for found in warns.overfitting]) == (None, [3])
    stops = verdict(curve, StoppingPlan(overfitting=OverfittingSection(patience=2, policy="stop")), 3)
    assert stops.stopped is not None
    assert (stops.stopped.step, stops.stopped.rule) == (3, "overfitting")
    assert Findings.from_json(json.loads(json.dumps(stops.to_json()))) == stops
    assert Findings.from_json({}) == Findings(), "results of an earlier raytune have no findings"


def test_early_stopping_by_a_suite_counts_its_results_by_their_steps_however_late_they_come() -> None:
    rules = StoppingPlan(early_stopping=EarlyStoppingSection(patience=2, metric="qa/f1", mode="max"))
    curve = Curve(2, 1, suites_every=4)
    for step in range(1, 13):
        curve.add(step, {"train/loss": 1.0})
        if step % 2 == 0:
            curve.add(step, {"validation/loss": float(step)})
    for step, value in ((0, 0.9), (4, 0.5), (12, 0.4), (8, 0.3), (10, 0.0)):  # 0 and 10: not by the period
        curve.add(step, {"qa/f1": value, "qa/exact_match": 0.0})
    assert [(one.step, one.values["qa/f1"]) for one in curve.of_suites] == [(4, 0.5), (8, 0.3), (12, 0.4)]
    stopped = verdict(curve, rules, 13).stopped
    assert stopped is not None
    assert stopped.step == 13
    assert "qa/f1 was not better than 0.5 (step 4) at 2 evaluations in a row" in stopped.reason
    curve.add(16, {"qa/f1": 0.6})
    assert verdict(curve, rules, 17).stopped is None
    assert len(curve.evaluations) == 6, "of validation rows, untouched"


def test_what_clocks_rungs_and_the_start_add_does_not_count() -> None:
    """A trial is evaluated at rungs too, and a run on the clock is logged where it is saved: neither may end it elsewhere."""
    plain, beside = Curve(4, 2), Curve(4, 2)
    for step in range(1, 17):
        if step % 2 == 0:
            plain.add(step, {"train/loss": 1.0 / step})
            beside.add(step, {"train/loss": 1.0 / step})
        elif step in (3, 7):
            beside.add(step, {"train/loss": 100.0})
            beside.add(step, {"validation/loss": -1.0})
        if step % 4 == 0:
            plain.add(step, {"validation/loss": 2.0})
            beside.add(step, {"validation/loss": 2.0})
    beside.add(0, {"validation/loss": -5.0})
    assert plain.evaluations == beside.evaluations
    assert [(one.step, one.train_loss) for one in plain.evaluations[:2]] == [(4, (1 / 2 + 1 / 4) / 2), (8, (1 / 6 + 1 / 8) / 2)]


@PATIENT
@given(st.lists(values, min_size=1, max_size=10), st.integers(1, 3), st.data())
def test_a_resumed_run_decides_as_the_unbroken_one(losses: list[float], patience: int, data: st.DataObject) -> None:
    rules = StoppingPlan(early_stopping=EarlyStoppingSection(patience=patience), overfitting=OverfittingSection(patience=2))
    died = data.draw(st.integers(0, len(losses)))
    saved = data.draw(st.integers(0, died))

    def unbroken(until: int) -> Curve:
        curve = Curve(1, 1)
        for step in range(1, until + 1):
            curve.add(step, {"train/loss": 1.0 / step})
            curve.add(step, {"validation/loss": losses[step - 1]})
        return curve

    lines = [{"attempt": 1, "time": 0.0, "resumed_step": 0}]
    for attempt, first, last in ((1, 1, died), (2, saved + 1, saved + 1)):
        for step in range(first, min(last, len(losses)) + 1):
            loss = losses[step - 1]
            word: Any = loss if math.isfinite(loss) else "NaN" if math.isnan(loss) else "Infinity"
            lines.append({"attempt": attempt, "time": 0.0, "step": step, "train/loss": 1.0 / step, "validation/loss": word})
        lines.append({"attempt": attempt + 1, "time": 0.0, "resumed_step": saved})
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    curve = Curve(1, 1).read(History.parse(text, "metrics.jsonl"), saved)
    assert len(curve.evaluations) == saved
    for step in range(saved, len(losses) + 1):
        if step > saved:
            curve.add(step, {"train/loss": 1.0 / step, "validation/loss": losses[step - 1]})
        assert verdict(curve, rules, step) == verdict(unbroken(step), rules, step)


def test_ranks_do_what_rank_0_says_and_say_nothing_without_rules() -> None:
    rules = StoppingPlan(early_stopping=EarlyStoppingSection(patience=1))
    said: list[str] = []
    rank_0 = Stopping(rules, NEVER, Curve(1, 1), lambda value: [value, None], lambda event, **facts: said.append(event))
    for step, loss in ((1, 1.0), (2, 2.0)):
        rank_0.add(step, {"validation/loss": loss})
    assert rank_0.ends_after(2)
    assert said == ["stopped_early"]
    other = Stopping(rules, NEVER, Curve(1, 1), lambda value: [rank_0.findings, value], lambda event, **facts: None)
    assert other.ends_after(2), "though it has heard nothing"

    def refuse(value: Any) -> list[Any]:
        raise AssertionError("a collective of a rule that nobody asked for")

    off = Stopping(StoppingPlan(), NEVER, Curve(1, 1), refuse, lambda event, **facts: None)
    off.add(1, {"validation/loss": 1.0})
    assert not off.has_ended(0)
    assert not off.ends_after(1)
    assert not Curve(1, 1).evaluations


def test_nothing_ends_early_after_the_last_step() -> None:
    rules = StoppingPlan(early_stopping=EarlyStoppingSection(patience=1))
    stopping = Stopping(rules, 2, Curve(1, 1), lambda value: [value], lambda event, **facts: None)
    for step in (1, 2):
        stopping.add(step, {"validation/loss": 1.0})
    assert not stopping.ends_after(2)
    assert stopping.findings == Findings()


def test_metrics_files_give_the_numbers_back_to_the_bit(tmp_path: Path) -> None:
    path, thirds = tmp_path / "metrics.jsonl", [k / 3 for k in range(1, 8)]
    with MetricsWriter(path, attempt=1, resumed_step=0) as writer:
        for step, loss in enumerate(thirds, start=1):
            writer.write(step, {"train/loss": loss / 7})
            writer.write(step, {"validation/loss": loss})
    read = Curve(2, 1).read(History.read(path), len(thirds)).evaluations
    assert [one.values["validation/loss"] for one in read] == thirds[1::2]
    assert read[0].train_loss == (thirds[0] / 7 + thirds[1] / 7) / 2


TWO = [{"path": "demo:train", "loss_weight": 2.0}, {"path": "demo:validation"}]
IN_PARTS = [{"path": "demo:train", "proportion": 2.0}, {"path": "demo:validation", "proportion": 1.0}]
REPLAY: dict[str, Any] = {"data": ["demo:validation"], "share": 0.2}
UNLIKE: dict[str, tuple[dict[str, Any], str]] = {
    "a teacher": ({"strategy": {"distillation": {"teacher": "base"}}}, "strategy.distillation is something else"),
    "weights of tokens": ({"data": {"token_weights": {"numbers": 2.0}}}, "data.token_weights is something else"),
    "replayed rows": ({"strategy": {"replay": REPLAY}}, "strategy.replay says what rows count"),
    "weights of sources": ({"data": {"train": TWO}}, "loss_weight of data.train says what rows count"),
    "proportions": ({"data": {"train": IN_PARTS}}, "proportion of data.train says what rows count"),
    "an average": ({"training": {"averaging": {}}}, "the average that training.averaging makes"),
    "an average of the optimizer": (
        {"training": {"optimizer": "schedule_free_adamw"}},
        "training.optimizer schedule_free_adamw makes",
    ),
}
LIKE: dict[str, dict[str, Any]] = {
    "plain": {},
    "nothing replayed": {"strategy": {"replay": REPLAY | {"share": 0.0}}},
    "weights that are all alike": {
        "data": {"train": [{"path": path, "loss_weight": 2.0} for path in ("demo:train", "demo:validation")]}
    },
}


def with_gap(how: dict[str, Any], gap: float | None = 0.5, **held_out: Any) -> Any:
    data = {"train": "demo:train"} | (held_out or {"validation": "demo:test"}) | how.get("data", {})
    training = {"overfitting": {"max_gap": gap}} | how.get("training", {})
    return config_from({"model": {"base": "demo"}} | how | {"data": data, "training": training})


@pytest.mark.parametrize("case", UNLIKE)
def test_a_gap_between_losses_that_are_not_of_the_same_is_refused(case: str) -> None:
    how, said = UNLIKE[case]
    with pytest.raises(PlanError, match=said) as caught:
        check_gap(with_gap(how))
    assert caught.value.keys[0] == "training.overfitting.max_gap"
    check_gap(with_gap(how, gap=None))


@pytest.mark.parametrize("case", LIKE)
def test_a_gap_between_losses_of_the_same_is_none_of_that(case: str) -> None:
    check_gap(with_gap(LIKE[case]))


@pytest.mark.parametrize("case", ["replayed rows", "weights of sources", "proportions"])
def test_rows_held_out_count_as_in_training_and_so_have_a_gap(case: str) -> None:
    check_gap(with_gap(UNLIKE[case][0], validation_fraction=0.1))
