"""What to do when an attempt at a run fails. Pure: a failure in, a decision out."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from raytune.printable import without_sequences

WORKER_DIED = "WorkerDied"
WORKER_HUNG = "WorkerHung"
NODE_LOST = "NodeLost"
NO_ROOM = "NoRoom"
LOST = (WORKER_DIED, WORKER_HUNG, NODE_LOST)
"""Kinds of failure that are the machines' and not the run's: another attempt can succeed, and so can the same command later."""

# What the same attempt would only meet again: wrong input, a loss that is not finite, a model that does not fit.
_PERMANENT = {
    "UserError",
    "ConfigError",
    "PlanError",
    "DataError",
    "ModelError",
    "TrainingError",
    "OutOfMemoryError",
    "StorageFullError",
    "TakenOverError",
    "UnfitCheckpointError",
    "ModuleNotFoundError",
    NO_ROOM,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What ended one attempt: the earliest record of a worker, or what Ray says where none was written.

    A killed process writes no record, and its survivors then fail with a broken connection: `kind` "WorkerDied" says so.
    """

    attempt: int
    rank: int | None
    node: str | None
    kind: str
    message: str
    traceback: str
    collateral: tuple[int, ...] = ()
    """Ranks that failed afterwards."""

    @property
    def cause(self) -> tuple[str, str]:
        """What is equal when the same error comes again, on whichever rank."""
        return self.kind, self.message

    @property
    def may_pass(self) -> bool:
        """Whether the same command can succeed later, with nothing changed."""
        return self.kind in (*LOST, NO_ROOM, "ClusterError")

    @property
    def headline(self) -> str:
        where = "" if self.rank is None else f"rank {self.rank}" + (f" on {self.node}" if self.node else "") + ": "
        return f"{where}{self.kind}: {cause_line(self.message)}"


def plain(text: str) -> str:
    """A message without the colours that Ray gives to tracebacks."""
    return without_sequences(text).strip()


def cause_line(message: str) -> str:
    """The line of a message that says what went wrong: the first one, of a traceback the last that begins a line."""
    lines = [line for line in plain(message).splitlines() if line.strip()]
    if not lines:
        return "no message"
    if any(line.lstrip().startswith("Traceback (most recent call last)") for line in lines) or "ray::" in lines[0]:
        return next((line for line in reversed(lines) if not line[0].isspace()), lines[-1])
    return lines[0]


def details(message: str) -> list[str]:
    """The lines of a message beside its cause."""
    lines = [line for line in plain(message).splitlines() if line.strip()]
    cause = cause_line(message)
    return lines[: (found := lines.index(cause))] + lines[found + 1 :] if cause in lines else lines


class Decision(Enum):
    RETRY = "retry"
    RAISE = "raise"


def decide(failures: Sequence[Failure], max_failures: int) -> Decision:
    """Try again unless the same would happen again, or the budget is spent.

    Args:
        failures: of this command so far, the newest last.
        max_failures: failed attempts after which the run goes on.
    """
    newest = failures[-1]
    repeated = len(failures) > 1 and newest.kind not in LOST and newest.cause == failures[-2].cause
    if newest.kind in _PERMANENT or repeated or len(failures) > max_failures:
        return Decision.RAISE
    return Decision.RETRY
