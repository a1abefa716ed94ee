"""From the folders of a sweep to its result: what every trial came to, and what all of it cost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

from raytune.launch.state.record import read_plan
from raytune.metrics.events import read_events
from raytune.metrics.history import History
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import RunFolder, SweepFolder
from raytune.storage import exists, read_json
from raytune.sweeps.ledger import Ended, Known, read_ledger
from raytune.sweeps.results import SweepResult, TrialResult, ranked
from raytune.sweeps.sweep_plan import SweepPlan
from raytune.sweeps.trial import Trial
from raytune.training.steps.stopping import Findings


def collect(folder: SweepFolder, plan: SweepPlan, keys: Sequence[str]) -> SweepResult:
    """Read what a sweep has left so far.

    Args:
        keys: of the space.
    """
    known = read_ledger(folder.ledger)
    traces = [_Trace.read(folder, trial) for trial in sorted(known.trials.values(), key=lambda trial: trial.number)]
    plans = [trace.plan for trace in traces if trace.plan]
    results = [_trial_result(trace, known, plan) for trace in traces]
    return SweepResult(
        name=folder.name,
        folder=folder.path,
        metric=plan.metric,
        mode=plan.mode,
        device=plans[0].cluster.device if plans else "cpu",
        keys=tuple(keys),
        rungs=plan.rung_steps(plans[0]) if plans else (),
        trials=tuple(ranked(results, plan.mode)),
        wall_s=known.wall_s,
        spent_worker_s=sum(result.worker_s for result in results),
        full_worker_s=_full_worker_s(traces),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trace:
    """What a trial left in its run folder."""

    trial: Trial
    run: RunFolder
    plan: RunPlan | None
    history: History
    seconds: float
    """At work, over all attempts."""

    @classmethod
    def read(cls, folder: SweepFolder, trial: Trial) -> Self:
        run = folder.trial(trial.name)
        history = History.read(run.metrics)
        return cls(
            trial=trial,
            run=run,
            plan=read_plan(run) if exists(run.plan) else None,
            history=history,
            seconds=seconds_at_work(read_events(run.events), history),
        )

    @property
    def workers(self) -> int:
        return self.plan.batch.workers if self.plan else 1

    @property
    def seconds_to_the_end(self) -> float | None:
        """Of the whole trial, had it trained to its end at its own pace; None if it made no steps to tell by."""
        # Evaluations and saves lie between the points too, as they would for the rest of the trial.
        spans = [
            (later.time - point.time, later.step - point.step)
            for point, later in pairwise(self.history.points)
            if later.attempt == point.attempt
        ]
        num_steps = sum(steps for _, steps in spans)
        if not num_steps or self.plan is None:
            return None
        steps_left = self.plan.optimization.num_steps - self.history.last_step
        return self.seconds + steps_left * sum(seconds for seconds, _ in spans) / num_steps


def _trial_result(trace: _Trace, known: Known, plan: SweepPlan) -> TrialResult:
    end, against = known.ends.get(trace.trial.name), known.verdict_on(trace.trial.name)
    # Workers that are told to stop from afar may have made a few steps more.
    last_step = min(trace.history.last_step, against.step) if against else trace.history.last_step
    curve = tuple((step, value) for step, value in trace.history.series(plan.metric) if 0 < step <= last_step)
    finite = [value for _, value in curve if math.isfinite(value)]
    return TrialResult(
        trial=trace.trial,
        state=end.state if end else "running" if last_step else "waiting",
        value=(min if plan.mode == "min" else max)(finite, default=None),
        step=last_step,
        num_steps=trace.plan.optimization.num_steps if trace.plan else 0,
        rung=known.rung_of(trace.trial.name),
        worker_s=trace.seconds * trace.workers,
        cause=_cause(end, trace, last_step),
        curve=curve,
        folder=trace.run.path,
    )


def _cause(end: Ended | None, trace: _Trace, last_step: int) -> str | None:
    """Why a trial ended where it did; None if it trained to its end, or goes on."""
    if end is None or end.state != "finished":
        return end.cause if end else None
    if trace.plan is None or last_step >= trace.plan.optimization.num_steps or not exists(trace.run.result):
        return None
    stopped = Findings.from_json(read_json(trace.run.result)).stopped
    return f"after step {stopped.step}: {stopped.reason}" if stopped else None


def seconds_at_work(events: Sequence[dict[str, Any]], history: History) -> float:
    """Wall seconds over all attempts at a run: from the start of each to its last sign of life."""
    signs: dict[int, list[float]] = {}
    for event in events:
        signs.setdefault(event["attempt"], []).append(event["time"])
    for point in history.points:
        signs.setdefault(point.attempt, []).append(point.time)
    return sum(max(times) - min(times) for times in signs.values())


def _full_worker_s(traces: Sequence[_Trace]) -> float:
    """Worker seconds if every trial had trained to its end. One without steps to tell by counts as the mean of the others."""
    full = [seconds * trace.workers for trace in traces if (seconds := trace.seconds_to_the_end) is not None]
    mean = sum(full) / len(full) if full else 0.0
    return sum(full) + mean * (len(traces) - len(full))
