"""The borders of a split that follow from the rows: by strata or by time. All rows are looked at once, and none is kept.

Eight bytes per row are held until the borders are known.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from raytune.config.sections.data import DataSource
from raytune.config.sections.split import SplitSection
from raytune.data.conversations.conversation import Origin, RowError
from raytune.data.files.readers import BadRow, read_segment
from raytune.data.files.source_files import find_files
from raytune.data.files.sources import Segment, scan
from raytune.data.formats.origins import origin_of
from raytune.data.rows.shards import ParallelMap
from raytune.data.rows.split import HASHES, Bands, Kind, Split, place_of, position_of, split_by_hash, time_of
from raytune.data.store.place import local_stores
from raytune.errors import DataError
from raytune.plan.data.split import AskedSplit, StratumCount, split_in_words

MOST_STRATA = 10_000
_MOST_TASKS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    segments: tuple[Segment, ...]
    max_rows: int | None
    by: SplitSection


@dataclass(slots=True)
class _Seen:
    """Positions by stratum, the first place at which each kind of time was found, and that of a row that was made of another."""

    positions: dict[str, Any] = field(default_factory=dict)
    kinds: dict[Kind, str] = field(default_factory=dict)
    made: str | None = None


def measured(
    asked: AskedSplit, sources: Sequence[DataSource], folder: str | Path, parallel_map: ParallelMap = map
) -> tuple[Split, list[str]]:
    """The split of the rows of all sources together, and what it came to in words.

    Args:
        folder: of stores, which every process of `parallel_map` sees.

    Raises:
        DataError: if rows cannot be divided so.
    """
    if not asked.looks_first:
        return split_by_hash(asked), split_in_words(asked, [], {})
    with TemporaryDirectory(dir=local_stores(folder), prefix="draft-") as downloads:
        tasks = list(_tasks(sources, Path(downloads), asked.by))
        seen = _together(parallel_map(_look, tasks))
        _refuse_undivided(asked, seen, tasks)
    bands, counts = dict[str, Bands](), []
    for stratum, positions in sorted(seen.positions.items()):
        bands[stratum], count = _divided(asked, stratum, positions)
        counts.append(count)
    if not counts and seen.made:
        raise _without_origins(asked, seen.made)
    if not counts:  # no row can be used, which is told where they are read for good
        return Split(by=asked.by), []
    times = _times(asked, bands, seen) if asked.by.time is not None else {}
    _refuse_empty(asked, counts, seen)
    return Split(by=asked.by, bands=bands), split_in_words(asked, counts, times)


def _tasks(sources: Sequence[DataSource], downloads: Path, by: SplitSection) -> Iterator[_Task]:
    """Segments in tasks of similar size. A source of which only the first rows count is one task."""
    for source in sources:
        segments = [part for file in find_files(source, downloads) for part in scan(file, source.max_rows).segments]
        step = len(segments) if source.max_rows is not None else -(-len(segments) // _MOST_TASKS)
        for start in range(0, len(segments), max(1, step)):
            yield _Task(segments=tuple(segments[start : start + step]), max_rows=source.max_rows, by=by)


def _look(task: _Task) -> _Seen:
    """Where the rows of a task lie, without those that were made of others: whatever is made of rows, the same are held out.
    Rows that cannot be used are told of where they are read for good."""
    places: dict[str, list[float]] = {}
    seen = _Seen()
    for origin, values in _rows(task):
        try:
            if origin_of(values) is not None:
                seen.made = seen.made or str(origin)
                continue
            if task.by.time is not None:
                seen.kinds.setdefault(time_of(values, task.by.time)[0], str(origin))
            stratum, position = place_of(values, task.by)
        except RowError:
            continue
        places.setdefault(stratum, []).append(position)
        if len(places) > MOST_STRATA:
            break
    dtype = np.float64 if task.by.time is not None else np.uint64
    seen.positions = {stratum: np.array(positions, dtype) for stratum, positions in places.items()}
    return seen


def _rows(task: _Task) -> Iterator[tuple[Origin, Mapping[str, Any]]]:
    rows = ((segment.file.name, row) for segment in task.segments for row in read_segment(segment))
    for name, row in islice(rows, task.max_rows):
        if not isinstance(row, BadRow):
            yield Origin(name, row.line), row.values


def _together(parts: Iterable[_Seen]) -> _Seen:
    positions: dict[str, list[Any]] = {}
    together = _Seen()
    for part in parts:
        for stratum, own in part.positions.items():
            positions.setdefault(stratum, []).append(own)
        for kind, where in part.kinds.items():
            together.kinds.setdefault(kind, where)
        together.made = together.made or part.made
    together.positions = {stratum: np.concatenate(arrays) for stratum, arrays in positions.items()}
    return together


def _divided(asked: AskedSplit, stratum: str, positions: np.ndarray) -> tuple[Bands, StratumCount]:
    """Bands of a stratum, and its rows in each.

    Which side gets the row that a share cuts through is drawn by the stratum's name, so that many small strata have their share
    together.
    """
    places, sizes = np.unique(positions, return_counts=True)
    before = np.concatenate([[0], np.cumsum(sizes)])
    phase = Fraction(1, 2) if asked.by.time is not None else Fraction(position_of(f"stratum {stratum}"), HASHES)

    def edge(share: Fraction) -> int:
        """How many of the places lie before it."""
        wanted = float(share * int(before[-1]) + phase - Fraction(1, 2))
        nearest = int(np.searchsorted(before, wanted))
        nearest = min(nearest, len(places))
        return nearest - 1 if nearest and wanted - before[nearest - 1] < before[nearest] - wanted else nearest

    def position(number: int) -> float:
        if number == len(places):
            return HASHES if places.dtype == np.uint64 else float("inf")
        return places[number].item()

    bands, held_out = [], {}
    for side, (first, end) in asked.parts.items():
        low, high = (0 if not first else edge(first)), (len(places) if end == 1 else edge(end))
        held_out[side] = int(before[high] - before[low])
        if high > low:
            bands.append((side, position(low), position(high)))
    return tuple(bands), StratumCount(name=stratum, rows=int(before[-1]), held_out=held_out)


def _times(asked: AskedSplit, bands: Mapping[str, Bands], seen: _Seen) -> dict[str, str]:
    """From when to when the rows of each side are."""
    is_date = "a date" in seen.kinds
    found = dict.fromkeys(asked.parts, "none")
    (positions,) = seen.positions.values() or [np.empty(0)]
    for side, low, high in chain.from_iterable(bands.values()):
        own = -positions[(positions >= low) & (positions < high)]
        found[side] = f"from {_time(own.min(), is_date=is_date)} to {_time(own.max(), is_date=is_date)}"
    return found


def _time(value: float, *, is_date: bool) -> str:
    if not is_date:
        return f"{value:.15g}"
    moment = datetime.fromtimestamp(value, UTC).replace(tzinfo=None)
    return moment.date().isoformat() if moment == datetime.combine(moment.date(), datetime.min.time()) else moment.isoformat()


def _refuse_undivided(asked: AskedSplit, seen: _Seen, tasks: Sequence[_Task]) -> None:
    by = asked.by
    if len(seen.kinds) > 1:
        found = " and ".join(f"{kind} ({where})" for kind, where in seen.kinds.items())
        raise DataError(
            f"'{by.time}' is {found}, which cannot be compared. Write all of them in one way (data.split.time).",
            keys=("data.split.time",),
        )
    if len(seen.positions) > MOST_STRATA:
        raise DataError(
            f"'{by.strata}' has more than {MOST_STRATA:,} values: it is no label. Rows that share a value are kept on one side "
            f"by data.split.group; each row is divided by its own content without data.split.strata.",
            keys=("data.split.strata",),
        )
    if by.group is not None and by.strata is not None:
        groups = np.concatenate([np.unique(positions) for positions in seen.positions.values()] or [np.empty(0)])
        values, counts = np.unique(groups, return_counts=True)
        if (counts > 1).any():
            raise _of_two_strata(by, tasks, int(values[counts > 1][0]))


def _of_two_strata(by: SplitSection, tasks: Sequence[_Task], group: int) -> DataError:
    """What is wrong with a group whose rows have several strata: its first two rows that differ."""
    found: dict[str, Origin] = {}
    for origin, values in chain.from_iterable(map(_rows, tasks)):
        try:
            stratum, position = place_of(values, by)
        except RowError:
            continue
        if position == group:
            found.setdefault(stratum, origin)
        if len(found) > 1:
            break
    places = " and ".join(f"{name!r} ({origin})" for name, origin in found.items())
    return DataError(
        f"Rows that share a '{by.group}' have several values of '{by.strata}': {places}. They cannot lie on one side, and each "
        f"value have its share. Leave out data.split.strata, or data.split.group.",
        keys=("data.split.strata", "data.split.group"),
    )


def _without_origins(asked: AskedSplit, made: str) -> DataError:
    """What is wrong with a split of nothing but rows that were made of others."""
    key = "data.split.time" if asked.by.time is not None else "data.split.strata"
    return DataError(
        f"All training rows were made of others ({made} is the first), and {key} holds out a share of those others, which are "
        f"not here. List the rows that they were made of in data.train too, or leave out {key}.",
        keys=(key, "data.train"),
    )


def _refuse_empty(asked: AskedSplit, counts: Sequence[StratumCount], seen: _Seen) -> None:
    """Refuse a split that leaves a side without rows, where it is known why."""
    rows = sum(count.rows for count in counts)
    held_out = {side: sum(count.held_out.get(side, 0) for count in counts) for side in asked.parts}
    without = [side for side, count in held_out.items() if not count] + (["training"] if sum(held_out.values()) == rows else [])
    if not rows or not without:
        return
    key = "data.split.time" if asked.by.time is not None else "data.split.strata"
    if asked.by.time is not None:
        (positions,) = seen.positions.values()
        most = int(np.unique(positions, return_counts=True)[1].max())
        why = f"rows of the same '{asked.by.time}' lie on one side, and up to {most} of {rows} have the same"
    else:
        values = f"there are {rows} rows of {len(counts)} values"
        why = f"each value of '{asked.by.strata}' has its share to within a row, and {values}"
    raise DataError(f"The split leaves no row for {without[0]}: {why}. Hold out another share, or leave out {key}.", keys=(key,))
