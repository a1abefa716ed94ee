"""On which side of a split a row lies: a function of the row alone, and of borders that hold for all rows.

A row has a place: a stratum and a position in it. By default there is one stratum, and the position is a hash of the row's
content. Each side but training has a stretch of positions (`Bands`), so that equal rows always lie on one side, in whichever file
and order. Where borders follow from the rows, `borders` finds them. A row that was made of another has the place of that one.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any, Literal

from raytune.config.sections.split import SplitSection
from raytune.data.conversations.conversation import RowError, kind_of
from raytune.data.formats.origins import content_of, origin_of
from raytune.data.formats.row_fields import found_in, is_missing, listed
from raytune.plan.data.split import AskedSplit

Side = Literal["train", "validation", "test"]
Bands = tuple[tuple[str, float, float], ...]
"""Side, first position, and the first that is behind it."""
Kind = Literal["a date", "a number"]
"""Of a time."""

HASHES = 2**64
"""Positions of hashes are from 0 to below it."""
ALL = ""
"""The stratum of rows that have none of their own."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Where rows lie."""

    by: SplitSection = field(default_factory=SplitSection)
    bands: Mapping[str, Bands] = field(default_factory=dict)
    """By stratum. Rows that lie in none are trained."""

    @property
    def held_out_sides(self) -> tuple[Side, ...]:
        """Those that rows may lie on, besides training."""
        found: Any = dict.fromkeys(side for bands in self.bands.values() for side, _, _ in bands)
        return tuple(found)


EVERY_ROW_TRAINS = Split()


def split_by_hash(asked: AskedSplit) -> Split:
    """A split for which no row has to be looked at first."""
    assert not asked.looks_first, "borders.measured"
    bands = tuple((side, math.ceil(first * HASHES), math.ceil(end * HASHES)) for side, (first, end) in asked.parts.items())
    return Split(by=asked.by, bands={ALL: bands})


def side_of(row: Mapping[str, Any], split: Split) -> Side | Literal["nowhere"]:
    """The side of a row. A larger share keeps every row on a side that a smaller one had put there.

    What was made of a row that is held out lies nowhere: trained, it would tell of that row, and nothing made is measured.

    Raises:
        RowError: if it lacks what decides.
    """
    stratum, position = place_of(row, split.by)
    bands = split.bands.get(stratum, split.bands.get(ALL, ()))
    found: Any = next((side for side, first, end in bands if first <= position < end), "train")
    return "nowhere" if found != "train" and origin_of(row) is not None else found


def place_of(row: Mapping[str, Any], by: SplitSection) -> tuple[str, float]:
    """Stratum and position of a row.

    Raises:
        RowError: if it lacks what decides.
    """
    if (origin := origin_of(row)) is None:
        return _place(row, by)
    try:
        return _place(origin.values, by, origin.content)
    except RowError as error:
        raise RowError(f"the row that it was made of: {error}") from error


def _place(row: Mapping[str, Any], by: SplitSection, content: str | None = None) -> tuple[str, float]:
    """Args:
    content: of the row; None: it is what `content_of` makes of it.
    """
    if by.time is not None:
        return ALL, -time_of(row, by.time)[1]
    stratum = ALL if by.strata is None else text_of(row, by.strata, "data.split.strata")
    if by.group is not None:
        content = text_of(row, by.group, "data.split.group")
    return stratum, position_of(content_of(row) if content is None else content)


def position_of(content: str) -> int:
    """Of a hash."""
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big")


def text_of(row: Mapping[str, Any], column: str, key: str) -> str:
    """What a column holds, as text: the same for 1, 1.0 and "1", and for a date and its text, which files of several kinds have
    for one value.

    Args:
        key: of the config, that names the column.

    Raises:
        RowError: if there is nothing.
    """
    value = _present(row, column, key)
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise RowError(f"'{column}' is {value}, which is no value ({key})")
        value = int(value) if value.is_integer() else value
    if not isinstance(value, int | float | list | Mapping):
        return str(value)
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def time_of(row: Mapping[str, Any], column: str) -> tuple[Kind, float]:
    """A time as a number that grows: seconds since 1970 of a date, or the number that is there.

    Raises:
        RowError: if there is none, or it cannot be read.
    """
    key = "data.split.time"
    value = _present(row, column, key)
    if isinstance(value, datetime | date):
        return "a date", _seconds(value)
    if isinstance(value, str):
        text = value.strip()
        try:
            value = float(text)
        except ValueError:
            try:
                return "a date", _seconds(datetime.fromisoformat(text))
            except ValueError:
                raise RowError(
                    f"'{column}' is {value!r}, neither a date as in 2026-01-31 or 2026-01-31T09:30:00Z (ISO 8601) nor a number "
                    f"({key})"
                ) from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RowError(f"'{column}' is {value if isinstance(value, float) else kind_of(value)}, expected a time ({key})")
    return "a number", float(value)


def _seconds(value: date) -> float:
    """Since 1970, to the microsecond; a time without a zone is in UTC."""
    moment = value if isinstance(value, datetime) else datetime(value.year, value.month, value.day, tzinfo=UTC)
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return (moment - _EPOCH) // timedelta(microseconds=1) / 1e6


def _present(row: Mapping[str, Any], column: str, key: str) -> Any:
    value = found_in(row, column)
    if is_missing(value):
        raise RowError(f"has no '{column}', only {listed(row)} ({key})")
    if value is None or (isinstance(value, str) and not value.strip()):
        raise RowError(f"'{column}' is {'null' if value is None else 'empty'} ({key})")
    return value
