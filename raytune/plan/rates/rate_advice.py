"""What a learning-rate range test says: a rate, or why its curve names none. Pure: the losses are an argument.

Two rates are named. The steepest: where the smoothed loss falls fastest along the range; it lags behind the rate, as does what a
rate does to a model. The safe one: a tenth of the rate at which the loss, smoothed without a lag, is lowest, and never more
than the steepest. Neither is named where the curve
could not show it: an end of the range is no answer.
"""

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from raytune.plan.rates.rate_range import RateRange, Stop, reason_to_stop, smoothed, two_digits
from raytune.plan.value import Plan

Verdict = Literal["found", "flat", "only rises", "still falling", "exploded at once"]

OPENING = 0.1
"""Share of the steps whose mean is the loss that the test begins with."""
FEWEST_LOSSES = 10
CERTAIN = 4.0
"""A fall counts from so many standard errors of it on."""
LEAST_FALL = 0.01
"""And from this share of the first loss on."""
LAST = 0.1
"""Share of the steps that are its end."""
STILL = 0.05
"""The loss still falls if the end brings at least this share of the whole fall, half of what an even fall brings there."""
SAFE_SHARE = 0.1


class RateAdvice(Plan):
    """What the curve says. Rates have two digits, which is more than it knows."""

    verdict: Verdict
    words: str
    """A sentence or two for people."""
    steepest: float | None = None
    """Where the loss falls fastest."""
    safe: float | None = None
    lowest: float | None = None
    """Rate at which the loss is lowest."""

    @property
    def is_found(self) -> bool:
        return self.verdict == "found"


def advise_rate(losses: Sequence[float], tried: RateRange) -> RateAdvice:
    """What the losses of a range test say, each of the step with `tried.rate(step)`; the last may not be finite."""
    stop = reason_to_stop(losses, tried)
    finite = [loss for loss in losses if math.isfinite(loss)]
    if len(finite) < FEWEST_LOSSES:
        reached = tried.rate(max(0, len(losses) - 1))
        return RateAdvice(
            verdict="exploded at once",
            words=f"The loss {_ended(stop)} within {len(losses)} steps, at {reached:.2g}: no curve to read. Begin lower (--low).",
        )
    opening = opening_of(finite)
    first = statistics.fmean(finite[:opening])
    curve = trend(finite, tried.smoothing)
    lowest = min(range(len(curve)), key=curve.__getitem__)
    noise = noise_of(finite[: max(lowest + 1, 2 * opening)])
    # Of the mean of the opening and of the lowest value of the curve, whose weights are those of two averages that meet.
    error = noise * math.sqrt(1 / opening + (1 - tried.smoothing) / (1 + tried.smoothing) / 2)
    enough = max(CERTAIN * error, LEAST_FALL * abs(first))
    fall = first - curve[lowest]
    if fall < enough:
        return _without_fall(finite, tried, stop, first, enough)
    last = max(1, round(LAST * len(curve)))
    if stop is None and lowest >= len(curve) - last and curve[-1 - last] - curve[-1] > STILL * fall:
        return RateAdvice(
            verdict="still falling",
            words=f"The loss was still falling at the end of the range, {tried.high:.2g}: the best rate lies above it. "
            f"Go on further (--high {max(10 * tried.high, min(1000 * tried.high, 10.0)):.2g}).",
        )
    ceiling = max(finite[:opening])
    steepest = _steepest(smoothed([min(loss, ceiling) for loss in finite], tried.smoothing), opening, last)
    if steepest is None:
        return RateAdvice(
            verdict="exploded at once",
            words=f"The loss fell from the first rate on, and was lowest at {tried.rate(lowest):.2g} already: the range "
            f"begins too high. Begin lower (--low {tried.low / 1000:.2g}).",
        )
    at_steepest, at_lowest = tried.rate(steepest), tried.rate(lowest)
    safe = max(tried.low, min(at_steepest, SAFE_SHARE * at_lowest))
    return RateAdvice(
        verdict="found",
        words=f"The loss fell from {first:.4g} to {curve[lowest]:.4g}, fastest near {at_steepest:.2g}, and was lowest near "
        f"{at_lowest:.2g}{'' if stop is None else f'; it {_ended(stop)} at {tried.rate(len(losses) - 1):.2g}'}.",
        steepest=two_digits(at_steepest),
        safe=two_digits(safe),
        lowest=two_digits(at_lowest),
    )


def opening_of(losses: Sequence[float]) -> int:
    """How many of the losses, from the first, are what the test begins with."""
    return max(3, round(OPENING * len(losses)))


def trend(losses: Sequence[float], smoothing: float) -> list[float]:
    """The losses, smoothed from both sides, so that the curve does not lag behind the rate as a moving average does.

    What is above all losses of the opening counts no more than the highest of these: an explosion does not reach back.
    """
    ceiling = max(losses[: opening_of(losses)])
    capped = [min(loss, ceiling) for loss in losses]
    forward, backward = smoothed(capped, smoothing), smoothed(capped[::-1], smoothing)[::-1]
    return [(before + after) / 2 for before, after in zip(forward, backward, strict=True)]


def noise_of(losses: Sequence[float]) -> float:
    """Standard deviation of a loss around its trend, told from neighbours: a median, which a few jumps do not move."""
    steps = [abs(after - before) for before, after in pairwise(losses)]
    return 1.4826 * statistics.median(steps) / math.sqrt(2)


def _steepest(curve: Sequence[float], first: int, width: int) -> int | None:
    """The step around which the curve falls most over `width` steps before its lowest; None if that lies in the opening."""
    half, lowest = max(1, width // 2), min(range(len(curve)), key=curve.__getitem__)
    middles = range(max(half, first), lowest - half + 1)
    if not middles:
        return None
    return max(middles, key=lambda step: curve[step - half] - curve[step + half])


def _without_fall(losses: Sequence[float], tried: RateRange, stop: Stop | None, first: float, enough: float) -> RateAdvice:
    if stop is None and max(smoothed(losses, tried.smoothing)) <= first + enough:
        return RateAdvice(
            verdict="flat",
            words=f"The loss stayed near {first:.4g} from {tried.low:.2g} to {tried.high:.2g}: no rate moved it by more "
            f"than it differs from batch to batch. Go on further (--high), or take larger batches (training.global_batch_size).",
        )
    end = "grew" if stop is None else _ended(stop)
    return RateAdvice(
        verdict="only rises",
        words=f"No rate made the loss fall below {first:.4g} by more than it differs from batch to batch, and at "
        f"{tried.rate(len(losses) - 1):.2g} it {end}. Begin lower (--low), take more steps (--steps) or larger batches "
        f"(training.global_batch_size); or the base knows these rows already.",
    )


def _ended(stop: Stop | None) -> str:
    return "was no longer finite" if stop == "not finite" else "exploded"
