"""What every scheduler does before it decides: a trial that is dead fails, and what will only fail again is not tried again."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from raytune.config.load import config_from
from raytune.sweeps.board import Board
from raytune.sweeps.ledger import Ended, Ledger, read_ledger
from raytune.sweeps.schedule import AMOUNT, FAILURE, MAY_PASS, STEP, make_scheduler
from raytune.sweeps.sweep_plan import SweepPlan, plan_sweep
from tests.tiny import tiny_plan

METRIC = "validation/loss"


def sweep_plan(method: str) -> SweepPlan:
    values = {"sweep": {"space": {"training.seed": [1, 2]}, "stopping": {"method": method}}, "data": {"validation_fraction": 0.1}}
    section = config_from(values).sweep
    assert section is not None
    return plan_sweep(section, "s", 2, [tiny_plan(optimization={"num_steps": 81})], slots=2)


def hear(tmp_path: Path, method: str, *results: dict[str, Any]) -> tuple[str, Ledger, Any]:
    """What a scheduler answers to the last of some results of one trial."""
    ledger = Ledger(str(tmp_path / "ledger.jsonl"), {})
    scheduler = make_scheduler(sweep_plan(method), ledger, Board("min"))
    trial: Any = SimpleNamespace(trial_id="id", config={"trial": "trial-000"}, max_failures=3)
    action = ""
    for result in results:
        action = scheduler.on_trial_result(None, trial, result)  # pyright: ignore[reportArgumentType]
    return action, ledger, trial


@pytest.mark.parametrize("method", ["asha", "hyperband", "median", "none"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_trial_whose_metric_is_not_finite_is_stopped_as_failed(tmp_path: Path, method: str, value: float) -> None:
    action, ledger, _ = hear(tmp_path, method, {METRIC: value, STEP: 3, AMOUNT: 1.0})
    assert action == TrialScheduler.STOP
    assert ledger.known.ends["trial-000"] == Ended(state="failed", cause=f"validation/loss is {value} after step 3")
    assert read_ledger(str(tmp_path / "ledger.jsonl")).ends == ledger.known.ends


@pytest.mark.parametrize("may_pass", [True, False])
def test_a_failure_is_noted_and_not_tried_again_by_tune(tmp_path: Path, may_pass: bool) -> None:
    failure = {FAILURE: "the loss is nan", MAY_PASS: may_pass, METRIC: math.nan, STEP: 3, AMOUNT: 0.0}
    _, ledger, trial = hear(tmp_path, "asha", failure)
    assert ledger.known.ends["trial-000"] == Ended(state="failed", cause="the loss is nan", is_final=not may_pass)
    assert trial.max_failures == 0


def test_what_an_earlier_command_has_decided_is_not_judged_again(tmp_path: Path) -> None:
    result = {METRIC: 1.0, STEP: 3, AMOUNT: 1.0}
    _, first, _ = hear(tmp_path, "none", {**result, METRIC: math.nan})
    action, second, _ = hear(tmp_path, "asha", result)
    assert action == TrialScheduler.STOP
    assert second.known.decisions == first.known.decisions
