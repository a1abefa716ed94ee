"""What a run came to in words: time and dollars over all attempts, and what is better or worse than before."""

import json
from typing import Any

import pytest

from raytune.evaluation.compare import comparisons_in
from raytune.launch.state.outcome import Change, Spent, changes, in_words, outcome_record, spent
from raytune.metrics.history import History
from raytune.metrics.points import Point
from raytune.plan.run_plan import CostPlan

NOTHING = History(())
SCORE = {"words": "exact match", "base": 0.25, "tuned": 0.5, "gain_low": 0.1, "gain_high": 0.4}


def event(kind: str, attempt: int, time: float) -> dict[str, Any]:
    return {"event": kind, "attempt": attempt, "time": time}


def cost(**changes: Any) -> CostPlan:
    fields: dict[str, Any] = {"instance": "x", "num_nodes": 2, "is_spot": False, "hours": 2.0, "usd": 20.0, "spot_usd": 5.0}
    fields |= {"save_s": 1, "between_interruptions_s": 1, "save_every_s": 1, "lost_s_per_interruption": 1}
    return CostPlan(**{**fields, "lost_usd_per_interruption": 1, "price_date": "2026-11-09", **changes})


def test_time_is_that_of_all_attempts_without_what_lies_between_them() -> None:
    events = [
        event("attempt_started", 1, 100),
        event("training_started", 1, 110),
        event("checkpoint_saved", 1, 150),
        event("attempt_failed", 1, 160),
        event("attempt_started", 2, 1000),
        event("training_started", 2, 1010),
        event("run_finished", 2, 1100),
    ]
    points = [Point(step=1, time=155.0, attempt=1, values={}), Point(step=2, time=1090.0, attempt=2, values={})]
    took = spent(events, History(tuple(points)), cost())
    assert (took.attempts, took.total_s, took.training_s) == (2, 60 + 100, 45 + 80)
    assert took.usd == pytest.approx(10 * 160 / 3600), "at what the plan's hours cost"


def test_an_attempt_whose_driver_died_lasts_to_its_last_sign_of_life() -> None:
    events = [event("attempt_started", 1, 100), event("training_started", 1, 110)]
    took = spent(events, History((Point(step=3, time=140.0, attempt=1, values={}),)), None)
    assert (took.total_s, took.training_s, took.usd) == (40, 30, None)
    assert spent(events[:1], NOTHING, None) == Spent(attempts=1, total_s=0, training_s=0, usd=None)
    assert spent([], NOTHING, None) == Spent(attempts=0, total_s=0, training_s=0, usd=None)


@pytest.mark.parametrize(
    ("plan", "usd"),
    [(cost(is_spot=True), 2.5), (cost(is_spot=True, spot_usd=None), 10.0), (cost(usd=0.0), None), (None, None)],
    ids=["spot", "spot without a price", "not rented", "no plan"],
)
def test_dollars_are_by_the_price_that_the_plan_counts_with(plan: CostPlan | None, usd: float | None) -> None:
    events = [event("attempt_started", 1, 0), event("run_finished", 1, 3600)]
    assert spent(events, NOTHING, plan).usd == usd


def test_changes_are_scores_then_losses_of_all_sets_and_of_each() -> None:
    base = {"validation/loss": 2.0, "validation/perplexity": 7.4, "validation/chat/loss": 3.0, "validation/a/b/loss": 1.0}
    tuned = {"validation/loss": 1.0, "validation/perplexity": 2.7, "validation/chat/loss": 0.5, "validation/a/b/loss": 1.5}
    history = History((Point(step=0, time=0.0, attempt=1, values=base),))
    record = {"comparisons": {"generation": {"num_rows": 4, "scores": {"exact_match": SCORE}}}}
    record["comparisons"]["mmlu"] = {"num_rows": 9, "scores": {"accuracy": SCORE | {"words": "accuracy"}}}
    found = changes(history, tuned | {"train/loss": 0.1}, comparisons_in(record))
    assert [(change.name, change.words) for change in found] == [
        ("exact_match", "exact match"),
        ("mmlu/accuracy", "mmlu: accuracy"),
        ("validation/loss", "validation loss"),
        ("validation/perplexity", "perplexity"),
        ("validation/chat/loss", "loss on chat"),
        ("validation/a/b/loss", "loss on a/b"),
    ]
    assert [change.is_better for change in found] == [True, True, True, True, True, False]
    assert [change.percent for change in found][:3] == [100.0, 100.0, -50.0]
    words = in_words(Spent(attempts=1, total_s=90, training_s=60, usd=1.234), found, 12)
    assert words == [
        "Trained for 1m00s (12 steps); 1m30s with start and end, about $1.23 by list prices.",
        "Better than the base: exact match from 25.0% to 50.0% (+25.0 points), mmlu: accuracy from 25.0% to 50.0% (+25.0 "
        "points), validation loss from 2.0000 to 1.0000 (50 % lower), loss on chat from 3.0000 to 0.5000 (83.33 % lower).",
        "Worse than the base: loss on a/b from 1.0000 to 1.5000 (50 % higher).",
    ]


def test_without_a_measurement_before_the_first_step_nothing_is_compared() -> None:
    assert changes(NOTHING, {"validation/loss": 1.0}, {}) == ()


def test_a_gain_that_may_be_chance_says_so_and_nothing_is_divided_by_nothing() -> None:
    change = Change(name="x", words="x", base=0.0, tuned=0.1, kind="score", is_share=True, interval=(-0.1, 0.3))
    assert change.sentence == "x from 0.0% to 10.0% (+10.0 points, which may be the choice of rows)"
    assert change.percent is None
    same = Change(name="validation/loss", words="loss", base=1.0, tuned=1.0, kind="loss")
    assert not same.is_better
    assert not same.is_worse


def test_the_record_is_json_whatever_the_numbers() -> None:
    bad = Change(name="validation/loss", words="loss", base=1.0, tuned=float("nan"), kind="loss")
    record = outcome_record(Spent(attempts=1, total_s=1, training_s=1, usd=None), [bad], 1)
    assert json.loads(json.dumps(record, allow_nan=False))["changes"][0]["tuned"] == "NaN"


def test_results_of_earlier_runs_have_one_comparison() -> None:
    one = {"num_rows": 4, "scores": {"exact_match": SCORE}}
    assert comparisons_in({"comparison": one}).keys() == {"generation"}
    assert comparisons_in({"comparison": None}) == comparisons_in({}) == {}
    assert comparisons_in({"comparison": one, "comparisons": {"a": one}}).keys() == {"a"}
