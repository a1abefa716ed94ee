"""Everything that a run measured, read at once."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from raytune.metrics.points import EffectivePoints, Point, RollBack
from raytune.storage import read_bytes


@dataclass(frozen=True, slots=True)
class History:
    """Everything that a run measured, in the order of its steps, without what dead attempts did in vain."""

    points: tuple[Point, ...]
    roll_backs: tuple[RollBack, ...] = ()
    """Where the divergence guard went back, in their order."""

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a metrics file; no file is an empty history. A torn last line, which a crash leaves, is not there.

        Raises:
            UserError: if another line is not what `MetricsWriter` writes.
        """
        try:
            data = read_bytes(path)
        except FileNotFoundError:
            return cls(())
        return cls.parse(data, str(path))

    @classmethod
    def parse(cls, data: bytes, path: str) -> Self:
        """Read the content of a metrics file; `path` is for messages."""
        effective = EffectivePoints(path)
        for line in data.split(b"\n")[:-1]:
            effective.add(line)
        return cls(tuple(effective.points), tuple(effective.roll_backs))

    @property
    def last_step(self) -> int:
        """The last step that was measured, 0 before the first."""
        return self.points[-1].step if self.points else 0

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) wherever the metric was measured."""
        return [(point.step, point.values[name]) for point in self.points if name in point.values]

    def as_of(self, step: int) -> dict[str, float]:
        """The last value of every metric, by the end of a step."""
        return {name: value for point in self.points if point.step <= step for name, value in point.values.items()}

    def best_of(self, name: str, mode: Literal["min", "max"]) -> tuple[int, float] | None:
        """(step, value) of the best finite value; the earliest of equal ones."""
        finite = [(step, value) for step, value in self.series(name) if math.isfinite(value)]
        return min(finite, key=lambda pair: (pair[1] if mode == "min" else -pair[1], pair[0]), default=None)
