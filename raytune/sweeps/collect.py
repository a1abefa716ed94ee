"""From the folders of a sweep to its result: what every trial came to, and what all of it cost."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from raytune.launch.record import read_plan
from raytune.metrics import History, read_events
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import RunFolder, SweepFolder
from raytune.storage import exists
from raytune.sweeps.ledger import Known, read_ledger
from raytune.sweeps.results import SweepResult, TrialResult, ranked
from raytune.sweeps.sweep_plan import SweepPlan
from raytune.sweeps.trial import Trial


def collect(folder: SweepFolder, plan: SweepPlan, keys: Sequence[str]) -> SweepResult:
    """Read what a sweep has left so far.

    Args:
        keys: of the space.
    """
    known = read_ledger(folder.ledger)
    results, plans = [], []
    for trial in sorted(known.trials.values(), key=lambda trial: trial.number):
        run = folder.trial(trial.name)
        trial_plan = read_plan(run) if exists(run.plan) else None
        plans += [trial_plan] if trial_plan else []
        results.append(_trial_result(trial, run, trial_plan, known, plan))
    best_first = ranked(results, plan.mode)
    rungs = plan.rung_steps(plans[0]) if plans else ()
    return SweepResult(
        name=folder.name,
        folder=folder.path,
        metric=plan.metric,
        mode=plan.mode,
        device=plans[0].cluster.device if plans else "cpu",
        keys=tuple(keys),
        rungs=rungs,
        trials=tuple(best_first),
        wall_s=known.wall_s,
        spent_worker_s=sum(result.worker_s for result in results),
        full_worker_s=_full_worker_s(results, folder),
    )


def _trial_result(trial: Trial, run: RunFolder, trial_plan: RunPlan | None, known: Known, plan: SweepPlan) -> TrialResult:
    history, end = History.read(run.metrics), known.ends.get(trial.name)
    curve = tuple((step, value) for step, value in history.series(plan.metric) if step)
    finite = [value for _, value in curve if math.isfinite(value)]
    best = (min if plan.mode == "min" else max)(finite, default=None)
    started = history.last_step > 0
    return TrialResult(
        trial=trial,
        state=end.state if end else "running" if started else "waiting",
        value=best,
        step=history.last_step,
        num_steps=trial_plan.optimization.num_steps if trial_plan else 0,
        rung=known.rung_of(trial.name),
        worker_s=seconds_at_work(read_events(run.events), history) * (trial_plan.batch.workers if trial_plan else 1),
        cause=end.cause if end else None,
        curve=curve,
        folder=run.path,
    )


def seconds_at_work(events: Sequence[dict[str, Any]], history: History) -> float:
    """Wall seconds over all attempts at a run: from the start of each to its last sign of life."""
    signs: dict[int, list[float]] = {}
    for event in events:
        signs.setdefault(event["attempt"], []).append(event["time"])
    for point in history.points:
        signs.setdefault(point.attempt, []).append(point.time)
    return sum(max(times) - min(times) for times in signs.values())


def _full_worker_s(results: Sequence[TrialResult], folder: SweepFolder) -> float:
    """Worker seconds if every trial had trained to its end: its own start-up, and its own seconds per step for the rest.

    A trial that has no steps to be measured by counts as the mean of the others.
    """
    full = [
        seconds
        for result in results
        if (seconds := _seconds_to_the_end(result, History.read(folder.trial(result.trial.name).metrics))) is not None
    ]
    mean = sum(full) / len(full) if full else 0.0
    return sum(full) + mean * (len(results) - len(full))


def _seconds_to_the_end(result: TrialResult, history: History) -> float | None:
    if not result.step:
        return None
    steps_left = result.num_steps - result.step
    # Evaluations and saves lie between the points too, as they would for the rest of the trial.
    spans = [
        (b.time - a.time, b.step - a.step) for a, b in pairwise(history.points) if a.attempt == b.attempt and b.step > a.step
    ]
    steps = sum(count for _, count in spans)
    if not steps:
        return None
    workers = 1
    return result.worker_s + workers * steps_left * sum(seconds for seconds, _ in spans) / steps
