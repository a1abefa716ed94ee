"""metrics.jsonl and events.jsonl: what a run measured and what happened to it, one JSON object per line, and their typed reader.

Lines are only ever added. Every line of metrics.jsonl carries the number of the attempt that wrote it, and an attempt begins
with a line that says after which step it resumed. A reader therefore sees the *effective* history: steps that a dead attempt
trained beyond the checkpoint are gone, and so is what an orphaned process of that attempt still writes.

    {"attempt": 2, "time": 1764.2, "resumed_step": 100}
    {"attempt": 2, "time": 1766.9, "step": 101, "train/loss": 1.25, "train/learning_rate": 0.0002}

Whoever watches a run uses a `Follower`, which reads every line once; whoever looks once reads a `History`.

JSON has no word for not-a-number and infinity; they are the strings "NaN", "Infinity" and "-Infinity" here, floats in `History`.
"""

import json
import logging
import math
import os
import statistics
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, Self

from raytune.errors import RaytuneError, UserError
from raytune.local_files import local_errors
from raytune.object_store import once, shown
from raytune.storage import exists, is_local, local_path, read_bytes, read_from, write_bytes

# An object store cannot append: the whole file is written again, at most this often. Events are few, and the last ones before
# a process dies tell most.
UPLOAD_METRICS_EVERY_S = 15.0
UPLOAD_EVENTS_EVERY_S = 1.0

_log = logging.getLogger(__name__)
_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def encode_number(value: float) -> float | str:
    """The number as strict JSON can hold it."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def decode_number(value: object) -> float:
    """The number that `encode_number` was given.

    Raises:
        ValueError: if it is none.
    """
    if isinstance(value, str) and value in _WORDS:
        return _WORDS[value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"expected a number, got {value!r}")
    return float(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What was measured after one step."""

    step: int
    time: float
    """Seconds since 1970 when it was first written."""
    attempt: int
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class History:
    """Everything that a run measured, in the order of its steps, without what dead attempts did in vain."""

    points: tuple[Point, ...]

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
        effective = _Effective(path)
        for line in data.split(b"\n")[:-1]:
            effective.add(line)
        return cls(tuple(effective.points))

    @property
    def last_step(self) -> int:
        """The newest step that was measured, 0 before the first."""
        return self.points[-1].step if self.points else 0

    @property
    def names(self) -> list[str]:
        """Every metric that was measured at least once, sorted."""
        return sorted({name for point in self.points for name in point.values})

    @property
    def evaluations(self) -> list[Point]:
        """The points at which the model was evaluated, with nothing but the values of the evaluation."""
        return [
            Point(step=point.step, time=point.time, attempt=point.attempt, values=values)
            for point in self.points
            if (values := {name: value for name, value in point.values.items() if not name.startswith("train/")})
        ]

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) wherever the metric was measured."""
        return [(point.step, point.values[name]) for point in self.points if name in point.values]

    def last_of(self, name: str) -> float | None:
        """The newest value of a metric."""
        return next((point.values[name] for point in reversed(self.points) if name in point.values), None)

    def newest(self, until_step: int) -> dict[str, float]:
        """The newest value of every metric, by the end of a step."""
        return {name: value for point in self.points if point.step <= until_step for name, value in point.values.items()}

    def best_of(self, name: str, mode: Literal["min", "max"]) -> tuple[int, float] | None:
        """(step, value) of the best finite value; the earliest of equal ones."""
        finite = [(step, value) for step, value in self.series(name) if math.isfinite(value)]
        return min(finite, key=lambda pair: (pair[1] if mode == "min" else -pair[1], pair[0]), default=None)

    def seconds_per_step(self, num_intervals: int = 20) -> float:
        """Median over the last intervals between two points of the same attempt; 0 while there are none."""
        return _seconds_per_step(self.points[-num_intervals - 1 :])


def _seconds_per_step(points: Sequence[Point]) -> float:
    pairs = [
        (later.time - earlier.time) / (later.step - earlier.step)
        for earlier, later in pairwise(points)
        if earlier.attempt == later.attempt
    ]
    return statistics.median(pairs) if pairs else 0.0


class _Effective:
    """The effective history that the lines of a metrics file come to, one after the other.

    Args:
        path: for messages.
    """

    def __init__(self, path: str) -> None:
        self._path, self._num_lines, self._attempt = path, 0, 0
        self.points: list[Point] = []
        """By step, each once."""
        self._newest: dict[str, Point] | None = {}

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
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self._path}:{self._num_lines} is not a line of metrics ({error}). Was the file edited? Remove the line."
            ) from error
        if writer < self._attempt:
            return None
        self._attempt = writer
        if begins:
            if self.points and self.points[-1].step > step:
                del self.points[bisect_right(self.points, step, key=_step_of) :]
                self._newest = None
            return None
        at = bisect_left(self.points, step, key=_step_of)
        known = self.points[at] if at < len(self.points) and self.points[at].step == step else None
        if known:
            when, values = known.time, {**known.values, **values}
        point = Point(step=step, time=when, attempt=writer, values=values)
        self.points[at : at + (known is not None)] = [point]
        if self._newest is not None and at == len(self.points) - 1:
            self._newest |= dict.fromkeys(values, point)
        else:
            self._newest = None
        return step

    def point_at(self, step: int) -> Point | None:
        at = bisect_left(self.points, step, key=_step_of)
        return self.points[at] if at < len(self.points) and self.points[at].step == step else None

    @property
    def newest(self) -> Mapping[str, Point]:
        """The last point of every metric that has it. Counted along while lines come in order, anew after a resume."""
        if self._newest is None:
            self._newest = {name: point for point in self.points for name in point.values}
        return self._newest


def _step_of(point: Point) -> int:
    return point.step


class Follower:
    """Reads a metrics file while it grows: every look reads what was added since the one before, however long the file is.

    Half a line, which is still being written or which a crash left, waits for a later look. A file that is no longer the one that
    was read, because it is shorter or its last known line has changed, is read again from its beginning.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = path
        self._begin()

    def _begin(self) -> None:
        self._offset, self._last_line = 0, b""
        self._effective = _Effective(str(self._path))
        self._history: History | None = History(())

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
            self._offset, self._history = self._offset + len(lines), None
            self._last_line = lines[lines.rfind(b"\n", 0, -1) + 1 :]
        known = (self._effective.point_at(step) for step in sorted(steps))
        return tuple(point for point in known if point is not None)  # a resume may have cut it off again

    @property
    def history(self) -> History:
        """Everything that was read so far. Made anew after each look that found something: for a look at all of it."""
        if self._history is None:
            self._history = History(tuple(self._effective.points))
        return self._history

    @property
    def last_step(self) -> int:
        """See `History.last_step`."""
        return self._effective.points[-1].step if self._effective.points else 0

    def newest(self, name: str) -> tuple[int, float] | None:
        """(step, value) where a metric was measured last; None: nowhere."""
        point = self._effective.newest.get(name)
        return (point.step, point.values[name]) if point else None

    def seconds_per_step(self, num_intervals: int = 20) -> float:
        """See `History.seconds_per_step`."""
        return _seconds_per_step(self._effective.points[-num_intervals - 1 :])

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


class MetricsWriter:
    """Adds lines to a metrics file for one attempt. One writer per file: rank 0.

    Args:
        attempt: number of this attempt, larger than that of every earlier one.
        resumed_step: the step after which this attempt goes on; 0 when it starts from scratch.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        attempt: int,
        resumed_step: int,
        clock: Callable[[], float] = time.time,
        upload_every_s: float = UPLOAD_METRICS_EVERY_S,
    ) -> None:
        self._attempt, self._clock = attempt, clock
        self._lines = _lines(path, upload_every_s)
        self._lines.add({"attempt": attempt, "time": clock(), "resumed_step": resumed_step})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        _close(self, kind)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add what was measured after a step. Several lines of one step add up; a name that comes twice keeps the later value."""
        numbers = {name: encode_number(float(value)) for name, value in values.items()}
        self._lines.add({"attempt": self._attempt, "time": self._clock(), "step": step, **numbers})

    def flush(self) -> None:
        """Bring every line to the storage itself. Due before a checkpoint commits, which makes its steps part of the history."""
        self._lines.flush()

    def close(self) -> None:
        """Flush, and write no more."""
        self._lines.close()


class EventLog:
    """Adds lines to an events file: starts, saves, failures. Threads may share it, and processes may write to the same file.

    What a thread still has to say after the log was closed is written too, line by line.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        attempt: int,
        clock: Callable[[], float] = time.time,
        upload_every_s: float = UPLOAD_EVENTS_EVERY_S,
    ) -> None:
        self._attempt, self._clock = attempt, clock
        self._lines = _lines(path, upload_every_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        _close(self, kind)

    def write(self, event: str, **facts: object) -> None:
        """Add an event, such as `write("checkpoint_saved", step=100)`; facts are JSON values."""
        self._lines.add({"event": event, "attempt": self._attempt, "time": self._clock(), **facts})

    def flush(self) -> None:
        """Bring every line to the storage itself."""
        self._lines.flush()

    def close(self) -> None:
        """Flush, and write no more."""
        self._lines.close()


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


def _close(writer: MetricsWriter | EventLog, failure: type[BaseException] | None) -> None:
    """Close at the end of a block; where something else ended that, it is told and not what became of the last lines."""
    try:
        writer.close()
    except RaytuneError as error:
        if failure is None:
            raise
        _log.warning("The last lines were not written: %s", error)


def _lines(path: str | Path, upload_every_s: float) -> "_LocalLines | _RemoteLines":
    return _LocalLines(local_path(path)) if is_local(path) else _RemoteLines(str(path), upload_every_s)


def _encode(record: Mapping[str, object]) -> bytes:
    return json.dumps(record, allow_nan=False, ensure_ascii=False).encode() + b"\n"


class _LocalLines:
    """Appends to a local file; a line is one write, so that readers and other writers never see half of one."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock, self._is_closed = path, threading.Lock(), False
        with local_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            # Half a line is what a killed writer left; the next line must not continue it.
            os.ftruncate(self._descriptor, path.read_bytes().rfind(b"\n") + 1)

    def add(self, record: Mapping[str, object]) -> None:
        line = _encode(record)
        with self._lock, local_errors(self._path):
            if self._is_closed:  # its number may be that of another file by now
                with open(self._path, "ab", buffering=0) as file:
                    file.write(line)
                return
            while line:  # more than one write only where the disk is full, and then the second one says so
                line = line[os.write(self._descriptor, line) :]

    def flush(self) -> None:
        with self._lock:
            if not self._is_closed:
                with local_errors(self._path):
                    os.fsync(self._descriptor)

    def close(self) -> None:
        try:
            self.flush()
        finally:
            with self._lock:
                if not self._is_closed:
                    self._is_closed = True
                    os.close(self._descriptor)


class _RemoteLines:
    """Gathers lines, and a thread that adds them to what the object holds by then.

    Two writers keep each other's lines unless they upload in the same fraction of a second: an object store cannot append, and
    not every one can refuse to overwrite.
    """

    def __init__(self, path: str, upload_every_s: float) -> None:
        self._path, self._every_s = path, upload_every_s
        self._pending = bytearray()
        self._adding, self._uploading = threading.Lock(), threading.Lock()
        self._closed = threading.Event()
        threading.Thread(target=self._upload_for_ever, name=f"upload {path}", daemon=True).start()

    def add(self, record: Mapping[str, object]) -> None:
        with self._adding:
            self._pending += _encode(record)
        if self._closed.is_set():
            self.flush()  # nobody else will

    def flush(self) -> None:
        with self._uploading:
            with self._adding:
                lines = bytes(self._pending)
            if not lines:
                return
            content = read_bytes(self._path) if exists(self._path) else b""
            write_bytes(self._path, content[: content.rfind(b"\n") + 1] + lines)
            with self._adding:
                del self._pending[: len(lines)]

    def close(self) -> None:
        self._closed.set()
        self.flush()

    def _upload_for_ever(self) -> None:
        is_away = False
        while not self._closed.wait(self._every_s):
            try:
                with once():
                    self.flush()
            except RaytuneError as error:  # the lines are kept, and the next turn or `close` tries again
                if not is_away:
                    _log.warning("Lines of %s wait until the storage answers again: %s", shown(self._path), error)
                is_away = True
            else:
                if is_away:
                    _log.warning("The lines of %s that waited have arrived.", shown(self._path))
                is_away = False
