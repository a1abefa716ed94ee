"""The writer of metrics.jsonl."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from raytune.metrics.json_numbers import encode_number
from raytune.metrics.lines import LineWriter
from raytune.metrics.points import RollBack

UPLOAD_EVERY_S = 15.0


class MetricsWriter(LineWriter):
    """Adds lines to a metrics file for one attempt. One writer per file: rank 0.

    A flush is due before a checkpoint commits, which makes its steps part of the history.

    Args:
        attempt: number of this attempt, larger than that of every earlier one.
        resumed_step: the step after which this attempt goes on; 0 when it starts from scratch.
        roll_back: the way back that led there, if one did.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        attempt: int,
        resumed_step: int,
        roll_back: RollBack | None = None,
        clock: Callable[[], float] = time.time,
        upload_every_s: float = UPLOAD_EVERY_S,
    ) -> None:
        super().__init__(path, upload_every_s)
        self._attempt, self._clock = attempt, clock
        facts = roll_back.to_record() if roll_back else {}
        self._lines.add({"attempt": attempt, "time": clock(), "resumed_step": resumed_step, **facts})

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add what was measured after a step. Several lines of one step add up; a name that comes twice keeps the later value."""
        numbers = {name: encode_number(float(value)) for name, value in values.items()}
        self._lines.add({"attempt": self._attempt, "time": self._clock(), "step": step, **numbers})
