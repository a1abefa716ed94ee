"""What to do when an attempt at a run fails. Pure: a failure in, a decision out."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

WORKER_DIED = "WorkerDied"

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
    def headline(self) -> str:
        where = "" if self.rank is None else f"rank {self.rank}" + (f" on {self.node}" if self.node else "") + ": "
        first_line = self.message.strip().splitlines()[0] if self.message.strip() else "no message"
        return f"{where}{self.kind}: {first_line}"


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
    repeated = len(failures) > 1 and newest.kind != WORKER_DIED and newest.cause == failures[-2].cause
    if newest.kind in _PERMANENT or repeated or len(failures) > max_failures:
        return Decision.RAISE
    return Decision.RETRY
