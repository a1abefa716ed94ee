"""What the lines of a metrics file come to, taken one after the other: a point for each step that counts."""

import json
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from raytune.errors import UserError
from raytune.metrics.json_numbers import decode_number

NOT_OF_SUITES = ("train", "validation")
"""What names of metrics begin with that no suite gives."""


def is_of_suite(name: str) -> bool:
    """Whether a metric is that of a suite, SUITE/METRIC."""
    return name.partition("/")[0] not in NOT_OF_SUITES


def is_of_training(name: str) -> bool:
    """Whether a metric tells of the steps that lead to a point, and not of the model that stands there."""
    return name.startswith("train/")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What was measured after one step."""

    step: int
    time: float
    """Seconds since 1970 when it was first written."""
    attempt: int
    values: Mapping[str, float]

    @property
    def evaluation(self) -> dict[str, float]:
        """What was measured of the model itself; empty where it was not evaluated."""
        return {name: value for name, value in self.values.items() if not is_of_training(name)}


@dataclass(frozen=True, slots=True, kw_only=True)
class RollBack:
    """Where an attempt went back to a checkpoint of its own."""

    bad_step: int
    """First step that went wrong."""
    to: int
    """Step of the checkpoint."""
    rate_factor: float
    """What all rates from there on are multiplied by."""

    def to_record(self) -> dict[str, float]:
        """What the line that says after which step the attempt goes on has beside that."""
        return {"bad_step": self.bad_step, "rate_factor": self.rate_factor}


def standing(roll_backs: Sequence[RollBack], step: int) -> list[RollBack]:
    """Those that lead to what an attempt goes on from after a step: it was saved before any that leads further.

    Args:
        roll_backs: of the run, in their order.
    """
    found = list(roll_backs)
    while found and found[-1].to > step:
        found.pop()
    return found


class EffectivePoints:
    """The effective history that the lines of a metrics file come to, one after the other.

    Args:
        path: for messages.
    """

    def __init__(self, path: str) -> None:
        self._path, self._num_lines, self._attempt = path, 0, 0
        self.num_cuts = 0
        """How often points were taken back."""
        self.points: list[Point] = []
        """By step, each once."""
        self.roll_backs: list[RollBack] = []
        """Those that lead to the history as it is, in their order."""
        self._last_with: dict[str, Point] | None = {}

    def add(self, line: bytes) -> int | None:
        """Take the next line; the step that was measured, None if the line says nothing new of any.

        Raises:
            UserError: if it is not what `MetricsWriter` writes.
        """
        self._num_lines += 1
        try:
            record = json.loads(line)
            writer, when = int(record.pop("attempt")), float(record.pop("time"))
            begins = "resumed_step" in record
            step = int(record.pop("resumed_step" if begins else "step"))
            values = {name: decode_number(value) for name, value in record.items()}
            back = None
            if begins and "rate_factor" in values:
                back = RollBack(bad_step=int(values["bad_step"]), to=step, rate_factor=values["rate_factor"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self._path}:{self._num_lines} is not a line of metrics ({error}). Was the file edited? Remove the line."
            ) from error
        if writer < self._attempt:
            return None
        self._attempt = writer
        if begins:
            self.roll_backs = [*self.roll_backs, back] if back else standing(self.roll_backs, step)
            if self.points and self.points[-1].step > step:
                del self.points[bisect_right(self.points, step, key=_step_of) :]
                self.num_cuts += 1
                self._last_with = None
            return None
        at = bisect_left(self.points, step, key=_step_of)
        known = self.points[at] if at < len(self.points) and self.points[at].step == step else None
        if known:
            when, values = known.time, {**known.values, **values}
        point = Point(step=step, time=when, attempt=writer, values=values)
        self.points[at : at + (known is not None)] = [point]
        if self._last_with is not None and at == len(self.points) - 1:
            self._last_with |= dict.fromkeys(values, point)
        else:
            self._last_with = None
        return step

    def point_at(self, step: int) -> Point | None:
        at = bisect_left(self.points, step, key=_step_of)
        return self.points[at] if at < len(self.points) and self.points[at].step == step else None

    def last_with(self, name: str) -> Point | None:
        """The last point that has a metric."""
        return self._newest().get(name)

    @property
    def names(self) -> list[str]:
        """All that was measured, in alphabetical order."""
        return sorted(self._newest())

    def _newest(self) -> dict[str, Point]:
        """The last point that has it, by metric. Counted along while lines come in order, anew after a resume."""
        if self._last_with is None:
            self._last_with = {name: point for point in self.points for name in point.values}
        return self._last_with


def _step_of(point: Point) -> int:
    return point.step


def seconds_per_step(points: Sequence[Point]) -> float:
    """Median between two neighbours of the same attempt; 0 if there are none. A point that was measured late is no neighbour."""
    pairs = [
        (later.time - earlier.time) / (later.step - earlier.step)
        for earlier, later in pairwise(points)
        if earlier.attempt == later.attempt and earlier.time <= later.time
    ]
    return statistics.median(pairs) if pairs else 0.0
