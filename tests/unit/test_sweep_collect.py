"""What a sweep cost is told from what its trials left, whatever number of workers they had."""

from pathlib import Path

import pytest

from raytune.launch.state.record import write_plan
from raytune.metrics.events import EventLog
from raytune.metrics.writer import MetricsWriter
from raytune.run_folder import SweepFolder
from raytune.storage import write_json
from raytune.sweeps.collect import collect
from raytune.sweeps.cost import ExpectedCost
from raytune.sweeps.halving import RungDecision, Verdict
from raytune.sweeps.ledger import Decided, Ended, Ledger
from raytune.sweeps.sweep_plan import SweepPlan
from raytune.sweeps.trial import Trial
from raytune.sweeps.words import state_text, summary
from tests.tiny import tiny_plan

PLAN = SweepPlan(
    name="s",
    num_trials=3,
    metric="validation/loss",
    mode="min",
    stopping="asha",
    unit="steps",
    grace=10.0,
    reduction_factor=3.0,
    budget=4.0,
    rungs=(1.0, 3.0),
    slots=1,
    workers=2,
    cost=ExpectedCost(full=12.0, expected=6.0),
)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def leave_run(folder: SweepFolder, name: str, num_steps: int, *, workers: int, start_up_s: float, step_s: float) -> None:
    """What a trial of 40 steps leaves that trained some of them: an event, a line per ten steps."""
    run, clock = folder.trial(name), Clock()
    plan = tiny_plan(
        name=name,
        storage=folder.trials,
        optimization={"num_steps": 40},
        batch={"workers": workers, "micro_batch_size": 1, "accumulation": 1},
    )
    write_plan(run, plan)
    EventLog(run.events, attempt=1, clock=clock).write("attempt_started")
    clock.now += start_up_s
    writer = MetricsWriter(run.metrics, attempt=1, resumed_step=0, clock=clock)
    writer.write(0, {"validation/loss": 9.0})
    for step in range(10, num_steps + 1, 10):
        clock.now += 10 * step_s
        writer.write(step, {"train/loss": 1.0, "validation/loss": 5.0 - step / 10})
    writer.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_spent_and_full_worker_seconds_are_those_of_all_workers(workers: int, tmp_path: Path) -> None:
    folder = SweepFolder(str(tmp_path), "s")
    ledger = Ledger(folder.ledger, {})
    for number in range(3):
        ledger.assign(Trial(number=number, values={"training.seed": number}))
    leave_run(folder, "trial-000", 40, workers=workers, start_up_s=20, step_s=2)
    leave_run(folder, "trial-001", 10, workers=workers, start_up_s=20, step_s=2)
    ledger.decide(
        Decided(trial="trial-001", step=10, amount=1.0, value=4.0, decision=RungDecision(Verdict.STOP, rung=0, cut=3.0))
    )
    ledger.end("trial-000", Ended(state="finished"))
    ledger.end("trial-001", Ended(state="stopped", cause="after step 10: 4 against a cut of 3"))
    result = collect(folder, PLAN, ["training.seed"])
    finished, stopped, waiting = result.trials
    assert [trial.state for trial in result.trials] == ["finished", "stopped", "waiting"]
    assert (finished.worker_s, stopped.worker_s, waiting.worker_s) == (workers * 100.0, workers * 40.0, 0.0)
    assert result.spent_worker_s == workers * 140.0
    assert result.full_worker_s == workers * 300.0, "each trial would have taken 100 seconds, also the one that never began"
    assert (finished.value, stopped.value, stopped.rung, waiting.value) == (1.0, 4.0, 0, None)
    assert result.rungs == (10, 30)


def test_a_trial_that_ended_by_its_own_rule_is_finished_and_ranked_by_its_best_value(tmp_path: Path) -> None:
    folder = SweepFolder(str(tmp_path), "s")
    ledger = Ledger(folder.ledger, {})
    for number, steps in ((0, 20), (1, 40)):
        ledger.assign(Trial(number=number, values={"training.seed": number}))
        leave_run(folder, f"trial-00{number}", steps, workers=1, start_up_s=20, step_s=2)
        ledger.end(f"trial-00{number}", Ended(state="finished"))
    stopped = {"step": 20, "rule": "early_stopping", "reason": "validation/loss was not better"}
    write_json(folder.trial("trial-000").result, {"stopped": stopped})
    result = collect(folder, PLAN, ["training.seed"])
    whole, early = result.trials
    assert (early.trial.name, early.state, early.value, early.step) == ("trial-000", "finished", 3.0, 20)
    assert (early.ended_early, whole.ended_early) == (True, False)
    assert (early.cause, whole.cause) == ("after step 20: validation/loss was not better", None)
    assert (state_text(early), state_text(whole)) == ("finished early", "finished")
    assert result.best is whole
    assert result.is_complete
    assert any("2 finished (1 of them early, by a rule of its own)" in sentence for sentence in summary(result))
