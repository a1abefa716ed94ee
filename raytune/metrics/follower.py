"""Everything that a run measures, read while it goes on."""

from collections.abc import Sequence
from pathlib import Path

from raytune.errors import UserError
from raytune.metrics.points import EffectivePoints, Point, is_of_suite, seconds_per_step
from raytune.metrics.tail import Tail


class Follower:
    """Reads a metrics file while it grows: every look reads what was added since the one before (metrics.tail)."""

    def __init__(self, path: str | Path) -> None:
        self._path, self._tail = path, Tail(path)
        self._effective, self._num_begun = EffectivePoints(str(path)), 0

    def look(self) -> tuple[Point, ...]:
        """Points that are new since the last look, or of which more is known, by step; whole, with what was known before.

        Raises:
            UserError: if a line is not what `MetricsWriter` writes.
            ClusterError: if the storage does not answer.
        """
        lines = self._tail.look()
        if self._tail.is_new:
            self._effective, self._num_begun = EffectivePoints(str(self._path)), self._num_begun + 1
        try:
            steps = {step for line in lines if (step := self._effective.add(line)) is not None}
        except UserError:
            self._tail.begin()  # the line may be mended
            raise
        known = (self._effective.point_at(step) for step in sorted(steps))
        return tuple(point for point in known if point is not None)  # a resume may have cut it off again

    @property
    def points(self) -> Sequence[Point]:
        """All that stand, by step. Not a copy: the next look changes it."""
        return self._effective.points

    @property
    def num_bytes(self) -> int:
        """How much of the file was read."""
        return self._tail.num_bytes

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

    @property
    def suites(self) -> list[str]:
        """Names of what was measured of suites while training went on."""
        return [name for name in self._effective.names if is_of_suite(name)]

    def seconds_per_step(self, num_intervals: int = 20) -> float:
        """Median over the last intervals between two points of the same attempt; 0 while there are none."""
        return seconds_per_step(self._effective.points[-num_intervals - 1 :])
