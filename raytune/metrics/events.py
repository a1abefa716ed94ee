"""events.jsonl: what happened to a run. Its writer and its readers."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from raytune.errors import UserError
from raytune.metrics.lines import LineWriter
from raytune.metrics.tail import Tail
from raytune.storage import read_bytes

UPLOAD_EVERY_S = 1.0
"""Events are few, and the last ones before a process dies tell most."""


class EventLog(LineWriter):
    """Adds lines to an events file: starts, saves, failures."""

    def __init__(
        self,
        path: str | Path,
        *,
        attempt: int,
        clock: Callable[[], float] = time.time,
        upload_every_s: float = UPLOAD_EVERY_S,
    ) -> None:
        super().__init__(path, upload_every_s)
        self._attempt, self._clock = attempt, clock

    def write(self, event: str, **facts: object) -> None:
        """Add an event, such as `write("checkpoint_saved", step=100)`; facts are JSON values."""
        self._lines.add({"event": event, "attempt": self._attempt, "time": self._clock(), **facts})


def read_events(path: str | Path) -> list[dict]:
    """Every event of a run in the order of writing, those of dead attempts too; none if there is no such file."""
    try:
        lines = read_bytes(path).split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    return _parsed(lines, path)


class EventFollower:
    """Reads an events file while it grows: every look reads what was added since the one before (metrics.tail)."""

    def __init__(self, path: str | Path) -> None:
        self._path, self._tail = path, Tail(path)
        self.events: list[dict] = []
        """All that are known, in the order of writing."""

    def look(self) -> tuple[list[dict], bool]:
        """Events that are new since the last look, and whether they are all: the first look, or another file than was read.

        Raises:
            UserError: if a line is not JSON.
            ClusterError: if the storage does not answer.
        """
        lines = self._tail.look()
        is_new = self._tail.is_new
        if is_new:
            self.events = []
        try:
            found = _parsed(lines, self._path)
        except UserError:
            self._tail.begin()  # the line may be mended
            raise
        self.events += found
        return found, is_new


def _parsed(lines: Sequence[bytes], path: str | Path) -> list[dict]:
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(f"{path} holds a line that is not JSON ({error}). Was the file edited? Remove the line.") from error
