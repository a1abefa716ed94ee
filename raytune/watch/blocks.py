"""Curves as characters, for any terminal. Pure."""

import math
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

BLOCKS = " ▁▂▃▄▅▆▇█"
NOT_A_NUMBER = "×"
LOGARITHMIC_FROM = 10.0


def sampled(values: Sequence[T], most: int) -> list[T]:
    """At most so many of the values, evenly spaced, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    if most == 1:
        return [values[-1]]
    return [values[round(at * (len(values) - 1) / (most - 1))] for at in range(most)]


def is_logarithmic(values: Sequence[float]) -> bool:
    """Whether equal factors are shown as equal heights: where what comes late would all lie on the ground otherwise."""
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) > LOGARITHMIC_FROM * min(finite)


def stretched(values: Sequence[T], width: int) -> list[T]:
    """So many of the values, evenly spaced; one comes more than once where there are fewer."""
    if len(values) < 2:
        return [value for value in values for _ in range(width)]
    return [values[round(at * (len(values) - 1) / max(1, width - 1))] for at in range(width)]


def spark(values: Sequence[float], width: int) -> str:
    """A curve on one line: low values low, and a cross for what is no number."""
    return chart(values, width, 1, lowest=1)[0]


def chart(values: Sequence[float], width: int, height: int, *, lowest: int = 0) -> list[str]:
    """A curve as so many lines of block characters, the upper one first; no wider than there are values.

    Args:
        lowest: eighths of a line that the smallest value is high.
    """
    shown = sampled(values, width)
    if is_logarithmic(shown):
        shown = [math.log(value) if math.isfinite(value) else value for value in shown]
    finite = [value for value in shown if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    span, eighths = high - low, 8 * height
    heights = [
        None if not math.isfinite(value) else lowest + round((eighths - lowest) * ((value - low) / span if span else 0.0))
        for value in shown
    ]
    return [
        "".join(
            (NOT_A_NUMBER if line == 0 else " ") if level is None else BLOCKS[min(8, max(0, level - 8 * line))]
            for level in heights
        )
        for line in reversed(range(height))
    ]
