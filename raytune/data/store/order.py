"""Which rows a step sees: a function of (seed, step, rank), not a state. Resuming on any world size needs the step number alone.

Each epoch visits all rows once, in the order of a keyed permutation (a Feistel network; values outside the range are sent round
again, "cycle walking": Black and Rogaway 2002). Nothing is stored or shuffled.
"""

import hashlib
import math
import struct
from functools import lru_cache
from typing import Any

import numpy as np

_NUM_ROUNDS = 8
_MASK_64 = 2**64 - 1


def row_at(position: int, num_rows: int, seed: int) -> int:
    """The row at `position`, which counts rows over all epochs: epoch 0 is positions 0..num_rows-1, and so on."""
    epoch, place = divmod(position, num_rows)
    sides, keys = _sides(num_rows), _round_keys(seed, epoch)
    row = _feistel(place, sides, keys)
    while row >= num_rows:
        row = _feistel(row, sides, keys)
    return row


def rows_at(positions: np.ndarray, num_rows: int, seed: int) -> np.ndarray:
    """`row_at` of many positions at once, as int64."""
    positions = positions.astype(np.int64)
    rows = np.empty(len(positions), np.int64)
    sides = _sides(num_rows)
    epochs = positions // num_rows
    for epoch in np.unique(epochs):
        keys = _round_keys(seed, int(epoch))
        in_epoch = epochs == epoch
        shuffled = _feistel((positions[in_epoch] % num_rows).astype(np.uint64), sides, keys)
        while (outside := shuffled >= num_rows).any():
            shuffled[outside] = _feistel(shuffled[outside], sides, keys)
        rows[in_epoch] = shuffled.astype(np.int64)
    return rows


def positions_of_step(step: int, global_batch_size: int) -> np.ndarray:
    """Positions of the global batch of a step (counted from 0); they do not depend on how the batch is divided."""
    return np.arange(step * global_batch_size, (step + 1) * global_batch_size, dtype=np.int64)


def share_of_rank(*, micro_step: int, rank: int, world: int, micro_batch_size: int) -> slice:
    """Where this rank's rows of one forward pass lie in the step's global batch, which the shares of all tile."""
    first = (micro_step * world + rank) * micro_batch_size
    return slice(first, first + micro_batch_size)


def _feistel(value: Any, sides: tuple[int, int], keys: tuple[int, ...]) -> Any:
    """Permute 0..left*right-1, one int or a uint64 array: two digits take turns at being shifted by a hash of the other."""
    left_side, right_side = sides
    left, right = value // right_side, value % right_side
    for key_left, key_right in zip(keys[::2], keys[1::2], strict=True):
        left = (left + _mixed(right ^ key_left) % left_side) % left_side
        right = (right + _mixed(left ^ key_right) % right_side) % right_side
    return left * right_side + right


def _mixed(value: Any) -> Any:
    """The finaliser of splitmix64 (Steele et al. 2014): every bit of the input reaches every bit of the output."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)


@lru_cache(maxsize=256)
def _sides(num_rows: int) -> tuple[int, int]:
    """Two sides of nearly equal length whose product is at least `num_rows`, so that few values walk."""
    left = math.isqrt(num_rows - 1) + 1
    return left, -(-num_rows // left)


@lru_cache(maxsize=256)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    stream = hashlib.shake_128(f"raytune order {seed} {epoch}".encode()).digest(8 * _NUM_ROUNDS)
    return struct.unpack(f"<{_NUM_ROUNDS}Q", stream)
