"""Training rows that are tokenised while they are trained on, window by window: nothing is written, and memory does not grow.

A window is the next so many rows of the files, in their order. Its documents are packed among themselves, and its packed rows
come in the order of a permutation keyed by seed and window: that order is a function of files, window and seed, whoever reads.
Behind the last file the first one begins again, in other orders.

Every rank reads the whole stream and takes its share of each step, so that no rank waits for another's rows. A position is a
small value: where a window begins in the files, and which packed row is its first.
"""

import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any, Self

import numpy as np

from raytune.config.data import DataSource, source_name
from raytune.config.model import NewToken
from raytune.data.augmenting import augmentation_of
from raytune.data.build import tokenising_options
from raytune.data.conversation import Conversation, Origin
from raytune.data.order import rows_at
from raytune.data.readers import ROWS_OF_LINES, BadRow, FileRow, Lines, read_segment
from raytune.data.recognising import Reading, reading_of
from raytune.data.row_file import packed_in_memory
from raytune.data.shaping import Shape
from raytune.data.shards import Tally, TokenisingOptions, bad_rows_error, in_report, resolved_too_long, too_long_error
from raytune.data.source_files import SourceFile, find_files
from raytune.data.source_rows import conversation_of, with_copies
from raytune.data.sources import unread_parts
from raytune.data.store import NUM_NAMED, PackedRow, PackedRows
from raytune.data.store_request import StoreRequest
from raytune.data.token_classes import token_classes
from raytune.data.tokenising import documents_of
from raytune.errors import DataError
from raytune.plan.data_limits import refuse_exceeded, verdicts_of
from raytune.plan.data_report import COUNTS, SourceReport, StoreReport
from raytune.plan.streaming import StreamPlan

_PASS_S = 0.2
"""How often a thread that waits looks whether it is still wanted."""
COUNTED = (*COUNTS, "passes")
"""Of what was read, that a position carries on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a stream is made of, and how."""

    request: StoreRequest
    """What a store of its rows would hold."""
    options: TokenisingOptions
    files: tuple[SourceFile, ...]
    plan: StreamPlan
    seed: int

    @property
    def source(self) -> DataSource:
        return self.plan.source

    @property
    def window(self) -> int:
        """Rows of files that are shuffled and packed among themselves."""
        return self.plan.window

    @classmethod
    def of(
        cls,
        stream: StreamPlan,
        *,
        template: str,
        row_length: int,
        tokenizer_path: str,
        tokenizer_revision: str | None,
        trust_remote_code: bool,
        new_tokens: Sequence[NewToken],
        seed: int,
    ) -> Self:
        """Raises:
        DataError: if its files are not here.
        """
        files = find_files(stream.source, Path())
        for file in files:
            if file.kind == "dataset" and not os.path.isdir(file.path):
                raise DataError(
                    f"data.streaming reads files, and {file.name} is a data set of a hub, which would be copied whole. Name its "
                    f"files in a folder that every node mounts, or leave data.streaming out.",
                    keys=("data.train", "data.streaming"),
                )
        request = _request_of(stream, template, row_length)
        options = tokenising_options(
            request,
            tokenizer_path=tokenizer_path,
            tokenizer_revision=tokenizer_revision,
            trust_remote_code=trust_remote_code,
            new_tokens=new_tokens,
        )
        return cls(request=request, options=options, files=tuple(files), plan=stream, seed=seed)


def _request_of(stream: StreamPlan, template: str, row_length: int) -> StoreRequest:
    return StoreRequest(
        sources=(stream.source,),
        template=template,
        shape=Shape(
            system=stream.system,
            system_when=stream.system_when,
            max_turns=stream.max_turns,
            reasoning=stream.reasoning,
        ),
        targets=stream.targets if isinstance(stream.targets, str) else tuple(stream.targets),
        train_empty_thought=stream.train_empty_thought,
        token_classes=token_classes(stream.token_weights),
        max_length=row_length,
        too_long=stream.too_long,
        packing=stream.packing,
        num_virtual=stream.num_virtual,
        on_bad_row=stream.on_bad_row,
        tokenizer_fingerprint=stream.tokenizer_fingerprint,
        augmentation=augmentation_of(stream.augment, stream.augment_code),
    )


@dataclass(frozen=True, slots=True)
class Place:
    """Between two rows of the files."""

    file: int = 0
    offset: int = 0
    """In a file with a row per line: bytes before it, as they were before they were compressed."""
    line: int = 1
    rows: int = 0
    """Of the file, before it."""
    taken: int = 0
    """Of the pass over all files, before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where a window begins."""

    window: int = 0
    first_row: int = 0
    """Packed rows before it, over all passes."""
    place: Place = Place()
    counts: Mapping[str, int] = field(default_factory=dict)
    """Of what was read before it, by the names of COUNTED that there is something of."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Self:
        return cls(**{**value, "place": Place(**value["place"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Packed rows, in the order that they are trained in."""

    position: Position
    after: Position
    rows: PackedRows
    tally: Tally


class Stream:
    """The rows of a stream by their number in it, as far as they are at hand: steps ask for them in order.

    A thread tokenises the next window while one is trained on.
    """

    def __init__(self, recipe: Recipe, position: Position | None = None) -> None:
        self._recipe, self._windows = recipe, deque[Window]()
        self._ready: Queue[Window | BaseException] = Queue(maxsize=1)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, args=(position or Position(),), name="stream", daemon=True)
        self._thread.start()

    def rows_at(self, positions: np.ndarray, seed: int) -> np.ndarray:
        """The rows at positions, which are their numbers; brings them here, and lets go of those before the first of them.

        Raises:
            DataError: if the files cannot be read on, or hold rows that stop the run.
        """
        assert seed == self._recipe.seed
        while not self._windows or positions[-1] >= self._windows[-1].after.first_row:
            self._windows.append(self._next())
        while positions[0] >= self._windows[0].after.first_row:
            self._windows.popleft()
        assert positions[0] >= self._windows[0].position.first_row, "steps come in order"
        return positions

    def position_of(self, row: int) -> Position:
        """The beginning of the window that has a row, which is at hand or the next one."""
        for window in self._windows:
            if window.position.first_row <= row < window.after.first_row:
                return window.position
        assert row == self._windows[-1].after.first_row
        return self._windows[-1].after

    @property
    def counts(self) -> Mapping[str, int]:
        """Of all that was read, with the windows that are at hand."""
        found = self._windows[-1].after.counts
        return {name: found.get(name, 0) for name in COUNTED}

    def row(self, index: int) -> PackedRow:
        window, place = self._find(index)
        return window.rows.row(place)

    def targets_of(self, rows: np.ndarray) -> np.ndarray:
        """Targets of each of some rows."""
        found = [self._find(row) for row in rows.tolist()]
        return np.array([window.rows.num_targets_of_row[place] for window, place in found], np.int64)

    def weights_of(self, rows: np.ndarray) -> np.ndarray | None:
        """Sum of the weights of the targets of each of some rows; None where every target weighs 1."""
        found = [self._find(row) for row in rows.tolist()]
        if all(window.rows.weight_of_row is None for window, _ in found):
            return None
        return np.array([_weight_of(window.rows, place) for window, place in found], np.float64)

    def named(self, rows: Iterable[int]) -> str:
        """Rows in words that a user finds them by."""
        return "; ".join(self._named(row) for row in rows)

    def close(self) -> None:
        """Read no further."""
        self._stopped.set()
        self._thread.join()

    def _named(self, row: int) -> str:
        if not self._windows or row < self._windows[0].position.first_row:
            return f"row {row} of the stream, which is no longer at hand"
        window, place = self._find(row)
        return f"row {row} of the stream ({', '.join(window.rows.origins(place)[:NUM_NAMED])})"

    def _find(self, row: int) -> tuple[Window, int]:
        window = next(one for one in self._windows if row < one.after.first_row)
        return window, row - window.position.first_row

    def _next(self) -> Window:
        while True:
            try:
                ready = self._ready.get(timeout=_PASS_S)
            except Empty:
                assert self._thread.is_alive(), "who reads ahead says why it ends"
                continue
            if isinstance(ready, BaseException):
                raise ready
            return ready

    def _check(self) -> None:
        if self._stopped.is_set():
            raise _Stopped

    def _read_ahead(self, position: Position) -> None:
        def put(ready: Window | BaseException) -> None:
            while not self._stopped.is_set():
                try:
                    return self._ready.put(ready, timeout=_PASS_S)
                except Full:
                    continue

        try:
            for window in windows_from(self._recipe, position, self._check):
                put(window)
        except _Stopped:
            pass
        except BaseException as error:  # whoever asks for the window is told
            put(error)


class _Stopped(Exception):
    """Nobody wants the rest."""


def windows_from(recipe: Recipe, position: Position, check: Callable[[], None] = lambda: None) -> Iterator[Window]:
    """The windows of a stream, without end, from one on.

    Args:
        check: called with each row; what it raises ends the reading.

    Raises:
        DataError: if the files cannot be read on, hold rows that stop the run, more than a limit of all that was read, or nothing
            that can be trained on.
    """
    request, reading = recipe.request, reading_of_stream(recipe)
    reader = _Reader(recipe, position.place)
    passes_without = 0
    while True:
        tally = Tally()
        rows = list(islice(reader, recipe.window))
        has_ended = len(rows) < recipe.window
        too_long = resolved_too_long(request.too_long, reading.format)
        conversations = _conversations(rows, recipe, reading, tally, check)
        documents = list(documents_of(conversations, recipe.options, too_long, tally))
        if tally.counts["bad"] and request.on_bad_row == "error":
            raise bad_rows_error(tally)
        if tally.counts["dropped"] and request.too_long == "error":
            raise too_long_error(tally, request.max_length)
        if has_ended:
            tally.counts["passes"] += 1
            reader = _Reader(recipe, Place())
        passes_without = 0 if documents else passes_without + has_ended
        if passes_without > 1:
            raise DataError(f"No row of {recipe.source.path} can be trained on: {_reasons(tally)}.", keys=("data.train",))
        counts = {name: count for name in COUNTED if (count := position.counts.get(name, 0) + tally.counts[name])}
        if not rows:  # the pass before has ended with a full window
            position = replace(position, place=reader.place, counts=counts)
            continue
        if not documents:
            position = replace(position, window=position.window + 1, place=reader.place, counts=counts)
            continue
        _refuse_exceeded(recipe, reading, counts, tally)
        packed = PackedRows(
            packed_in_memory(
                documents,
                request.max_length,
                request.packing,
                request.num_virtual,
                lambda num_rows, number=position.window: rows_at(
                    np.arange(number * num_rows, (number + 1) * num_rows), num_rows, recipe.seed
                ),
            ),
            [file.name for file in recipe.files],
        )
        after = Position(
            window=position.window + 1, first_row=position.first_row + packed.num_rows, place=reader.place, counts=counts
        )
        yield Window(position=position, after=after, rows=packed, tally=tally)
        position = after


def reading_of_stream(recipe: Recipe) -> Reading:
    """How its rows are read, by the first good one.

    Raises:
        DataError: if there is none among those of a window, or its format cannot be told.
    """
    tally = Tally()
    for number, row in islice(_Reader(recipe, Place()), recipe.window):
        if not isinstance(row, BadRow):
            return reading_of(recipe.source, row.values)
        tally.add("bad", Origin(recipe.files[number].name, row.line), row.reason)
    if tally.counts:
        raise bad_rows_error(tally)
    raise DataError(f"{recipe.source.path} has no rows.", keys=("data.train",))


def report_of(recipe: Recipe, reading: Reading, tally: Tally) -> SourceReport:
    """What a tally says became of rows."""
    return SourceReport(
        name=source_name(recipe.source),
        format=reading.format,
        too_long=resolved_too_long(recipe.request.too_long, reading.format),
        **in_report(tally, recipe.request.token_classes),
    )


def _refuse_exceeded(recipe: Recipe, reading: Reading, counts: Mapping[str, int], tally: Tally) -> None:
    """Hold all that was read against the limits.

    Args:
        tally: of the window that was read last, which has the examples.

    Raises:
        DataError: with each limit that is exceeded.
    """
    so_far = report_of(recipe, reading, replace(tally, counts=Counter(counts)))
    named = so_far.model_copy(update={"name": f"{so_far.name}, as far as it was read"})
    read = StoreReport(row_length=recipe.request.max_length, num_rows=0, sources=[named])
    refuse_exceeded(verdicts_of({"training": read}, recipe.plan))


def _conversations(
    rows: Sequence[tuple[int, FileRow | BadRow]],
    recipe: Recipe,
    reading: Reading,
    tally: Tally,
    check: Callable[[], None],
) -> Iterator[tuple[Conversation, int]]:
    for number, row in rows:
        check()
        if conversation := conversation_of(row, reading, recipe.files[number].name, tally):
            assert isinstance(row, FileRow)
            for one in with_copies(row, conversation, reading, recipe.request.augmentation, tally):
                yield one, number


def _weight_of(rows: PackedRows, place: int) -> float:
    weights = rows.num_targets_of_row if rows.weight_of_row is None else rows.weight_of_row
    return float(weights[place])


def _reasons(tally: Tally) -> str:
    words = {
        "bad": "are bad",
        "no_target": "have no target",
        "cut_off": "have none in reach",
        "dropped": "too long",
    }
    return f"of {tally.counts['rows']} rows " + ", ".join(f"{tally.counts[name]} {why}" for name, why in words.items())


class _Reader:
    """One pass over the rows of all files, bad ones included, each with the number of its file, from a place on."""

    def __init__(self, recipe: Recipe, place: Place) -> None:
        self._files, self._most = recipe.files, recipe.source.max_rows
        self.place = place
        """Behind the last row that was asked for."""
        self._rows = self._read()

    def __iter__(self) -> Iterator[tuple[int, FileRow | BadRow]]:
        return self._rows

    def _read(self) -> Iterator[tuple[int, FileRow | BadRow]]:
        while self.place.file < len(self._files):
            number, file = self.place.file, self._files[self.place.file]
            parts = unread_parts(file)
            rows = self._by_line(file, parts[0]) if file.kind in ROWS_OF_LINES and parts[0].stop else self._by_number(parts)
            for row in rows:
                yield number, row
                if self.place.taken == self._most:
                    return
            self.place = Place(file=number + 1, taken=self.place.taken)

    def _by_line(self, file: SourceFile, part: Any) -> Iterator[FileRow | BadRow]:
        lines = Lines(replace(part, start=self.place.offset, first_line=self.place.line))
        for row in ROWS_OF_LINES[file.kind](lines):
            self.place = replace(self._next(), offset=lines.at, line=lines.line)
            yield row

    def _by_number(self, parts: Sequence[Any]) -> Iterator[FileRow | BadRow]:
        before = self.place.rows
        first = max((index for index, part in enumerate(parts) if part.first_line - 1 <= before), default=0)
        skipped = before - (parts[first].first_line - 1)
        for row in islice(chain.from_iterable(read_segment(part) for part in parts[first:]), skipped, None):
            self.place = self._next()
            yield row

    def _next(self) -> Place:
        return replace(self.place, rows=self.place.rows + 1, taken=self.place.taken + 1)
