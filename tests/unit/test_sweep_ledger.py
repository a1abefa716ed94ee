"""What a sweep has decided survives its process, in the order in which it was decided."""

import json
import math
from pathlib import Path

import pytest

from raytune.sweeps.board import Board
from raytune.sweeps.halving import Halving, RungDecision, Verdict
from raytune.sweeps.ledger import Decided, Ended, Ledger, end_of, read_ledger
from raytune.sweeps.trial import Trial


def decided(trial: str, value: float, verdict: Verdict = Verdict.GO_ON, rung: int | None = 0) -> Decided:
    return Decided(trial=trial, step=10, amount=1.0, value=value, decision=RungDecision(verdict, rung, 0.5))


def test_a_second_command_knows_all_that_the_first_decided(tmp_path: Path) -> None:
    first = Ledger(str(tmp_path / "ledger.jsonl"), {})
    first.assign(Trial(number=0, values={"adapter.rank": 8}))
    first.assign(Trial(number=1, values={"adapter.rank": 4}))
    first.decide(decided("trial-000", 0.25))
    first.decide(decided("trial-001", 0.75, Verdict.STOP))
    first.end("trial-001", Ended(state="stopped", cause="after step 10"))
    # The process is killed here: nothing is closed.
    second = Ledger(str(tmp_path / "ledger.jsonl"), {})
    assert second.command == 2
    assert second.known.trials == first.known.trials
    assert second.known.decisions == first.known.decisions
    assert second.known.ends == {"trial-001": Ended(state="stopped", cause="after step 10")}
    assert dict(second.known.standings.at(0)) == {"trial-000": 0.25, "trial-001": 0.75}


def test_a_torn_last_line_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(str(path), {}).assign(Trial(number=0, values={}))
    with path.open("a") as file:
        file.write('{"event": "trial_ended", "tri')
    known = Ledger(str(path), {}).known
    assert list(known.trials) == ["trial-000"]
    assert known.ends == {}


def test_resumed_standings_judge_as_the_unbroken_ones_would(tmp_path: Path) -> None:
    rule = Halving(rungs=(1.0, 3.0), reduction_factor=3, mode="min")
    arrivals = [("a", 0.9), ("b", 0.5), ("c", 0.7), ("d", 0.1), ("e", 0.6), ("f", 0.2)]
    unbroken = Ledger(str(tmp_path / "unbroken.jsonl"), {})
    standings = unbroken.known.standings
    expected = [rule.decide(standings, name, 1.0, value) for name, value in arrivals]
    broken = []
    for name, value in arrivals:  # a new process for each
        ledger = Ledger(str(tmp_path / "broken.jsonl"), {})
        decision = rule.decide(ledger.known.standings, name, 1.0, value)
        ledger.decide(Decided(trial=name, step=1, amount=1.0, value=value, decision=decision))
        broken.append(decision)
    assert broken == expected


def test_values_that_are_not_finite_are_kept_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(str(path), {}).decide(decided("trial-000", math.nan, Verdict.FAIL, rung=None))
    (entry,) = read_ledger(str(path)).decisions
    assert math.isnan(entry.value)
    assert all(json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines())


def test_the_ledger_keeps_how_the_first_command_compared(tmp_path: Path) -> None:
    path = str(tmp_path / "ledger.jsonl")
    Ledger(path, {"rungs": [1.0, 3.0]})
    second = Ledger(path, {"rungs": [2.0]})
    assert second.known.comparison == {"rungs": [1.0, 3.0]}


def test_only_a_final_end_is_an_end(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "ledger.jsonl"), {})
    for number in range(3):
        ledger.assign(Trial(number=number, values={}))
    ledger.end("trial-000", Ended(state="failed", cause="its node was lost", is_final=False))
    ledger.end("trial-001", Ended(state="failed", cause="the loss is nan"))
    assert [trial.name for trial in ledger.known.unended] == ["trial-000", "trial-002"]


def test_a_trial_that_is_assigned_again_has_not_ended(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "ledger.jsonl"), {})
    trial = Trial(number=0, values={})
    ledger.assign(trial)
    ledger.end(trial.name, Ended(state="failed", cause="its node was lost", is_final=False))
    ledger.assign(trial)
    assert ledger.known.ends == {}
    assert read_ledger(str(tmp_path / "ledger.jsonl")).ends == {}


@pytest.mark.parametrize(
    ("entry", "end"),
    [
        (decided("t", math.nan, Verdict.FAIL, rung=None), Ended(state="failed", cause="validation/loss is nan after step 10")),
        (decided("t", 0.75, Verdict.STOP), Ended(state="stopped", cause="after step 10: 0.75 against a cut of 0.5")),
    ],
)
def test_the_end_of_a_trial_says_why(entry: Decided, end: Ended) -> None:
    assert end_of(entry, "validation/loss") == end


@pytest.mark.parametrize(("mode", "best"), [("min", 0.2), ("max", 0.9)])
def test_the_board_remembers_the_best_finite_value(mode: str, best: float) -> None:
    board = Board(mode)  # pyright: ignore[reportArgumentType]
    for step, value in enumerate([0.5, 0.2, math.nan, 0.9, math.inf, 0.4]):
        board.heard("trial-000", step, value)
    assert (board.of("trial-000").best, board.of("trial-000").newest) == (best, 0.4)
