"""How far a difference between two models could be chance: a paired bootstrap over rows (Efron 1979; Koehn 2004). Pure."""

from collections.abc import Callable

import numpy as np

NUM_DRAWS = 2000
CONFIDENCE = 0.95
_AT_ONCE = 100
"""Draws that are made together, so that many rows fit into memory."""


def difference_interval(
    before: np.ndarray, after: np.ndarray, value: Callable[[np.ndarray], np.ndarray], *, seed: int = 0
) -> tuple[float, float]:
    """Where the difference between two models lies with a probability of 95 %, rows being drawn by chance.

    The same rows are drawn for both. By the percentiles of the differences.

    Args:
        before, after: what each row adds to the metric of each model, (N, K).
        value: the metric of sums over rows, (..., K) to (...).
    """
    num_rows = len(before)
    random = np.random.default_rng(seed)
    differences = []
    for _ in range(0, NUM_DRAWS, _AT_ONCE):
        times = random.multinomial(num_rows, np.full(num_rows, 1 / num_rows), size=_AT_ONCE)  # (draws, N)
        with np.errstate(invalid="ignore"):  # of a loss that is infinite nothing can be said
            differences.append(value(times @ after) - value(times @ before))
    outside = (1 - CONFIDENCE) / 2
    with np.errstate(invalid="ignore"):
        low, high = np.quantile(np.concatenate(differences), [outside, 1 - outside])
    return float(low), float(high)
