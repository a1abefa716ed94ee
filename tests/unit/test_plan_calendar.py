"""Periods in epochs become steps: after the first step at which so many passes over the rows are made, without drift."""

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune.config.load import ConfigError, config_from
from raytune.errors import UserError
from raytune.plan.calendar import Epoch, divides, is_due
from raytune.training.steps.timetable import Timetable
from tests.tiny import PATIENT
from tests.unit.plan_cases import data, planned

VALIDATED: dict[str, Any] = {"data": {"train": "a.jsonl", "validation": "b.jsonl"}}


@PATIENT
@given(st.integers(1, 500), st.integers(1, 64), st.integers(1, 40), st.integers(1, 300))
def test_an_occasion_falls_on_the_first_step_behind_its_share_of_the_rows(
    rows: int, per_step: int, tenths: int, step: int
) -> None:
    """By exact fractions: rows trained by a step, over rows between two occasions."""
    period = Epoch(rows, per_step, step).steps_of(tenths / 10)
    between = Fraction(tenths, 10) * rows
    assert is_due(step, period) == ((step * per_step) // between > ((step - 1) * per_step) // between)


@given(st.integers(1, 60), st.integers(1, 300))
def test_a_whole_period_is_a_multiple(every: int, step: int) -> None:
    assert is_due(step, every) == (step % every == 0)


@pytest.mark.parametrize(
    ("part", "whole", "answer"),
    [(4, 12, True), (12, 4, False), (12.5, 25, True), (8 + 1 / 3, 25, True), (0.5, 1, True), (4, 6, False)],
)
def test_periods_that_divide_each_other(part: float, whole: float, answer: bool) -> None:
    assert divides(part, whole) is answer


def due(plan: Any) -> list[int]:
    calendar = Timetable.of(plan)
    return [step for step in range(1, plan.optimization.num_steps + 1) if calendar.evaluates_after(step)]


def test_an_epoch_is_a_pass_over_the_packed_rows_and_the_last_may_be_a_part_of_one() -> None:
    facts = data(100, validation=("a",))
    training = {"num_train_epochs": 2.5, "global_batch_size": 8}
    plan = planned(facts=facts, training=training, evaluation={"every_epochs": 1}, **VALIDATED)
    assert plan.evaluation.every_steps == 12.5
    assert due(plan) == [13, 25, 32], "100 rows are trained within step 13, 200 with step 25, 250 with the last"
    assert plan.checkpoint.every_steps == plan.evaluation.every_steps
    (reason,) = [reason for reason in plan.reasons if "every_epochs" in reason]
    assert reason == (
        "evaluation.every_steps is 12.5: evaluation.every_epochs is 1, and an epoch is 100 rows, 8 of them per step; that is "
        "after step 13, 25."
    )
    half = planned(facts=facts, training=training, evaluation={"every_epochs": 0.5}, **VALIDATED)
    assert due(half) == [7, 13, 19, 25, 32]
    many = planned(facts=facts, training={"max_steps": 5, "global_batch_size": 8}, evaluation={"every_epochs": 3}, **VALIDATED)
    assert due(many) == [5]
    assert any("only after the last one" in reason for reason in many.reasons)
    few = planned(facts=facts, training={"max_steps": 5, "global_batch_size": 8}, evaluation={"every_epochs": 0.05}, **VALIDATED)
    assert due(few) == [1, 2, 3, 4, 5]


def test_saves_by_epochs_have_the_metric_that_ranks_them() -> None:
    facts = data(100, validation=("a",))
    training = {"num_train_epochs": 3, "global_batch_size": 8}

    def calendar(**sections: Any) -> tuple[set[int], set[int]]:
        plan = planned(facts=facts, training=training, **VALIDATED, **sections)
        table, steps = Timetable.of(plan), range(1, plan.optimization.num_steps + 1)
        return {s for s in steps if table.saves_after(s)}, {s for s in steps if table.evaluates_after(s)}

    saved, measured = calendar(evaluation={"every_steps": 10}, checkpoint={"every_epochs": 1})
    assert saved == {13, 25, 38} <= measured
    saved, measured = calendar(evaluation={"every_epochs": 0.5}, checkpoint={"every_epochs": 1})
    assert saved == {13, 25, 38} < measured == {7, 13, 19, 25, 32, 38}
    saved, measured = calendar(evaluation={"every_epochs": 1}, checkpoint={"every_epochs": 0.25})
    assert measured == {13, 25, 38} < saved


@pytest.mark.parametrize("section", ["evaluation", "checkpoint"])
def test_steps_and_epochs_at_once_are_refused_at_their_place(section: str) -> None:
    with pytest.raises(ConfigError, match=rf"{section}.every_steps .*but {section}.every_epochs \(0.5\) says so in epochs"):
        config_from({**VALIDATED, section: {"every_steps": 10, "every_epochs": 0.5}})
    config_from({**VALIDATED, section: {"every_epochs": 0.5}})
    for wrong in (0, -1, "often"):
        with pytest.raises(ConfigError, match="every_epochs"):
            config_from({**VALIDATED, section: {"every_epochs": wrong}})


# --- rules that end a run


def test_rules_are_part_of_the_plan_and_change_no_step() -> None:
    facts = data(1000, validation=("a",))
    training: dict[str, Any] = {"max_steps": 100, "global_batch_size": 8}
    rules = {"early_stopping": {"patience": 3, "min_delta": 0.01}, "overfitting": {"policy": "stop"}}
    without, ruled = (planned(facts=facts, training=training | more, **VALIDATED) for more in ({}, rules))
    assert ruled.stopping.model_dump(exclude_unset=True) == rules
    assert ruled.optimization == without.optimization
    assert not without.stopping.are_given
    assert any("Schedule, time and money are those of all steps" in note for note in ruled.notes)
    assert ruled.model_copy(update={"stopping": without.stopping, "notes": without.notes}) == without


@pytest.mark.parametrize(
    ("rule", "facts", "said"),
    [
        ({"early_stopping": {"patience": 1, "metric": "train/loss"}}, ("a",), "early_stopping.metric is 'train/loss'"),
        ({"early_stopping": {"patience": 1, "metric": "validation/a/loss"}}, ("a",), "one of: validation/loss"),
        ({"early_stopping": {"patience": 1}}, (), "training.early_stopping looks at evaluations, but nothing is evaluated"),
        ({"overfitting": {}}, (), "training.overfitting looks at evaluations, but nothing is evaluated"),
    ],
)
def test_a_rule_that_no_evaluation_feeds_is_refused(rule: dict[str, Any], facts: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        planned(facts=data(100, validation=facts), training=rule, **VALIDATED)
    accepted = {"early_stopping": {"patience": 1, "metric": "validation/b/loss"}}
    planned(facts=data(100, validation=("a", "b")), training=accepted, **VALIDATED)


def test_a_patience_longer_than_the_run_is_noted() -> None:
    facts = data(1000, validation=("a",))
    training: dict[str, Any] = {"max_steps": 40, "early_stopping": {"patience": 4}}
    plan = planned(facts=facts, training=training, evaluation={"every_steps": 10}, **VALIDATED)
    assert any("early_stopping cannot come to anything" in note for note in plan.notes)
    plan = planned(facts=facts, training=training, evaluation={"every_steps": 5}, **VALIDATED)
    assert not any("cannot come to anything" in note for note in plan.notes)


def test_a_rule_that_may_end_a_run_says_what_of_it_counts_on_the_last_step() -> None:
    def notes(**sections: Any) -> str:
        training: dict[str, Any] = {"max_steps": 40} | sections.pop("training", {})
        return " ".join(planned(facts=data(1000, validation=("a",)), training=training, **VALIDATED, **sections).notes)

    ends: dict[str, Any] = {"training": {"early_stopping": {"patience": 2}}}
    warns: dict[str, Any] = {"training": {"overfitting": {"policy": "warn"}}}
    adalora: dict[str, Any] = {"adapter": {"method": "adalora", "rank": 4}}
    assert "ends before step 20, or whose best checkpoint is from before it, keeps 6 ranks in each layer, and not 4" in notes(
        **adalora, **ends
    )
    phases: dict[str, Any] = {"strategy": {"unfreeze": [{"last_layers": 1}, {"from_step": 30, "last_layers": "all"}]}}
    full: dict[str, Any] = {"adapter": {"method": "full"}}
    assert "the last phase of strategy.unfreeze begins after step 30 of 40" in notes(**full, **phases, **ends)
    for run in (adalora, full | phases):
        assert "ends" not in notes(**run, **warns)
        assert "earlier phase" not in notes(**run, **warns)
    assert "adalora" not in notes(**full, **ends)
