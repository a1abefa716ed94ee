"""Which steps fall on a period that need not be a whole number of steps, such as a pass over the rows. Pure."""

import math
from dataclasses import dataclass

from raytune.config.sections.checkpoint import CheckpointSection
from raytune.plan.defaults import Choice

SHOWN = 3
"""Steps that a reason names."""
_ROUNDING = 1e-9
"""Periods are quotients: a multiple of one may come out this little beside the whole number that it is."""

Period = int | float
"""Steps between two occasions, above 0."""


def is_due(step: int, every_steps: Period) -> bool:
    """Whether a step is the first at or behind a multiple of the period; with a period below 1 every step is."""
    return math.floor(step / every_steps + _ROUNDING) > math.floor((step - 1) / every_steps + _ROUNDING)


def in_steps(every_steps: Period) -> str:
    """A period in words."""
    return str(every_steps) if isinstance(every_steps, int) else f"{every_steps:.6g}"


def divides(part: Period, whole: Period) -> bool:
    """Whether each multiple of `whole` is one of `part`."""
    times = whole / part
    return round(times) >= 1 and math.isclose(times, round(times), rel_tol=_ROUNDING)


@dataclass(frozen=True, slots=True)
class Epoch:
    """A pass over the training rows: packed rows, or documents where each has a row of its own."""

    num_rows: int
    rows_per_step: int
    num_steps: int
    """Of the whole run."""

    def steps_of(self, epochs: float) -> Period:
        """Steps of so many passes; an int where they are whole."""
        steps = epochs * self.num_rows / self.rows_per_step
        is_whole = steps >= 1 and math.isclose(steps, round(steps), rel_tol=_ROUNDING)
        return round(steps) if is_whole else steps


def steps_of_epochs(section: str, epochs: float, epoch: Epoch) -> Choice[Period]:
    """The period of what a section asks for by epochs, and what steps that means.

    Args:
        section: `evaluation` or `checkpoint`.
    """
    every_steps = epoch.steps_of(epochs)
    asked = (
        f"{section}.every_steps is {in_steps(every_steps)}: {section}.every_epochs is {epochs:g}, and an epoch is "
        f"{epoch.num_rows} rows, {epoch.rows_per_step} of them per step"
    )
    if every_steps <= 1:
        return Choice(every_steps, f"{asked}; that is after every step.")
    due = _first_due(every_steps, epoch.num_steps)
    if not due:
        return Choice(every_steps, f"{asked}. The run has {epoch.num_steps} steps, so that is only after the last one.")
    return Choice(every_steps, f"{asked}; that is after step {', '.join(map(str, due))}{' and so on' * (len(due) == SHOWN)}.")


def saves_miss(section: CheckpointSection, evaluate_every: Period, epoch: Epoch) -> bool:
    """Whether saves and evaluations fall on different steps, so that hardly a checkpoint would have the metric that ranks it.

    Where each evaluation is saved, or each save evaluated, nothing is amiss.
    """
    save_every = section.every_steps if section.every_epochs is None else epoch.steps_of(section.every_epochs)
    if save_every == "auto" or not section.keep_best:
        return False
    return not divides(evaluate_every, save_every) and not divides(save_every, evaluate_every)


def _first_due(every_steps: Period, num_steps: int) -> list[int]:
    """The first few steps on which something with this period falls."""
    multiples = (math.ceil(k * every_steps - _ROUNDING * k) for k in range(1, SHOWN + 1))
    return [step for step in multiples if step <= num_steps]
