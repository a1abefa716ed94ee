"""Training rows that are tokenised while they are trained on, window by window: nothing is written, and memory does not grow.

A window is the next so many rows of the files, in their order. Its documents are packed among themselves, and its packed rows
come in the order of a permutation keyed by seed and window: that order is a function of files, window and seed, whoever reads.
Behind the last file the first one begins again, in other orders.

Several sources take turns of a few rows each: the next one is had by the source that has had the fewest targets for its
proportion, so that all of them have their parts of whatever was read, to within a turn.

Every rank reads the whole stream and takes its share of each step, so that no rank waits for another's rows. A position is a
small value: where a window begins in the files of each source, what was read of it, and which packed row is its first.
"""

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from queue import Empty, Full, Queue
from typing import Any, Self

import numpy as np

from raytune.config.sections.data import named_sources
from raytune.data.rows.shards import in_report, resolved_too_long
from raytune.data.store.order import rows_at
from raytune.data.store.row_file import packed_in_memory
from raytune.data.store.store import NUM_NAMED, PackedRow, PackedRows
from raytune.data.stream.recipe import Recipe
from raytune.data.stream.source import COUNTED, Place, SourceStream
from raytune.plan.data.data_limits import refuse_exceeded, verdicts_of
from raytune.plan.data.data_report import SourceReport, StoreReport

_PASS_S = 0.2
"""How often a thread that waits looks whether it is still wanted."""
_MOST_ROWS_PER_TURN = 256
_LEAST_TURNS = 16
"""Of each source in a window, in the mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where a window begins."""

    window: int = 0
    first_row: int = 0
    """Packed rows before it, over all passes."""
    places: tuple[Place, ...] = ()
    """In the files of each source; empty: the beginning of each."""
    counts: tuple[Mapping[str, int], ...] = ()
    """Of what was read of each source before it, by the names of COUNTED that there is something of; empty: nothing."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Self:
        return cls(**{**value, "places": tuple(Place(**place) for place in value["places"]), "counts": tuple(value["counts"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Packed rows, in the order that they are trained in."""

    position: Position
    after: Position
    rows: PackedRows
    reports: list[SourceReport]
    """Of what was read of each source for it."""


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
        """Of all that was read, with the windows that are at hand; passes of the source that has had the fewest."""
        sources = self._windows[-1].after.counts
        found = {name: sum(source.get(name, 0) for source in sources) for name in COUNTED}
        return found | {"passes": min(source.get("passes", 0) for source in sources)}

    @property
    def counts_by_source(self) -> dict[str, Mapping[str, int]]:
        """The same of each source, by its name."""
        return dict(zip(named_sources(self._recipe.sources), self._windows[-1].after.counts, strict=True))

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
        self._recipe.close()
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
            is_alive = self._thread.is_alive()  # asked first: behind the wait it may have said why it ends, and ended
            try:
                ready = self._ready.get(timeout=_PASS_S)
            except Empty:
                assert is_alive, "who reads ahead says why it ends"
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
        RaytuneError: if their storage fails.
    """
    request, num_sources = recipe.request, len(recipe.sources)
    places, counts = position.places or (Place(),) * num_sources, position.counts or ({},) * num_sources
    sources = [SourceStream(recipe, number, places[number], counts[number], check) for number in range(num_sources)]
    while True:
        for source in sources:
            source.begin_window()
        _read_window(sources, recipe)
        after = replace(
            position, places=tuple(source.place for source in sources), counts=tuple(source.counts for source in sources)
        )
        if not any(source.tally.counts["rows"] for source in sources):  # the pass before has ended with a full window
            position = after
            continue
        if not any(source.documents for source in sources):
            position = replace(after, window=position.window + 1)
            continue
        _refuse_exceeded(sources, recipe)
        documents = [(batch, weight) for source, weight in zip(sources, request.loss_weights) for batch in source.documents]
        packed = PackedRows(
            packed_in_memory(
                [batch for batch, _ in documents],
                [weight for _, weight in documents],
                request.max_length,
                request.packing,
                request.num_virtual,
                lambda num_rows, number=position.window: rows_at(
                    np.arange(number * num_rows, (number + 1) * num_rows), num_rows, recipe.seed
                ),
            ),
            recipe.file_names,
        )
        after = replace(after, window=position.window + 1, first_row=position.first_row + packed.num_rows)
        reports = [_report(source, source.tally.counts, recipe, name) for name, source in _named(sources, recipe)]
        yield Window(position=position, after=after, rows=packed, reports=reports)
        position = after


def _weight_of(rows: PackedRows, place: int) -> float:
    weights = rows.num_targets_of_row if rows.weight_of_row is None else rows.weight_of_row
    return float(weights[place])


def _read_window(sources: Sequence[SourceStream], recipe: Recipe) -> None:
    """Read the rows of a window."""
    if len(sources) == 1:  # the end of a pass ends a window too, so that one of all rows is an epoch of a store
        sources[0].take(recipe.window)
        return
    per_turn = rows_per_turn(recipe.window, len(sources))
    proportions = [source.proportion or 1.0 for source in recipe.sources]
    left = recipe.window
    while left:
        next_one = whose_turn([source.num_targets for source in sources], proportions)
        left -= sources[next_one].take(min(per_turn, left))


def rows_per_turn(window: int, num_sources: int) -> int:
    """Rows that a source has before another one may have its turn."""
    return max(1, min(_MOST_ROWS_PER_TURN, window // (_LEAST_TURNS * num_sources)))


def whose_turn(num_targets: Sequence[int], proportions: Sequence[float]) -> int:
    """The source that has had the fewest targets for its proportion; the first of several."""
    had = [number / proportion for number, proportion in zip(num_targets, proportions, strict=True)]
    return had.index(min(had))


def _named(sources: Sequence[SourceStream], recipe: Recipe) -> Iterator[tuple[str, SourceStream]]:
    return zip(named_sources(recipe.sources), sources, strict=True)


def _report(source: SourceStream, counts: Mapping[str, int], recipe: Recipe, name: str) -> SourceReport:
    """What became of rows of a source.

    Args:
        counts: of the rows; the examples are of those of the window that was read last.
    """
    return SourceReport(
        name=name,
        format=source.reading.format,
        too_long=resolved_too_long(recipe.request.too_long, source.reading.format),
        loss_weight=recipe.request.loss_weights[source.number],
        **in_report(replace(source.tally, counts=Counter(counts)), recipe.request.token_classes),
    )


def _refuse_exceeded(sources: Sequence[SourceStream], recipe: Recipe) -> None:
    """Hold all that was read against the limits.

    Raises:
        DataError: with each limit that is exceeded.
    """
    reports = [
        _report(source, source.counts, recipe, f"{name}, as far as it was read") for name, source in _named(sources, recipe)
    ]
    read = StoreReport(row_length=recipe.request.max_length, num_rows=0, sources=reports)
    refuse_exceeded(verdicts_of({"training": read}, recipe.plan))
