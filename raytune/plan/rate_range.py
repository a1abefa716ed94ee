"""The learning-rate range test (Smith 2017, "Cyclical Learning Rates for Training Neural Networks") as arithmetic: which rate a step
has, what its losses are when they are smoothed, and when to stop. Pure: the losses so far are an argument.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

from raytune.errors import UserError
from raytune.plan.value import Plan

Shape = Literal["exponential", "linear"]
SHAPES: tuple[Shape, ...] = get_args(Shape)
Stop = Literal["exploded", "not finite"]

FEWEST_STEPS = 20
"""Of which smoothing leaves something to be seen."""


class RateRange(Plan):
    """What is tried: a rate per step, from `low` at the first to `high` at the last."""

    low: float
    high: float
    num_steps: int
    shape: Shape = "exponential"
    smoothing: float = 0.9
    """Share of the average so far in the next one; 0: losses as they are."""
    stop_factor: float = 4.0
    """The test ends where the smoothed loss is more than so many times its lowest value."""

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0: equal factors from step to step, or with `linear` equal differences."""
        if step in (0, self.num_steps - 1):
            return self.high if step else self.low
        share = step / (self.num_steps - 1)
        if self.shape == "linear":
            return self.low + (self.high - self.low) * share
        return self.low * (self.high / self.low) ** share

    def step_of(self, rate: float) -> float:
        """Where in the test a rate lies, in steps; the inverse of `rate`."""
        if self.shape == "linear":
            share = (rate - self.low) / (self.high - self.low)
        else:
            share = math.log(rate / self.low) / math.log(self.high / self.low)
        return share * (self.num_steps - 1)


def checked(tried: RateRange) -> RateRange:
    """`tried`, if it can be tried.

    Raises:
        UserError: naming the option that says something else.
    """
    if not (math.isfinite(tried.low) and tried.low > 0):
        raise UserError(f"--low is {tried.low:g}, expected a learning rate above 0.")
    if not (math.isfinite(tried.high) and tried.high > tried.low):
        raise UserError(f"--high is {tried.high:g} and --low {tried.low:g}, expected a learning rate above that of --low.")
    if tried.num_steps < FEWEST_STEPS:
        raise UserError(f"--steps is {tried.num_steps}, expected at least {FEWEST_STEPS}: fewer show no curve.")
    if not 0 <= tried.smoothing < 1:
        raise UserError(f"--smoothing is {tried.smoothing:g}, expected a share from 0 to below 1.")
    if not (math.isfinite(tried.stop_factor) and tried.stop_factor > 1):
        raise UserError(f"--stop-factor is {tried.stop_factor:g}, expected a factor above 1.")
    return tried


def smoothed(losses: Sequence[float], smoothing: float) -> list[float]:
    """Exponential moving averages, each divided by the sum of its weights, so that the first ones are not drawn to 0."""
    average, averages = 0.0, []
    for count, loss in enumerate(losses, 1):
        average = smoothing * average + (1 - smoothing) * loss
        averages.append(average / (1 - smoothing**count))
    return averages


def reason_to_stop(losses: Sequence[float], tried: RateRange) -> Stop | None:
    """Why the test ends after these losses, of which only the last is news; None: it goes on."""
    if not losses:
        return None
    if not math.isfinite(losses[-1]):
        return "not finite"
    averages = smoothed(losses, tried.smoothing)
    return "exploded" if averages[-1] > tried.stop_factor * min(averages) else None
