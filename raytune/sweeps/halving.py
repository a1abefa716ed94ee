"""Asynchronous successive halving (ASHA, Li et al. 2020): which trials go on at a rung. Pure: results in, a verdict out.

The stopping variant, as Ray Tune's `ASHAScheduler` has it (a test holds the two against each other): a trial that reaches a rung
is compared with those that were there before it, and goes on or ends; nobody waits. What is different here is that a result that
is not finite ends its trial: Ray's comparison `nan < cut` is false at every rung, so that a dead trial would train to the end.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

import numpy as np

Mode = Literal["min", "max"]


class Verdict(Enum):
    GO_ON = "go on"
    STOP = "stop"
    FAIL = "fail"
    """The value is not finite."""


@dataclass(frozen=True, slots=True)
class RungDecision:
    """What becomes of a trial, and what that was decided by."""

    verdict: Verdict
    rung: int | None = None
    """Index of the rung at which it was decided; None: the result belongs to no rung."""
    cut: float | None = None
    """Value that the trial had to reach; None where it was the first at its rung."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Halving:
    """The rule.

    Args:
        rungs: amounts of training (steps or tokens) after which trials are compared, ascending.
        reduction_factor: of the trials at a rung, one in this many goes on.
    """

    rungs: tuple[float, ...]
    reduction_factor: float
    mode: Mode

    def decide(self, standings: "Standings", trial: str, amount: float, value: float) -> RungDecision:
        """Judge a result and note it in the standings.

        Args:
            amount: training that the trial has had, in the unit of the rungs.
            value: of the metric.
        """
        if not math.isfinite(value):
            return RungDecision(Verdict.FAIL)
        for rung in reversed(range(len(self.rungs))):
            if amount < self.rungs[rung] or trial in standings.at(rung):
                continue
            cut = self.cut(standings.at(rung))
            standings.note(rung, trial, value)
            falls_short = cut is not None and (value > cut if self.mode == "min" else value < cut)
            return RungDecision(Verdict.STOP if falls_short else Verdict.GO_ON, rung, cut)
        return RungDecision(Verdict.GO_ON)

    def cut(self, values: Mapping[str, float]) -> float | None:
        """The value that splits off the best `1 / reduction_factor`, interpolated; None if there are no values."""
        if not values:
            return None
        share = 1 / self.reduction_factor
        # Of negated values where less is better: rounding then is that of Ray's, who compares rewards.
        sign = -1.0 if self.mode == "min" else 1.0
        return sign * float(np.percentile([sign * value for value in values.values()], (1 - share) * 100))


@dataclass(slots=True)
class Standings:
    """Values of the metric by rung and trial, in the order of arrival."""

    _by_rung: dict[int, dict[str, float]] = field(default_factory=dict)

    def at(self, rung: int) -> Mapping[str, float]:
        return self._by_rung.get(rung, {})

    def note(self, rung: int, trial: str, value: float) -> None:
        self._by_rung.setdefault(rung, {})[trial] = value


def halving_rungs(grace: float, budget: float, reduction_factor: float) -> tuple[float, ...]:
    """Rungs at `grace`, and each `reduction_factor` times as far as the one before (Li et al., algorithm 2).

    The budget itself is none: a trial that comes there has ended anyway.
    """
    rungs, rung = [], grace
    while rung < budget * (1 - 1e-9):
        rungs.append(rung)
        rung *= reduction_factor
    return tuple(rungs)
