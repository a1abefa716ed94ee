"""What is known of the trials while they run, in this process only: for the live table, and for a search that learns."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from raytune.sweeps.halving import Mode

Activity = Literal["waiting", "running", "ended"]


@dataclass(frozen=True, slots=True)
class TrialStatus:
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
    _statuses: dict[str, TrialStatus] = field(default_factory=dict)

    @property
    def statuses(self) -> Mapping[str, TrialStatus]:
        """By trial, in the order in which they were first heard of."""
        return dict(self._statuses)

    def of(self, trial: str) -> TrialStatus:
        return self._statuses.get(trial, TrialStatus())

    def active(self, trial: str, activity: Activity) -> None:
        was = self.of(trial)
        self._statuses[trial] = TrialStatus(activity, was.step, was.newest, was.best)

    def heard(self, trial: str, step: int, value: float) -> None:
        """Note a result."""
        was, better = self.of(trial), self._better
        best = was.best if not math.isfinite(value) else value if was.best is None else better(was.best, value)
        self._statuses[trial] = TrialStatus(was.activity, step, value, best)

    @property
    def _better(self) -> Callable[[float, float], float]:
        return min if self.mode == "min" else max
