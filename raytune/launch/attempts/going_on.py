"""What the same command does when it is given again: said where a run ends early, and only what is true."""

from raytune.errors import ClusterError, RaytuneError
from raytune.launch.attempts.attempts import Failure, details
from raytune.run_folder import RunFolder
from raytune.storage import list_folder
from raytune.training.checkpoints.commit import committed


def going_on(folder: RunFolder, *, resumes: bool = True) -> str:
    """A sentence about the newest checkpoint, or about there being none.

    Args:
        resumes: whether the command continues a run that is there (`checkpoint.resume`); else it would refuse this one.
    """
    if not resumes:
        return "checkpoint.resume is false, so the same command would refuse the run. With checkpoint.resume=true it goes on."
    try:
        newest = max((commit.step for commit in committed(folder)), default=None)
    except (RaytuneError, OSError):
        return f"Whether {folder.path} holds a checkpoint to continue from cannot be seen now."
    if newest is None:
        return "No checkpoint was committed yet, so the same command starts the run from its beginning."
    return f"The same command continues from step {newest}, the newest checkpoint ({folder.checkpoint(newest)})."


def tracebacks(folder: RunFolder, attempt: int) -> str | None:
    """Where workers of an attempt have left tracebacks; None if they have not."""
    try:
        left = any(name.startswith(f"attempt-{attempt}.rank-") for name in list_folder(folder.failures))
    except (RaytuneError, OSError):
        return None
    return f"Tracebacks: {folder.failures}" if left else None


def task_failed(what: str, failure: Failure, folder: RunFolder) -> RaytuneError:
    """The error of a task that is no run and is not tried again: the last line is the cause.

    Args:
        what: was done, as the beginning of a sentence.
        folder: in which its workers left tracebacks.
    """
    lines = [
        *([where] if (where := tracebacks(folder, failure.attempt)) else []),
        *details(failure.message),
        f"{what} failed: {failure.headline}",
    ]
    return (ClusterError if failure.may_pass else RaytuneError)("\n".join(lines))
