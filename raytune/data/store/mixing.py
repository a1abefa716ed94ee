"""Which rows of a store an epoch has, in which order: a function of the position, and not a state. Pure.

A store has rows that every epoch has, and behind them those of sources of which an epoch has a part. Of R such rows in a fixed
order, epoch 0 has the first n, epoch 1 the next n, and so on round a circle: in the first k epochs each is seen k * n / R times,
rounded up or down. The order is shuffled, and such that any n that follow each other have their share of the targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from raytune.data.store.order import rows_at

_SHUFFLE = 0
"""Seed of the order in which parts are drawn."""
FEWEST_DRAWN = 16
"""Rows of a part that an epoch has, where there are so many documents; so that whole rows meet it within half a row of as many.
Packed rows of a small source hold fewer tokens for that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnRows:
    """Rows of a store of which each epoch has some."""

    first_row: int
    num_rows: int
    per_epoch: int


class EpochRows:
    """The rows of each epoch."""

    def __init__(self, num_fixed: int, drawn: Sequence[DrawnRows], num_targets_of_row: np.ndarray) -> None:
        """Args:
        num_fixed: rows that every epoch has, the first ones.
        num_targets_of_row: of all rows of the store.
        """
        self.num_rows = num_fixed + sum(part.per_epoch for part in drawn)
        """In an epoch; as many in each."""
        self._num_fixed, self._drawn, self._num_targets_of_row = num_fixed, drawn, num_targets_of_row

    def rows_at(self, positions: np.ndarray, seed: int) -> np.ndarray:
        """The rows at positions, which count rows over all epochs, as int64; see `order.row_at`."""
        places = rows_at(positions, self.num_rows, seed)
        if not self._drawn:
            return places
        epochs, first = positions.astype(np.int64) // self.num_rows, self._num_fixed
        rows = places.copy()
        for part, order in zip(self._drawn, self._orders, strict=True):
            taken = (places >= first) & (places < first + part.per_epoch)
            rows[taken] = order[(epochs[taken] * part.per_epoch + places[taken] - first) % part.num_rows]
            first += part.per_epoch
        return rows

    @cached_property
    def _orders(self) -> list[np.ndarray]:
        """The rows of each part in the order in which they are drawn."""
        ranges = [slice(part.first_row, part.first_row + part.num_rows) for part in self._drawn]
        return [rows.start + balanced_order(self._num_targets_of_row[rows]) for rows in ranges]


def balanced_order(numbers: np.ndarray) -> np.ndarray:
    """A shuffled order in which the sum of any k neighbours, on a circle, is k times the mean to within the largest number less
    the smallest.

    After numbers whose sum is above their share comes the next one that is below the mean, and the other way round: so sums
    of the first k stray from k times the mean by no more than one number does (Steinitz' lemma on a line).
    """
    shuffled = rows_at(np.arange(len(numbers)), len(numbers), _SHUFFLE) if len(numbers) else np.empty(0, np.int64)
    strays = numbers[shuffled] - numbers.mean() if len(numbers) else np.empty(0)
    above, below = shuffled[strays > 0], shuffled[strays <= 0]
    # One above comes when those before it have strayed up no further than those below have brought back: a merge of sorted sums.
    ups, downs = strays[strays > 0], -strays[strays <= 0]
    turns = np.concatenate([np.cumsum(ups) - ups, np.cumsum(downs) - downs])
    return np.concatenate([above, below])[np.argsort(turns, kind="stable")]
