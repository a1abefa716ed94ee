"""Which documents an epoch has, and how often. Pure.

A source that is passed over 2.3 times has each document twice, and a third time those of its first 0.3 in a shuffled order that
depends on nothing but their number. So every epoch has the same, no state is kept, and a larger share keeps what a smaller one
had.
"""

from collections.abc import Sequence

import numpy as np

from raytune.data.order import rows_at

_SHUFFLE = 0
"""Seed of the order in which documents are taken. Not the run's, or each seed would have a store of its own."""


def documents_of_passes(passes: Sequence[float], sources: np.ndarray, num_targets: np.ndarray) -> list[np.ndarray]:
    """The documents of each pass in their order; the first pass has most of them. None has a document twice.

    Args:
        passes: over each source.
        sources: of each document, a number into `passes`.
        num_targets: of each document, at least 1.
    """
    parts: list[list[np.ndarray]] = []
    for source, times in enumerate(passes):
        documents = np.flatnonzero(sources == source)
        taken = [documents] * int(times)
        rest = first_part(num_targets[documents], times - int(times))
        taken += [np.sort(documents[rest])] if len(rest) else []
        parts += [[] for _ in range(len(taken) - len(parts))]
        for number, one in enumerate(taken):
            parts[number].append(one)
    return [np.sort(np.concatenate(part)) for part in parts]


def first_part(num_targets: np.ndarray, share: float) -> np.ndarray:
    """Of documents in a shuffled order the first ones, whose share of all targets is nearest to `share`."""
    if not len(num_targets):
        return np.empty(0, np.int64)
    order = rows_at(np.arange(len(num_targets)), len(num_targets), _SHUFFLE)
    sums = np.concatenate([[0], np.cumsum(num_targets[order])])
    return order[: int(np.abs(sums - share * sums[-1]).argmin())]
