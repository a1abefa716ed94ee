"""A job as the cluster knows it, and which one a name means."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from ray.job_submission import JobDetails, JobStatus

from raytune.errors import EXIT_FAILED, EXIT_RETRY_LATER

EXIT_STOPPED = 143
"""Of a job that was stopped, as of a process that SIGTERM ended."""

_NOT_TO_BE_REPEATED = ("RUNTIME_ENV_SETUP_FAILURE", "JOB_ENTRYPOINT_COMMAND_START_ERROR", "JOB_ENTRYPOINT_COMMAND_ERROR")
_LOST = ("JOB_SUPERVISOR_ACTOR_DIED", "JOB_SUPERVISOR_ACTOR_START_FAILURE", "JOB_SUPERVISOR_ACTOR_UNKNOWN_FAILURE", None)


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

    @classmethod
    def of(cls, details: JobDetails) -> Self:
        """What Ray says of a job."""
        metadata = details.metadata or {}
        return cls(
            id=str(details.submission_id),
            run=metadata.get("run"),
            storage=metadata.get("storage"),
            status=JobStatus(details.status).value,
            message=details.message,
            error_type=details.error_type,
            entrypoint=details.entrypoint,
            started=details.start_time / 1000 if details.start_time else None,
            ended=details.end_time / 1000 if details.end_time else None,
            driver_exit_code=details.driver_exit_code,
            verb=metadata.get("verb"),
        )

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


def is_ours(details: JobDetails) -> bool:
    """Whether a job is one of raytune, however it was submitted."""
    words = details.entrypoint.split()
    return "raytune" in (details.metadata or {}) or any(
        word.endswith("launch.py") or word in ("raytune", "raytune.cli") for word in words
    )


def meant(jobs: Sequence[Job], name: str | None) -> Job | None:
    """The job of that name; of the run of that name the one that has not ended, else the newest; without a name alike, of all.

    Args:
        jobs: the newest first.
    """
    named = [job for job in jobs if name is not None and name == job.id]
    of_run = named or [job for job in jobs if name is None or name == job.run]
    return next((job for job in of_run if not job.has_ended), next(iter(of_run), None))
