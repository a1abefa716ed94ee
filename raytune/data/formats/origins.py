"""Rows that a model made of others (`raytune data reword`): which row each of them is of, and who made it, in own columns.

A made row lies where its origin does, whatever decides that, so it carries its origin whole: as the text that a hash is taken of.
Text survives every kind of file; a hash alone would not tell a group, a stratum or a time.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raytune.data.conversations.conversation import RowError, kind_of

ORIGIN = "raytune_origin"
"""Column with the origin of a made row: all of that row's columns, as `content_of` writes them."""
MADE_BY = "raytune_made_by"
"""Column with who made the row, for people: `model`, `ask`, the `row` that was asked about, and which `version` of it this is."""
OWN_COLUMNS = frozenset({ORIGIN, MADE_BY})
"""Columns that are no part of what a row says: no format reads them, and none misses that they are read."""


@dataclass(frozen=True, slots=True)
class RowOrigin:
    """The row that another was made of."""

    content: str
    values: Mapping[str, Any]


def content_of(row: Mapping[str, Any]) -> str:
    """All that a row says, in one way, whatever the order of its columns."""
    if not OWN_COLUMNS.isdisjoint(row):
        row = {name: value for name, value in row.items() if name not in OWN_COLUMNS}
    return json.dumps(row, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)


def origin_of(row: Mapping[str, Any]) -> RowOrigin | None:
    """What a row was made of; None: of no other.

    Raises:
        RowError: if it was made of one that it does not hold any more, so that nothing tells on which side it lies.
    """
    content = row.get(ORIGIN)
    if content is None or content == "":
        if row.get(MADE_BY):
            raise RowError(
                f"was made of another row ('{MADE_BY}'), but '{ORIGIN}' is {'missing' if ORIGIN not in row else 'empty'}, which "
                f"tells on which side of a split it lies: take the row as it was written"
            )
        return None
    try:
        values = json.loads(content) if isinstance(content, str) else content
    except (ValueError, RecursionError) as error:
        raise RowError(f"'{ORIGIN}' is damaged ({error}): take the row as it was written") from error
    if not isinstance(content, str) or not isinstance(values, dict):
        raise RowError(f"'{ORIGIN}' is {kind_of(values)}, expected a row as JSON in a text: take the row as it was written")
    return RowOrigin(content, values)


def maker_of(row: Mapping[str, Any]) -> str | None:
    """Who made a row, and of which, in words; None: it was made of none, or nobody says."""
    made_by = row.get(MADE_BY)
    if not made_by:
        return None
    if isinstance(made_by, Mapping) and {"model", "row"} <= made_by.keys():
        return f"{made_by['row']} by {made_by['model']}"
    return str(made_by)
