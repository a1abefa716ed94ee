"""metrics.jsonl and events.jsonl: what a run measured and what happened to it, one JSON object per line, and their typed reader.

Lines are only ever added. Every line of metrics.jsonl carries the number of the attempt that wrote it, and an attempt begins
with a line that says after which step it resumed. A reader therefore sees the *effective* history: steps that a dead attempt
trained beyond the checkpoint are gone, and so is what an orphaned process of that attempt still writes.

    {"attempt": 2, "time": 1764.2, "resumed_step": 100}
    {"attempt": 2, "time": 1766.9, "step": 101, "train/loss": 1.25, "train/learning_rate": 0.0002}

JSON has no word for not-a-number and infinity; they are the strings "NaN", "Infinity" and "-Infinity" here, floats in `History`.
"""

import json
import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from raytune.errors import RaytuneError, UserError
from raytune.storage import exists, is_local, local_errors, local_path, read_bytes, write_bytes

# An object store cannot append: the whole file is written again, at most this often. Events are few, and the last ones before
# a process dies tell most.
UPLOAD_METRICS_EVERY_S = 15.0
UPLOAD_EVENTS_EVERY_S = 1.0

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
        points: dict[int, Point] = {}
        attempt = 0
        for number, line in enumerate(data.split(b"\n")[:-1], start=1):
            try:
                record = json.loads(line)
                writer, when = int(record.pop("attempt")), float(record.pop("time"))
                begins = "resumed_step" in record
                step = int(record.pop("resumed_step" if begins else "step"))
                values = {name: decode_number(value) for name, value in record.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{path}:{number} is not a line of metrics ({error}). Was the file edited? Remove the line."
                ) from error
            if writer < attempt:
                continue
            attempt = writer
            if begins:
                points = {known: point for known, point in points.items() if known <= step}
            elif step in points:
                points[step] = Point(step=step, time=points[step].time, attempt=writer, values={**points[step].values, **values})
            else:
                points[step] = Point(step=step, time=when, attempt=writer, values=values)
        return cls(tuple(points[step] for step in sorted(points)))

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
        pairs = [
            (later.time - earlier.time) / (later.step - earlier.step)
            for earlier, later in zip(self.points, self.points[1:])
            if earlier.attempt == later.attempt
        ]
        return statistics.median(pairs[-num_intervals:]) if pairs else 0.0


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
    """Adds lines to an events file: starts, saves, failures. Threads may share it, and processes may write to the same file."""

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


def _lines(path: str | Path, upload_every_s: float) -> "_LocalLines | _RemoteLines":
    return _LocalLines(local_path(path)) if is_local(path) else _RemoteLines(str(path), upload_every_s)


def _encode(record: Mapping[str, object]) -> bytes:
    return json.dumps(record, allow_nan=False, ensure_ascii=False).encode() + b"\n"


class _LocalLines:
    """Appends to a local file; a line is one write, so that readers and other writers never see half of one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with local_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            # Half a line is what a killed writer left; the next line must not continue it.
            os.ftruncate(self._descriptor, path.read_bytes().rfind(b"\n") + 1)

    def add(self, record: Mapping[str, object]) -> None:
        line = _encode(record)
        with local_errors(self._path):
            while line:  # more than one write only where the disk is full, and then the second one says so
                line = line[os.write(self._descriptor, line) :]

    def flush(self) -> None:
        with local_errors(self._path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        self.flush()
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
        while not self._closed.wait(self._every_s):
            try:
                self.flush()
            except RaytuneError:
                continue  # the lines are kept, and the next turn or `close` tries again
