"""Everything that a run measures, read while it goes on."""

from collections.abc import Sequence
from pathlib import Path

from raytune.errors import UserError
from raytune.metrics.points import EffectivePoints, Point, seconds_per_step
from raytune.storage import read_from


class Follower:
    """Reads a metrics file while it grows: every look reads what was added since the one before, however long the file is.

    Half a line, which is still being written or which a crash left, waits for a later look. A file that is no longer the one that
    was read, because it is shorter or its last known line has changed, is read again from its beginning.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = path
        self._num_begun = 0
        self._begin()

    def _begin(self) -> None:
        self._offset, self._last_line = 0, b""
        self._num_begun += 1
        self._effective = EffectivePoints(str(self._path))

    def look(self) -> tuple[Point, ...]:
        """Points that are new since the last look, or of which more is known, by step; whole, with what was known before.

        Raises:
            UserError: if a line is not what `MetricsWriter` writes.
            ClusterError: if the storage does not answer.
        """
        data = self._added()
        lines = data[: data.rfind(b"\n") + 1]
        try:
            steps = {step for line in lines.split(b"\n")[:-1] if (step := self._effective.add(line)) is not None}
        except UserError:
            self._begin()  # the line may be mended
            raise
        if lines:
            self._offset += len(lines)
            self._last_line = lines[lines.rfind(b"\n", 0, -1) + 1 :]
        known = (self._effective.point_at(step) for step in sorted(steps))
        return tuple(point for point in known if point is not None)  # a resume may have cut it off again

    @property
    def points(self) -> Sequence[Point]:
        """All that stand, by step."""
        return self._effective.points

    @property
    def num_bytes(self) -> int:
        """How much of the file was read."""
        return self._offset

    @property
    def cuts(self) -> tuple[int, int]:
        """Another value than before says that points of earlier looks may stand no more."""
        return self._num_begun, self._effective.num_cuts

    def stands(self, point: Point) -> bool:
        """Whether a point of an earlier look is a part of the history still, be it with more values."""
        now = self._effective.point_at(point.step)
        return now is not None and now.time == point.time

    @property
    def last_step(self) -> int:
        """The last step that was measured, 0 before the first."""
        return self._effective.points[-1].step if self._effective.points else 0

    def newest(self, name: str) -> tuple[int, float] | None:
        """(step, value) where a metric was measured last; None: nowhere."""
        point = self._effective.last_with(name)
        return (point.step, point.values[name]) if point else None

    def seconds_per_step(self, num_intervals: int = 20) -> float:
        """Median over the last intervals between two points of the same attempt; 0 while there are none."""
        return seconds_per_step(self._effective.points[-num_intervals - 1 :])

    def _added(self) -> bytes:
        """What the file holds behind what was read."""
        try:
            data = read_from(self._path, self._offset - len(self._last_line))
            if data.startswith(self._last_line):
                return data[len(self._last_line) :]
            self._begin()
            return read_from(self._path, 0)
        except FileNotFoundError:
            self._begin()
            return b""
