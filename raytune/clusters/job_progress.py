"""How far jobs are: read from the folders of their runs and sweeps, and told a line per job."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray.job_submission import JobStatus

from raytune.clusters.job import Job
from raytune.errors import RaytuneError
from raytune.launch.state.record import RunRecord, read_plan
from raytune.metrics.events import read_events
from raytune.metrics.history import History
from raytune.run_folder import RunFolder, SweepFolder
from raytune.storage import exists
from raytune.units import format_seconds

_STATES = {"run_finished": "finished", "run_interrupted": "interrupted", "attempt_failed": "failed"}
"""Of an attempt at a run, by the event that ends it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a job has brought its run."""

    state: str
    step: int
    num_steps: int

    def __str__(self) -> str:
        return f"{self.step}/{self.num_steps} ({self.state})"


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepProgress:
    """How far a sweep is."""

    state: str
    ended: int
    """Trials, whether they were finished, stopped early or failed."""
    trials: int
    """That are known so far."""
    best: str | None
    """Name of the best trial, once the sweep has a result."""

    def __str__(self) -> str:
        best = f", best {self.best}" if self.best else ""
        return f"{self.ended}/{self.trials} trials ({self.state}{best})"


def progress_of(job: Job) -> Progress | SweepProgress | None:
    """How far the run or sweep of a job is; None if its folder cannot be seen from here, or the job had no part in it."""
    if job.run is None or job.storage is None:
        return None
    try:
        sweep = SweepFolder(job.storage, job.run)
        if job.verb == "sweep" or (job.verb is None and exists(sweep.sweep)):
            return _sweep_progress(sweep, job)
        return _run_progress(RunFolder(job.storage, job.run), job)
    except (RaytuneError, OSError, ImportError):  # another raytune's, a storage out of reach or without its package: not seen
        return None


def _run_progress(folder: RunFolder, job: Job) -> Progress | None:
    """By the attempts that this job made: other jobs may have worked on the run before it, or since."""
    record = RunRecord.read(folder)
    if record is None:
        return None
    history, num_steps = History.read(folder.metrics), read_plan(folder).optimization.num_steps
    events = read_events(folder.events)
    started = [event for event in events if event["event"] == "attempt_started"]
    whole = Progress(state=record.state, step=history.last_step, num_steps=num_steps)
    if not any(event.get("job") for event in started):  # of a raytune that did not note it
        return whole
    own = [event["attempt"] for event in started if event.get("job") == job.id]
    if not own:
        return whole if job.status == JobStatus.SUCCEEDED else None  # it has found a finished run, or was refused
    if own[-1] == started[-1]["attempt"]:
        return whole
    return Progress(
        state=_state_after(events, own[-1]),
        step=max((point.step for point in history.points if point.attempt <= own[-1]), default=0),
        num_steps=num_steps,
    )


def _state_after(events: Sequence[dict[str, Any]], attempt: int) -> str:
    ends = [_STATES[event["event"]] for event in events if event["attempt"] == attempt and event["event"] in _STATES]
    return ends[-1] if ends else "lost"


def _sweep_progress(folder: SweepFolder, job: Job) -> SweepProgress | None:
    from raytune.sweeps.ledger import read_ledger
    from raytune.sweeps.winner import read_sweep

    if not exists(folder.sweep):
        return None
    known = read_ledger(folder.ledger)
    ended = sum(known.has_ended(name) for name in known.trials)
    if exists(folder.result):
        best = read_sweep(folder.path).best
        return SweepProgress(state="finished", ended=ended, trials=len(known.trials), best=best.trial.name if best else None)
    state = "unfinished" if job.has_ended else "running"
    return SweepProgress(state=state, ended=ended, trials=len(known.trials), best=None)


def status_text(jobs: Sequence[Job], now: float) -> str:
    """One line per job: name, status, age, run, and how far the run is where its folder can be seen."""
    if not jobs:
        return "no jobs of raytune"
    rows = [("job", "status", "since", "run", "step")]
    for job in jobs:
        progress = progress_of(job)
        step = str(progress) if progress else "-"
        since = format_seconds(max(0.0, (job.ended or now) - job.started)) if job.started else "-"
        code = f" ({job.exit_code})" if job.exit_code not in (None, 0) else ""
        rows.append((job.id, job.status.lower() + code, since, job.run or "-", step))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
