"""What is known of the trials while they run, in this process only: for the live table, and for a search that learns."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from raytune.sweeps.halving import Mode

Activity = Literal["waiting", "running", "ended"]


@dataclass(frozen=True, slots=True)
class Standing:
    """A trial at a glance."""

    activity: Activity = "waiting"
    step: int = 0
    newest: float | None = None
    """Value of the metric."""
    best: float | None = None
    """Of the finite values."""


@dataclass(slots=True)
class Board:
    """Written by the thread that Ray Tune runs in, read by others: each entry is replaced whole."""

    mode: Mode
    _standings: dict[str, Standing] = field(default_factory=dict)

    @property
    def standings(self) -> Mapping[str, Standing]:
        """By trial, in the order in which they were first heard of."""
        return dict(self._standings)

    def of(self, trial: str) -> Standing:
        return self._standings.get(trial, Standing())

    def active(self, trial: str, activity: Activity) -> None:
        was = self.of(trial)
        self._standings[trial] = Standing(activity, was.step, was.newest, was.best)

    def heard(self, trial: str, step: int, value: float) -> None:
        """Note a result."""
        was, better = self.of(trial), self._better
        best = was.best if not math.isfinite(value) else value if was.best is None else better(was.best, value)
        self._standings[trial] = Standing(was.activity, step, value, best)

    @property
    def _better(self) -> Callable[[float, float], float]:
        return min if self.mode == "min" else max
