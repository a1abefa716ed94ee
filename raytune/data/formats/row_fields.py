"""The fields of a format in one row: the column or the path that holds each of them, and what is there."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

from raytune.data.conversations.conversation import RowError, kind_of
from raytune.data.conversations.strict_json import strict_json
from raytune.data.conversations.turns import from_json, is_empty

_MISSING = object()
_MOST_LISTED = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapped:
    """Where a config says that fields are."""

    columns: Mapping[str, str]
    """Field -> its column, or the path to it."""
    constants: Mapping[str, str]
    """Field -> what it is in every row."""

    @property
    def fields(self) -> set[str]:
        return {*self.columns, *self.constants}


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFields:
    row: Mapping[str, Any]
    spellings: Mapping[str, tuple[str, ...]]
    """Field of the format -> names of columns that are taken for it, in small letters."""
    mapped: Mapped
    labels: Mapping[str, str]
    """What a row calls a label -> what is trained."""

    def place(self, field: str) -> str:
        """Column or path of a field: where the config maps it, else the column of its name, else one of another name for it.

        Raises:
            RowError: if several columns of other names may be it.
        """
        if field in self.mapped.columns:
            return self.mapped.columns[field]
        there = columns_for(self.row, self.spellings[field])
        if field in there or not there:
            return field
        full = [name for name in there if not is_empty(self.row[name])]
        if len(full) > 1:
            raise RowError(
                f"has {listed(full)}, each of which may be its '{field}': say which with `columns`, for example "
                f"`columns: {{{field}: {full[0]}}}`"
            )
        return (full or there)[0]

    def value(self, field: str) -> Any:
        """What a field holds; null if it is not there."""
        if field in self.mapped.constants:
            return self.mapped.constants[field]
        value = found_in(self.row, self.place(field))
        return None if value is _MISSING else value

    def present(self, field: str) -> Any:
        """What a field holds.

        Raises:
            RowError: if it is not there, or null.
        """
        value = self.value(field)
        if value is not None:
            return value
        place = self.place(field)
        if is_missing(found_in(self.row, place)):
            raise RowError(f"has no '{place}', only {listed(self.row)}")
        raise RowError(f"'{place}' is null")

    def text(self, field: str) -> str:
        return self._as_text(field, self.present(field))

    def optional_text(self, field: str) -> str:
        value = self.value(field)
        return "" if value is None else self._as_text(field, value)

    def _as_text(self, field: str, value: Any) -> str:
        if not isinstance(value, str):
            quoted = f"; write it in quotes: {json.dumps(json.dumps(value))}" if isinstance(value, int | float) else ""
            raise RowError(f"'{self.place(field)}' is {kind_of(value)}, expected text{quoted}")
        return value

    def optional_list(self, field: str) -> list[Any] | None:
        """A list, or one as JSON in a text; None if there is none."""
        value = self.value(field)
        if isinstance(value, str):
            value = from_json(value, self.place(field)) if value.strip() else None
        if value is not None and not isinstance(value, list):
            raise RowError(f"'{self.place(field)}' is {kind_of(value)}, expected a list")
        return value

    def read_places(self) -> set[str]:
        """Columns and paths that the format reads."""
        return {self.place(field) for field in self.spellings if field not in self.mapped.constants}


def columns_for(row: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str, ...]:
    """Columns of a row that have one of some names, in whichever letters."""
    return _named(tuple(row), names)


@lru_cache(maxsize=1024)
def _named(columns: tuple[str, ...], names: tuple[str, ...]) -> tuple[str, ...]:
    """Rows of a file have the same columns, or few sets of them."""
    return tuple(column for column in columns if column.lower() in names)


def found_in(row: Mapping[str, Any], place: str) -> Any:
    """What stands in a column of this name, else at this path: keys of objects and positions in lists, with dots between them.
    An object that is JSON in a text is one. `is_missing` tells what was not found."""
    if place in row or "." not in place:
        return row.get(place, _MISSING)
    value: Any = row
    for part in place.split("."):
        value = _step(value, part)
        if value is _MISSING:
            break
    return value


def is_missing(value: Any) -> bool:
    return value is _MISSING


def _step(value: Any, part: str) -> Any:
    value = _opened(value)
    if isinstance(value, Mapping):
        return value.get(part, _MISSING)
    if isinstance(value, list) and part.isdecimal() and int(part) < len(value):
        return value[int(part)]
    return _MISSING


def _opened(value: Any) -> Any:
    """A value, or what it holds if it is an object or a list as JSON in a text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return strict_json(value)
        except ValueError:
            return value
    return value


def unread_in(row: Mapping[str, Any], places: set[str]) -> Iterator[str]:
    """Columns with something in them that are none of the places, and what lies in the objects through which a place is reached
    and is not that place."""
    paths = {place for place in places if "." in place and place not in row}
    return _unread(row, "", paths, places)


def _unread(value: Any, prefix: str, paths: set[str], columns: set[str]) -> Iterator[str]:
    for key, inner in _children(value):
        place = f"{prefix}{key}"
        if key in columns or place in paths or is_empty(inner):
            continue
        if paths and any(path.startswith(f"{place}.") for path in paths):
            yield from _unread(_opened(inner), f"{place}.", paths, set())
        else:
            yield place


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return iter(value.items())
    return ((str(index), inner) for index, inner in enumerate(value)) if isinstance(value, list) else iter(())


def listed(names: Sequence[str] | Mapping[str, Any] | set[str]) -> str:
    more = f", and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(f"'{name}'" for name in islice(names, _MOST_LISTED)) + more or "none"
