"""Pack documents into rows of at most `row_length` tokens. Pure: lengths in, row contents out.

Rows come in the order of their first document and list their documents in order, so that the first rows hold (roughly) the
first documents rather than the longest ones.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Literal

import numpy as np

from raytune.errors import DataError

Packing = Literal["best_fit", "token_budget", "none"]


def pack(lengths: Sequence[int] | np.ndarray, row_length: int, packing: Packing, *, num_virtual: int = 0) -> list[list[int]]:
    """Assign documents to rows in one of the ways that `data.packing` names.

    Args:
        lengths: tokens per document, each in 1..row_length.
        row_length: capacity of a row, in tokens.
        num_virtual: virtual tokens in front of each document. A row holds as many more, so that the longest document fits with
            them, and those of all its documents count.

    Returns:
        For each row, the indices of its documents. Every index appears exactly once.

    Raises:
        DataError: if a document is longer than a row.
    """
    lengths = _checked(lengths, row_length)
    return PACKINGS[packing](lengths + num_virtual, row_length + num_virtual)


def pack_rows(lengths: Sequence[int] | np.ndarray, row_length: int) -> list[list[int]]:
    """Best fit decreasing (Johnson et al. 1974: at most 11/9 of the optimum, + 4 rows); see `pack`."""
    lengths = _checked(lengths, row_length)
    rows: list[list[int]] = []
    free_of_row: list[int] = []  # sorted, distinct: tokens that are free in at least one open row
    open_rows: list[list[int]] = [[] for _ in range(row_length + 1)]  # by free tokens
    shortest = int(lengths.min(initial=row_length))
    longest_first = np.argsort(-lengths, kind="stable")
    for document, length in zip(longest_first.tolist(), lengths[longest_first].tolist()):
        at = bisect_left(free_of_row, length)
        if at == len(free_of_row):
            row, free = len(rows), row_length
            rows.append([])
        else:
            free = free_of_row[at]
            row = open_rows[free].pop()
            if not open_rows[free]:
                del free_of_row[at]
        rows[row].append(document)
        free -= length
        if free >= shortest:  # otherwise the row is full
            if not open_rows[free]:
                insort(free_of_row, free)
            open_rows[free].append(row)
    return _in_order(rows, len(lengths))


def pack_by_length(lengths: Sequence[int] | np.ndarray, row_length: int) -> list[list[int]]:
    """Neighbours in length share a row until the next one would not fit; see `pack`."""
    lengths = _checked(lengths, row_length)
    rows: list[list[int]] = []
    used = row_length
    shortest_first = np.argsort(lengths, kind="stable")
    for document, length in zip(shortest_first.tolist(), lengths[shortest_first].tolist()):
        if used + length > row_length:
            rows.append([])
            used = 0
        rows[-1].append(document)
        used += length
    return _in_order(rows, len(lengths))


def pack_alone(lengths: Sequence[int] | np.ndarray, row_length: int) -> list[list[int]]:
    """A row per document; see `pack`."""
    return [[document] for document in range(len(_checked(lengths, row_length)))]


PACKINGS = {"best_fit": pack_rows, "token_budget": pack_by_length, "none": pack_alone}


def _checked(lengths: Sequence[int] | np.ndarray, row_length: int) -> np.ndarray:
    lengths = np.asarray(lengths, dtype=np.int64)
    assert lengths.min(initial=1) >= 1, "an empty document never reaches packing"
    longest = int(lengths.max(initial=0))
    if longest > row_length:
        raise DataError(
            f"A document has {longest} tokens but rows hold {row_length}. "
            f"Raise data.max_length, or set data.too_long to 'truncate', 'split' or 'drop'."
        )
    return lengths


def _in_order(rows: list[list[int]], num_documents: int) -> list[list[int]]:
    for row in rows:
        row.sort()
    rows.sort()
    assert sum(map(len, rows)) == num_documents
    return rows
