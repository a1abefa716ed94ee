"""What a sweep came to: order, files, words, and which keys are said to matter."""

import csv
import io
import json
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from raytune.printable import plain_text
from raytune.sweeps.final_table import show_sweep_result
from raytune.sweeps.importance import Importance, importance
from raytune.sweeps.results import SweepResult, TrialResult, ranked
from raytune.sweeps.tables import result_table, short_keys, trials_csv, trials_jsonl
from raytune.sweeps.trial import Trial
from raytune.sweeps.words import summary, value_text, worker_time
from tests.sweep_cases import cases, halved_sweep, odd_values, sweep_result, trial_result

CASES = list(cases())


def names(results: list[TrialResult]) -> list[int]:
    return [result.trial.number for result in results]


# --- Order -------------------------------------------------------------------------------------------------------------------


def test_trials_are_named_by_number() -> None:
    assert [Trial(number=number, values={}).name for number in (0, 7, 1234)] == ["trial-000", "trial-007", "trial-1234"]


@pytest.mark.parametrize(("mode", "expected"), [("min", [2, 0, 3, 1, 4, 6, 5]), ("max", [1, 0, 3, 2, 4, 6, 5])])
def test_the_best_come_first_equal_ones_by_number_and_failed_ones_last(mode: Any, expected: list[int]) -> None:
    trials = [
        trial_result(0, {}, ((10, 2.0),), state="stopped"),
        trial_result(1, {}, ((10, 3.0),)),
        trial_result(2, {}, ((10, 1.0),), state="running"),
        trial_result(3, {}, ((10, 2.0),)),
        trial_result(4, {}, state="waiting"),
        trial_result(5, {}, ((10, 0.0),), state="failed"),
        trial_result(6, {}, ((10, math.nan),), state="stopped"),
    ]
    for seed in range(5):
        assert names(ranked(random.Random(seed).sample(trials, len(trials)), mode)) == expected


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_value_that_is_not_finite_never_wins(value: float, mode: Any) -> None:
    odd = [trial_result(number, {}, ((10, 1.0),)) for number in range(2)]
    odd[0] = TrialResult.from_json(odd[0].to_json() | {"value": {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")})
    result = sweep_result(odd, mode=mode)
    assert result.best is not None
    assert result.best.trial.number == 1
    assert names(list(result.trials)) == [1, 0]


def test_there_is_no_winner_without_a_value() -> None:
    for name in ("none", "all failed", "never measured", "all NaN"):
        assert cases()[name].best is None


# --- Files -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_result_survives_strict_json(name: str) -> None:
    result = cases()[name]
    text = json.dumps(result.to_json(), allow_nan=False)
    again = SweepResult.from_json(json.loads(text, parse_constant=pytest.fail))
    assert json.dumps(again.to_json()) == text
    if not any(math.isnan(value) for trial in result.trials for _, value in trial.curve):
        assert again == result


def test_saved_is_the_share_of_the_full_grid() -> None:
    assert sweep_result([], spent_worker_s=30.0, full_worker_s=120.0).saved_share == 0.75
    assert sweep_result([], spent_worker_s=150.0, full_worker_s=120.0).saved_share == -0.25
    assert sweep_result([], spent_worker_s=0.0, full_worker_s=0.0).saved_share == 0.0


@pytest.mark.parametrize("name", CASES)
def test_the_csv_has_a_line_per_trial_and_a_column_per_key(name: str) -> None:
    result = cases()[name]
    rows = list(csv.DictReader(io.StringIO(trials_csv(result))))
    assert [row["trial"] for row in rows] == [trial.trial.name for trial in result.trials]
    for row, trial in zip(rows, result.trials):
        assert set(result.keys) <= row.keys()
        for key in result.keys:
            value = trial.trial.values.get(key, "")
            assert row[key] == (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        assert row["cause"] == (trial.cause or "")
        assert float(row["worker_s"]) == pytest.approx(trial.worker_s)


def test_only_trials_that_may_win_have_a_rank() -> None:
    rows = list(csv.DictReader(io.StringIO(trials_csv(odd_values()))))
    assert [(row["trial"], row["rank"], row["value"], row["rungs_reached"]) for row in rows] == [
        ("trial-000", "1", "0.75", "2"),
        ("trial-001", "2", "0.1", "1"),
        ("trial-004", "", "", "0"),
        ("trial-002", "", "", "2"),
        ("trial-003", "", "0.7", "2"),
    ]


def test_the_lines_leave_out_keys_that_are_not_set_and_tell_null_from_them() -> None:
    records = {record["trial"]: record for record in map(json.loads, trials_jsonl(odd_values()).splitlines())}
    assert records["trial-000"]["training.max_grad_norm"] is None
    assert "training.max_grad_norm" not in records["trial-001"]
    assert records["trial-000"]["adapter.target_modules"] == ["q_proj", "v_proj"]


# --- Words -------------------------------------------------------------------------------------------------------------------


def test_the_summary_says_who_won_what_became_of_the_others_and_what_it_cost() -> None:
    trials = [
        trial_result(0, {"adapter.rank": 8, "training.learning_rate": 0.0030001}, ((10, 2.0), (60, 0.5))),
        trial_result(1, {}, ((10, 3.0),), state="stopped"),
        trial_result(2, {}, ((10, 3.5),), state="stopped"),
        trial_result(3, {}, ((10, 1.5), (30, 1.0)), state="stopped"),
        trial_result(4, {}, state="failed"),
    ]
    assert summary(sweep_result(trials, spent_worker_s=100.0, full_worker_s=400.0, wall_s=65.0)) == [
        "Best is trial-000: validation/loss 0.5 (lowest), trained for 60 of 60 steps, "
        "with adapter.rank 8, training.learning_rate 0.003.",
        "5 trials: 1 finished, 3 stopped early (2 at rung 1, step 10; 1 at rung 2, step 30), 1 failed.",
        "Spent 100 CPU-worker seconds in 1m05s; "
        "training every trial to the end would take about 400 CPU-worker seconds: 75% saved.",
    ]


def test_nothing_is_said_to_be_saved_before_the_sweep_has_ended_or_when_no_trial_came_to_the_end() -> None:
    for name in ("all failed", "never measured", "odd values"):
        assert "saved" not in summary(cases()[name])[2]
    spent_more = sweep_result([trial_result(0, {}, ((60, 1.0),))], spent_worker_s=150.0, full_worker_s=120.0)
    assert summary(spent_more)[2].endswith("25% more than that was spent.")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0030001, "0.003"), (3e-7, "3e-07"), (16, "16"), (True, "true"), (None, "null"), ("lora", "lora"), (["a", 1], "[a, 1]")],
)
def test_values_read_as_in_yaml(value: object, text: str) -> None:
    assert value_text(value) == text


def test_messages_lose_what_only_a_terminal_understands() -> None:
    ray = '\x1b[36mray::train()\x1b[39m (pid=7)\r\n  File "\udcff.py"\x00\n\tboom\x1b[0m\n'
    assert plain_text(ray) == 'ray::train() (pid=7)\n  File "?.py"\n\tboom'
    assert plain_text(None) == ""
    failed = sweep_result([trial_result(0, {}, state="failed", cause=ray)])
    assert "trial-000 failed: ray::train() (pid=7)" in shown(failed, 80)
    assert json.loads(trials_jsonl(failed))["cause"] == plain_text(ray)


def test_work_is_told_in_the_unit_of_its_device() -> None:
    assert worker_time(845.4, "cpu") == "845 CPU-worker seconds"
    assert worker_time(44_280, "cuda") == "12.3 GPU hours"


def test_keys_are_short_where_that_is_unambiguous() -> None:
    assert short_keys(["adapter.rank", "training.seed", "data.seed"]) == ["rank", "training.seed", "data.seed"]


@pytest.mark.parametrize("name", CASES)
def test_every_row_of_the_table_has_a_cell_per_heading(name: str) -> None:
    headings, rows = result_table(cases()[name])
    assert all(len(row) == len(headings) for row in rows)


def shown(result: SweepResult, width: int, *, is_terminal: bool = True) -> list[str]:
    file = io.StringIO()
    show_sweep_result(result, Console(file=file, width=width, force_terminal=is_terminal, color_system=None))
    return [line.rstrip() for line in file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [20, 80, 300])
@pytest.mark.parametrize("name", CASES)
def test_a_terminal_of_any_width_shows_the_trials_in_lines_of_their_own(name: str, width: int) -> None:
    result = cases()[name]
    lines = shown(result, width)
    if width >= 80:
        for trial in result.trials[:30]:
            assert sum(trial.trial.name in line and "failed:" not in line and "Best" not in line for line in lines) == 1
    assert summary(result)[1] in " ".join(lines)


def test_what_does_not_fit_is_said_to_be_in_the_file() -> None:
    assert "170 more trials and 1 more key in /runs/quickstart-sweep/trials.csv" in shown(halved_sweep(200), 80)
    assert not any("more key" in line for line in shown(halved_sweep(16), 80, is_terminal=False))


def test_markup_in_values_is_text() -> None:
    result = sweep_result([trial_result(0, {"adapter.method": "[red]x[/red]"}, ((60, 1.0),))], keys=("adapter.method",))
    assert any("[red]x[/red]" in line for line in shown(result, 120))


# --- Importance --------------------------------------------------------------------------------------------------------------


def told(
    values: Callable[[random.Random], dict[str, Any]], value: Callable[[dict[str, Any]], float], num_trials: int = 64
) -> Importance:
    """Importance among trials of these values, each with this value at the first rung."""
    source = random.Random(0)
    points = [values(source) for _ in range(num_trials)]
    trials = [trial_result(number, point, ((10, value(point)),)) for number, point in enumerate(points)]
    return importance(trials, list(dict.fromkeys(key for point in points for key in point)), "min")


def shares(found: Importance) -> dict[str, float | None]:
    return {item.key: item.share for item in found.keys}


@pytest.mark.parametrize(
    "draw",
    [
        lambda source: 10 ** source.uniform(-4, -1),
        lambda source: source.uniform(-1, 1),
        lambda source: source.choice([4, 8, 16, 32]),
        lambda source: source.choice(["a", "b", "c"]),
        lambda source: source.choice([True, False]),
        lambda source: source.choice([None, 0.5, 1.0]),
    ],
    ids=["log", "linear", "choice", "text", "bool", "null"],
)
def test_the_only_relevant_key_is_near_one_and_an_irrelevant_one_near_zero(draw: Callable[[random.Random], Any]) -> None:
    def relevant(point: dict[str, Any]) -> float:
        value = point["relevant"]
        return {"a": 3.0, "b": 1.0, "c": 2.0, None: -1.0}[value] if value is None or isinstance(value, str) else float(value)

    found = told(lambda source: {"relevant": draw(source), "irrelevant": draw(source)}, relevant)
    assert [item.key for item in found.keys] == ["relevant", "irrelevant"]
    first, second = found.keys
    assert first.share is not None
    assert first.chance is not None
    assert second.share is not None
    assert second.chance is not None
    assert first.share > 0.93  # six bins of a monotone effect leave 1/36 of the variance within the bins
    assert second.share < 0.1
    assert first.share > first.chance
    assert (found.step, found.num_trials) == (10, 64)


def test_a_key_that_matters_in_the_middle_of_its_range_is_found() -> None:
    found = told(lambda source: {"rate": source.uniform(-3, 3)}, lambda point: point["rate"] ** 2, num_trials=200)
    assert (shares(found)["rate"] or 0) > 0.8


def test_pure_noise_passes_the_mark_of_chance_in_about_one_key_of_twenty() -> None:
    source = random.Random(1)
    keys = [f"key-{number}" for number in range(100)]
    trials = [trial_result(number, {key: source.random() for key in keys}, ((10, source.random()),)) for number in range(24)]
    found = importance(trials, keys, "min")
    passed = sum((item.share or 0) > (item.chance or 0) for item in found.keys)
    assert passed <= 12  # five of a hundred are expected; more than twelve has a probability below one in two hundred
    assert sum(item.share or 0 for item in found.keys) / len(keys) < 0.1


def test_one_outlier_does_not_outweigh_the_others() -> None:
    def value(point: dict[str, Any]) -> float:
        return 1e9 if point["order"] == 5 else point["rank"]

    order = iter(range(64))
    found = told(lambda source: {"rank": source.choice([1, 2, 3]), "order": next(order)}, value)
    assert (shares(found)["rank"] or 0) > 0.85


def test_not_being_set_is_a_group_of_its_own() -> None:
    found = told(
        lambda source: {"plus": source.choice([4.0, 16.0])} if source.random() < 0.5 else {},
        lambda point: 0.0 if "plus" in point else 1.0,
    )
    assert (shares(found)["plus"] or 0) > 0.95


def test_trials_are_compared_at_equal_steps_only() -> None:
    """With halving, the longer a trial was trained the lower its loss. Values of different steps would make `batch` look
    important, which only decides how the trials' numbers fall; at the first rung, all differ by the rate alone."""
    trials = []
    for number in range(24):
        rate, survives = number % 4, number % 3 == 0
        curve = ((10, 1.0 + rate), (30, 0.1 + rate / 100)) if survives else ((10, 1.0 + rate),)
        trials.append(
            trial_result(number, {"rate": rate, "survives": survives}, curve, state="finished" if survives else "stopped")
        )
    found = importance(trials, ["rate", "survives"], "min")
    assert found.step == 10
    assert found.num_trials == 24
    assert shares(found)["rate"] == pytest.approx(1)
    assert (shares(found)["survives"] or 0) < 0.05


def test_a_trial_that_diverged_counts_as_worst_from_then_on() -> None:
    trials = [trial_result(number, {"rate": "fine"}, ((10, 1.0 + number / 10), (30, 0.5 + number / 10))) for number in range(6)]
    trials += [trial_result(6 + number, {"rate": "hot"}, ((5, math.nan),), state="failed") for number in range(3)]
    for mode, sign in (("min", 1), ("max", -1)):
        turned = [
            TrialResult.from_json(
                trial.to_json() | {"curve": [[s, sign * v if math.isfinite(v) else "NaN"] for s, v in trial.curve]}
            )
            for trial in trials
        ]
        found = importance(turned, ["rate"], mode)  # type: ignore[arg-type]
        assert (found.step, found.num_trials) == (30, 9)
        assert (shares(found)["rate"] or 0) > 0.65


@pytest.mark.parametrize("name", ["one", "none", "all failed", "never measured"])
def test_too_few_trials_tell_nothing(name: str) -> None:
    found = importance(cases()[name].trials, ["adapter.rank"], "min")
    assert found == Importance(step=None, num_trials=0, keys=found.keys)
    assert shares(found) == {"adapter.rank": None}


def test_what_cannot_be_told_is_not_told() -> None:
    same = [trial_result(number, {"fixed": 1, "own": str(number)}, ((10, float(number)),)) for number in range(6)]
    assert shares(importance(same, ["fixed", "own"], "min")) == {"fixed": None, "own": None}
    equal = cases()["equal values"]
    assert set(shares(importance(equal.trials, ["adapter.rank"], "min")).values()) == {None}
