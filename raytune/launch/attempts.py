"""What to do when an attempt at a run fails. Pure: a failure in, a decision out."""

from dataclasses import dataclass
from enum import Enum

WORKER_DIED = "WorkerDied"

# What the same attempt would only meet again: wrong input, a loss that is not finite, a model that does not fit.
_PERMANENT = {"UserError", "ConfigError", "PlanError", "DataError", "ModelError", "TrainingError", "OutOfMemoryError", "StorageFullError"}


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
    def headline(self) -> str:
        where = "" if self.rank is None else f"rank {self.rank}" + (f" on {self.node}" if self.node else "") + ": "
        first_line = self.message.strip().splitlines()[0] if self.message.strip() else "no message"
        return f"{where}{self.kind}: {first_line}"


class Decision(Enum):
    RETRY = "retry"
    RAISE = "raise"


def decide(failure: Failure, failures_so_far: int, max_failures: int) -> Decision:
    """Try again unless the same would happen again, or the budget is spent.

    Args:
        failures_so_far: failed attempts of this command, this one included.
        max_failures: failed attempts after which the run goes on.
    """
    if failure.kind in _PERMANENT or failures_so_far > max_failures:
        return Decision.RAISE
    return Decision.RETRY
