"""events.jsonl: what happened to a run. Its writer and its reader."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from raytune.errors import UserError
from raytune.metrics.lines import LineWriter
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
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(f"{path} holds a line that is not JSON ({error}). Was the file edited? Remove the line.") from error
