"""Which rows are equal, nearly so, or contradict each other: from numbers that stand for them. Pure, in memory of some
hundreds of bytes a row, and the same however the rows were divided among processes.

Rows are numbered in their order; the answer for a row is the number of another one, or -1.
"""

from collections.abc import Callable, Iterator

import numpy as np

_COMPARED = 4
"""Rows of the same bucket that each is compared with, besides the first one there."""
_PAIRS_AT_ONCE = 1 << 16

Similarity = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Of pairs of rows, between 0 and 1."""


def equal_to_earlier(digests: np.ndarray) -> np.ndarray:
    """For each row the first one with its digest, unless that is itself.

    Args:
        digests: uint64 of shape (rows, any).
    """
    first = _first_of_group(digests)
    return np.where(first == np.arange(len(digests)), -1, first)


def found_in(digests: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each row the first of other rows with its digest."""
    first = _first_of_group(np.concatenate([others, digests]))[len(others) :]
    return np.where(first < len(others), first, -1)


def contradicted(prompts: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """For each row the first one with its prompt and another answer.

    Args:
        prompts, answers: uint64 of each row; prompt 0 is none.
    """
    first = _first_of_group(prompts[:, None])
    differs = (answers != answers[first]) & (prompts != 0)
    other = np.full(len(prompts), len(prompts))
    np.minimum.at(other, first[differs], np.flatnonzero(differs))  # of each group, the first row that differs from its first
    found = np.where(differs, first, other[first])
    return np.where(found < len(prompts), found, -1)


def near_to_earlier(
    band: Callable[[int], np.ndarray], num_bands: int, num_rows: int, similarity: Similarity, least: float
) -> np.ndarray:
    """For each row an earlier one that is similar, and is itself similar to none that it could be left out for.

    Rows are compared that agree in a band: each with the first in its bucket and the four before it. Where similarity leads from
    row to row, the first one is kept, and each further one unless it is similar to one that is kept already.

    Args:
        band: uint64 of each row; one at a time, since all of them take 8 bytes a row each.
    """
    known = np.empty(0, np.int64)
    labels = np.arange(num_rows)
    for number in range(num_bands):
        pairs = np.setdiff1d(_pairs_in_buckets(band(number)), known, assume_unique=True)
        known = np.union1d(known, pairs)
        earlier, later = np.divmod(pairs, max(1, num_rows))
        are_near = _similarities(similarity, earlier, later) >= least
        labels = _united(labels, earlier[are_near], later[are_near])
    original = np.full(num_rows, -1)
    for members in _groups(labels):
        while len(members):
            kept, members = members[0], members[1:]
            are_near = _similarities(similarity, np.full(len(members), kept), members) >= least
            original[members[are_near]] = kept
            members = members[~are_near]
    return original


def near_in(
    bands: Callable[[int], tuple[np.ndarray, np.ndarray]], num_bands: int, num_rows: int, similarity: Similarity, least: float
) -> np.ndarray:
    """For each row one of other rows that is similar. Of those that agree in a band, the first four are compared.

    Args:
        bands: uint64 of each row, and of each other row.
        similarity: of pairs of (row, other row).
    """
    found = np.full(num_rows, -1)
    for number in range(num_bands):
        keys, other_keys = bands(number)
        order = np.argsort(other_keys, kind="stable")
        ordered, rows = other_keys[order], np.flatnonzero(found < 0)
        start, stop = (np.searchsorted(ordered, keys[rows], side) for side in ("left", "right"))
        for place in range(_COMPARED):
            here = (start + place < stop) & (found[rows] < 0)
            candidates = order[start[here] + place]
            are_near = _similarities(similarity, rows[here], candidates) >= least
            found[rows[here][are_near]] = candidates[are_near]
    return found


# --- Details -----------------------------------------------------------------------------------------------------------------


def _first_of_group(digests: np.ndarray) -> np.ndarray:
    """For each row the first one with its digest."""
    if not len(digests):
        return np.empty(0, np.int64)
    order = np.lexsort(digests.T)  # keeps equal ones in their order
    ordered = digests[order]
    begins = np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(axis=1)])
    first = np.empty(len(digests), np.int64)
    first[order] = order[begins][np.cumsum(begins) - 1]
    return first


def _pairs_in_buckets(keys: np.ndarray) -> np.ndarray:
    """Pairs of rows to compare, as earlier x rows + later, each once."""
    num_rows, order = len(keys), np.argsort(keys, kind="stable")
    ordered = keys[order]
    first = order[np.searchsorted(ordered, ordered)]
    pairs = [_as_numbers(first, order, first != order, num_rows)]
    for step in range(1, _COMPARED + 1):
        earlier, later = order[:-step], order[step:]
        pairs.append(_as_numbers(earlier, later, ordered[:-step] == ordered[step:], num_rows))
    return np.unique(np.concatenate(pairs))


def _as_numbers(earlier: np.ndarray, later: np.ndarray, wanted: np.ndarray, num_rows: int) -> np.ndarray:
    return earlier[wanted].astype(np.int64) * num_rows + later[wanted]


def _similarities(similarity: Similarity, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    starts = range(0, len(rows), _PAIRS_AT_ONCE)
    pieces = [similarity(rows[start : start + _PAIRS_AT_ONCE], others[start : start + _PAIRS_AT_ONCE]) for start in starts]
    return np.concatenate([*pieces, np.empty(0)])


def _united(labels: np.ndarray, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The lowest row that each is connected with, once some pairs are."""
    labels = labels.copy()
    while (apart := labels[rows] != labels[others]).any():
        rows, others = rows[apart], others[apart]
        lowest = np.minimum(labels[rows], labels[others])
        for ends in (labels[rows], labels[others]):
            np.minimum.at(labels, ends, lowest)
        while (labels[labels] != labels).any():
            labels = labels[labels]
    return labels


def _groups(labels: np.ndarray) -> Iterator[np.ndarray]:
    """The rows of each label that has several, in their order."""
    rows = np.flatnonzero(np.bincount(labels, minlength=len(labels))[labels] > 1)
    rows = rows[np.argsort(labels[rows], kind="stable")]
    starts = np.flatnonzero(np.diff(labels[rows], prepend=-1))
    yield from np.split(rows, starts[1:]) if len(rows) else ()
