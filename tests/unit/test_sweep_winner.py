"""The winner of a sweep: that there is one, and how it compares when it is trained again."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from raytune.errors import ClusterError, TrainingError, UserError
from raytune.launch.state.diagnosis import Evidence
from raytune.launch.state.outcome import Spent
from raytune.launch.state.result import RunResult
from raytune.metrics.history import History
from raytune.metrics.points import Point
from raytune.run_folder import SweepFolder
from raytune.storage import write_json
from raytune.sweeps.ledger import Ended, Ledger
from raytune.sweeps.results import SweepResult
from raytune.sweeps.trial import Trial
from raytune.sweeps.winner import against_trial, read_sweep, require_winner
from tests.sweep_cases import sweep_result, trial_result
from tests.tiny import tiny_plan


def written(tmp_path: Path, result: SweepResult) -> SweepFolder:
    folder = SweepFolder(str(tmp_path), "s")
    write_json(folder.result, replace(result, name="s", folder=folder.path).to_json())
    return folder


def retrained(*curve: tuple[int, float]) -> RunResult:
    points = tuple(Point(step=step, time=0.0, attempt=1, values={"validation/loss": value}) for step, value in curve)
    plan, history = tiny_plan(), History(points)
    return RunResult(
        name="s-best",
        folder="x",
        model_path="x",
        plan=plan,
        metrics={},
        best_step=0,
        held_bytes=[],
        median_step_s=None,
        history=history,
        comparisons={},
        evidence=Evidence(plan=plan, history=history, spent=Spent(attempts=1, total_s=1.0, training_s=1.0, usd=None)),
    )


@pytest.mark.parametrize(("may_pass", "error"), [(True, ClusterError), (False, TrainingError)])
def test_a_sweep_without_a_usable_value_fails_and_says_whether_that_may_pass(
    tmp_path: Path, may_pass: bool, error: type[Exception]
) -> None:
    dead = replace(trial_result(0, {}, ((10, math.nan),), state="failed"), cause="its node was lost")
    folder = written(tmp_path, sweep_result([dead]))
    ledger = Ledger(folder.ledger, {})
    ledger.assign(Trial(number=0, values={}))
    ledger.end("trial-000", Ended(state="failed", cause="its node was lost", is_final=not may_pass))
    with pytest.raises(error, match=r"no winner.*\n  its node was lost\n"):
        require_winner(read_sweep(folder.path))


def test_a_sweep_with_a_usable_value_does_not_fail(tmp_path: Path) -> None:
    require_winner(read_sweep(written(tmp_path, sweep_result([trial_result(0, {}, ((10, 1.0),))])).path))


def test_a_retrained_winner_is_compared_after_the_last_step_that_both_measured(tmp_path: Path) -> None:
    folder = written(tmp_path, sweep_result([trial_result(0, {}, ((10, 1.0), (20, 0.5), (30, 0.7)))]))
    comparison = against_trial(folder.path, retrained((10, 1.0), (20, 0.6), (40, 0.1)))
    assert comparison is not None
    assert (comparison.step, comparison.trial_value, comparison.value) == (20, 0.5, 0.6)
    assert "0.6 against 0.5 of trial-000 after step 20: +0.1" in comparison.sentence
    assert against_trial(folder.path, retrained((7, 1.0))) is None


@pytest.mark.parametrize("content", [{}, [], {"name": "s", "trials": [{}]}])
def test_a_result_of_another_raytune_is_refused(tmp_path: Path, content: object) -> None:
    folder = SweepFolder(str(tmp_path), "s")
    write_json(folder.result, content)
    with pytest.raises(UserError, match=r"result\.json is not what raytune .* reads"):
        read_sweep(folder.path)
