"""How long rows are: counts in buckets of tokens that are the same for all data, so that those of several add up. Pure.

Two buckets to an octave (1, 2, 3, 4, 6, 8, 12, 16, ...): any number of rows takes about sixty numbers at most, and a length that
is read off them is too high by less than half.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence

LONGEST = (1, *(tokens for octave in range(1, 40) for tokens in (2**octave, 3 * 2 ** (octave - 1))))
"""Most tokens of each bucket."""

_WIDTH = 24


def bucket_of(length: int) -> int:
    """The bucket that a number of tokens, 1 or more, falls into."""
    return bisect_left(LONGEST, length)


def added(histograms: Iterable[Sequence[int]]) -> list[int]:
    """Counts by bucket, of several."""
    total: list[int] = []
    for counts in histograms:
        total += [0] * (len(counts) - len(total))
        for bucket, count in enumerate(counts):
            total[bucket] += count
    return total


def length_of_share(counts: Sequence[int], share: float) -> int:
    """A number of tokens that at least this share of the rows has at most; 0 without rows."""
    wanted, seen = share * sum(counts), 0
    for bucket, count in enumerate(counts):
        seen += count
        if count and seen >= wanted:
            return LONGEST[bucket]
    return 0


def length_lines(counts: Sequence[int]) -> list[str]:
    """A line for each bucket from the shortest to the longest row: most tokens, rows, and a bar."""
    most, total = max(counts, default=0), sum(counts)
    filled = [bucket for bucket, count in enumerate(counts) if count]
    return [
        f"up to {LONGEST[bucket]:>7} {counts[bucket]:>9} {counts[bucket] / total:>6.1%} "
        f"{'#' * round(_WIDTH * counts[bucket] / most)}".rstrip()
        for bucket in (range(filled[0], filled[-1] + 1) if filled else ())
    ]
