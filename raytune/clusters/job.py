"""A job as the cluster knows it, and how far its own run or sweep is, read from the folder."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ray.job_submission import JobStatus

from raytune.errors import EXIT_FAILED, EXIT_RETRY_LATER, RaytuneError
from raytune.launch.record import RunRecord, read_plan
from raytune.metrics import History, read_events
from raytune.run_folder import RunFolder, SweepFolder
from raytune.storage import exists

EXIT_STOPPED = 143
"""Of a job that was stopped, as of a process that SIGTERM ended."""

_NOT_TO_BE_REPEATED = ("RUNTIME_ENV_SETUP_FAILURE", "JOB_ENTRYPOINT_COMMAND_START_ERROR", "JOB_ENTRYPOINT_COMMAND_ERROR")
_LOST = ("JOB_SUPERVISOR_ACTOR_DIED", "JOB_SUPERVISOR_ACTOR_START_FAILURE", "JOB_SUPERVISOR_ACTOR_UNKNOWN_FAILURE", None)
_STATES = {"run_finished": "finished", "run_interrupted": "interrupted", "attempt_failed": "failed"}
"""Of an attempt at a run, by the event that ends it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job as the cluster knows it."""

    id: str
    run: str | None
    """Name of its run or sweep; None for a job that plain `ray job submit` started."""
    storage: str | None
    status: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    message: str | None
    error_type: str | None
    entrypoint: str
    started: float | None
    """Seconds since 1970."""
    ended: float | None
    driver_exit_code: int | None
    verb: str | None = None
    """train or sweep, as `raytune submit` was told."""

    @property
    def has_ended(self) -> bool:
        return JobStatus(self.status).is_terminal()

    @property
    def lost_its_driver(self) -> bool:
        """Whether the node that its own process ran on was lost: it ended without a word, and can go on elsewhere."""
        return self.status == JobStatus.FAILED and not self.driver_exit_code and self.error_type in _LOST

    @property
    def exit_code(self) -> int | None:
        """What the same command would have returned here; None while it runs.

        A job that ended without an exit code was lost by the cluster, and can be submitted again.
        """
        if not self.has_ended:
            return None
        if self.status == JobStatus.STOPPED:
            return EXIT_STOPPED
        if self.status == JobStatus.SUCCEEDED:
            return 0
        if self.driver_exit_code:
            # Ended by a signal: as a shell counts it.
            return self.driver_exit_code if self.driver_exit_code > 0 else 128 - self.driver_exit_code
        return EXIT_FAILED if self.error_type in _NOT_TO_BE_REPEATED else EXIT_RETRY_LATER

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "exit_code": self.exit_code}


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
