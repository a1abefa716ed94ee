"""What is a spike of a training loss or of a gradient norm: rules, as pure functions of what logged steps have measured."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from raytune.config.sections.divergence import DivergenceSection
from raytune.plan.strategies.divergence import FEWEST
from raytune.training.steps.stopping import Noted

WATCHED = {"loss": ("train/loss",), "grad_norm": ("train/grad_norm",), "both": ("train/loss", "train/grad_norm")}
NORMAL = 1.4826
"""Standard deviations of a normal distribution in its median absolute deviation."""
LEAST_DEVIATION = 0.01
"""Of the median: where values hardly differ, not every small rise is a spike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Logged:
    """A logged step."""

    step: int
    values: Mapping[str, float]
    """Of what may be watched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spike:
    """A value that is too high."""

    step: int
    metric: str
    value: float
    median: float
    deviation: float
    """A robust standard deviation."""

    @property
    def text(self) -> str:
        times = f"{(self.value - self.median) / self.deviation:.3g}" if self.deviation else "infinitely many"
        return (
            f"{self.metric} {self.value:.5g} at step {self.step} is {times} robust deviations above {self.median:.5g}, the "
            f"median of the logged steps before"
        )


def ordinary(values: Sequence[float], rule: DivergenceSection) -> tuple[float, float] | None:
    """Median and robust standard deviation of the last values of a metric; None while there are too few of them.

    Values that are not finite (the norm where fp16 overflows) are none.
    """
    finite = [value for value in values[-rule.window :] if math.isfinite(value)]
    if len(finite) < min(FEWEST, rule.window):
        return None
    middle = median(finite)
    deviation = NORMAL * median(abs(value - middle) for value in finite)
    return middle, max(deviation, LEAST_DEVIATION * abs(middle))


def highest_ordinary(values: Sequence[float], rule: DivergenceSection) -> float:
    """The highest next value that would be no spike; infinity while there are too few."""
    known = ordinary(values, rule)
    return math.inf if known is None else known[0] + rule.threshold * known[1]


def spike_at(logged: Sequence[Logged], index: int, rule: DivergenceSection) -> Spike | None:
    """The spike at a logged step, the first of those that are watched; None if it has none."""
    before, now = logged[max(0, index - rule.window) : index], logged[index]
    for metric in WATCHED[rule.watch]:
        known = ordinary([one.values[metric] for one in before], rule)
        value = now.values[metric]
        if known and math.isfinite(value) and value > known[0] + rule.threshold * known[1]:
            return Spike(step=now.step, metric=metric, value=value, median=known[0], deviation=known[1])
    return None


def spikes_in_a_row(logged: Sequence[Logged], rule: DivergenceSection) -> list[Spike]:
    """The spikes of the last logged steps, back to the last step without one, in their order."""
    found = []
    for index in reversed(range(len(logged))):
        spike = spike_at(logged, index, rule)
        if spike is None:
            break
        found.append(spike)
    return found[::-1]


def where_it_diverged(logged: Sequence[Logged], rule: DivergenceSection) -> list[Noted]:
    """Logged steps at which spikes in a row are as many as the patience, each time once."""
    found, in_a_row = [], 0
    for index in range(len(logged)):
        spike = spike_at(logged, index, rule)
        in_a_row = in_a_row + 1 if spike else 0
        if spike and in_a_row == rule.patience:
            found.append(Noted(step=spike.step, reason=why_it_diverged(spike, rule)))
    return found


def why_it_diverged(spike: Spike, rule: DivergenceSection) -> str:
    """Why a spike, the last of so many in a row, is divergence."""
    in_a_row = f"; {rule.patience} logged steps in a row have a spike" if rule.patience > 1 else ""
    return f"{spike.text}{in_a_row}"
