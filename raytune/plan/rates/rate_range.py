"""The learning-rate range test (Smith 2017, "Cyclical Learning Rates for Training Neural Networks") as arithmetic: which rate a
step has, what its losses are when they are smoothed, and when to stop. Pure: the losses so far are an argument.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from raytune.errors import UserError
from raytune.plan.value import Plan

Shape = Literal["exponential", "linear"]
SHAPES: tuple[Shape, ...] = get_args(Shape)
Stop = Literal["exploded", "not finite"]

FEWEST_STEPS = 20
"""Of which smoothing leaves something to be seen."""
USUAL_STEPS = 100
MOST_STEPS = 500
"""Above it a caution is said: 3,000 steps were seen to mislead, and what lies between was not measured."""
MOST_EPOCHS = 3.0
"""Passes over the rows above which one is said."""
FEW_LOSSES = 10
"""Of a loss that is not above 0, how many do not say what is large for it."""
BELOW, ABOVE = 1e-3, 1e2
"""Where a range begins and ends unless somebody says so, in usual rates of the method."""


class RateRange(Plan):
    """What is tried: a rate per step, from `low` at the first to `high` at the last."""

    low: float
    high: float
    num_steps: int
    shape: Shape = "exponential"
    smoothing: float = 0.9
    """Share of the average so far in the next one; 0: losses as they are."""
    stop_factor: float = 3.0
    """The test ends where the smoothed loss is more than so many times its lowest value; where that is not above 0, where it has
    risen by as much of its largest value."""

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0: equal factors from step to step, or with `linear` equal differences."""
        if step in (0, self.num_steps - 1):
            return self.high if step else self.low
        share = step / (self.num_steps - 1)
        if self.shape == "linear":
            return self.low + (self.high - self.low) * share
        return self.low * (self.high / self.low) ** share


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeOptions:
    """A range as it was asked for."""

    low: float | None = None
    high: float | None = None
    """None: from a thousandth to a hundred times the usual rate of the method."""
    num_steps: int = USUAL_STEPS
    shape: Shape = "exponential"
    smoothing: float = RateRange.model_fields["smoothing"].default
    stop_factor: float = RateRange.model_fields["stop_factor"].default

    def around(self, usual_rate: float) -> RateRange:
        """What is tried for a method whose usual rate is known.

        Raises:
            UserError: naming the option that cannot be tried.
        """
        return _checked(
            RateRange(
                low=two_digits(BELOW * usual_rate) if self.low is None else self.low,
                high=two_digits(ABOVE * usual_rate) if self.high is None else self.high,
                num_steps=self.num_steps,
                shape=self.shape,
                smoothing=self.smoothing,
                stop_factor=self.stop_factor,
            )
        )


def _checked(tried: RateRange) -> RateRange:
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


def two_digits(rate: float) -> float:
    """A rate as people write it, which is more than such a test knows."""
    return float(f"{rate:.1e}")


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
    return "exploded" if averages[-1] > _highest(averages, tried.stop_factor) else None


def _highest(averages: Sequence[float], factor: float) -> float:
    """Above which smoothed losses have exploded.

    A loss of the user's may be 0 or less, of which no multiple is above it: how far it may rise is then told from the largest
    that it has been, on either side of 0; and not from the first few, which may all be near 0.
    """
    lowest = min(averages)
    if lowest > 0:
        return factor * lowest
    return lowest + (factor - 1) * max(map(abs, averages[:-1])) if len(averages) > FEW_LOSSES else math.inf


def cautions(tried: RateRange, *, num_epochs: float, num_steps_of_run: int) -> tuple[str, ...]:
    """Why the curve of a test may mislead, in sentences; known before it begins.

    Args:
        num_epochs: passes that the test makes over the rows.
        num_steps_of_run: of the run that the rate is for.
    """
    said = []
    if tried.num_steps > MOST_STEPS:
        said.append(
            f"{tried.num_steps} steps are a training run of their own: the loss falls because the model learns in them, and less "
            f"because of the rate. 3,000 steps were seen to mislead; take about {USUAL_STEPS} (--steps)."
        )
    if num_epochs > MOST_EPOCHS:
        said.append(
            f"The test passes over the rows {num_epochs:.1f} times: part of the fall is rows that the model knows by heart. Take "
            f"fewer steps (--steps), more rows, or smaller batches (training.global_batch_size)."
        )
    if tried.num_steps > num_steps_of_run:
        said.append(
            f"The run has {num_steps_of_run} steps, and the test {tried.num_steps}: to train it at a few rates (raytune sweep) "
            f"may cost no more, and says more."
        )
    return tuple(said)
