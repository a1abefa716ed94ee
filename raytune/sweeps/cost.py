"""What a sweep is expected to cost, in steps of training, before anything of it is known."""

import random
import statistics
from dataclasses import dataclass

from raytune.sweeps.halving import Halving, Standings, Verdict

NUM_ORDERS = 50
MOST_TRIALS = 64
"""Of larger sweeps, as many are judged and stand for all: what a trial costs changes little from there on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedCost:
    """In rounds of training, over all trials."""

    full: float
    """If every trial trained to its end."""
    expected: float

    @property
    def share(self) -> float:
        return self.expected / self.full


def expected_cost(halving: Halving, num_trials: int, budget: float, seed: int = 0) -> ExpectedCost:
    """Mean over many random orders, judged by the very rule that will judge the trials.

    Trials are taken to arrive one after the other and to keep their rank from rung to rung. Both are idealisations: trials that
    run side by side are judged by fewer others and cost a little more.

    Args:
        budget: full training of a trial, in the unit of the rungs.
    """
    orders, judged = random.Random(seed), min(num_trials, MOST_TRIALS)
    costs = [_cost_of_order(halving, orders.sample(range(judged), judged), budget) for _ in range(NUM_ORDERS)]
    return ExpectedCost(full=num_trials * budget, expected=statistics.mean(costs) * num_trials / judged)


def _cost_of_order(halving: Halving, qualities: list[int], budget: float) -> float:
    standings, cost = Standings(), 0.0
    for number, quality in enumerate(qualities):
        reached = budget
        for rung in halving.rungs:
            if halving.decide(standings, str(number), rung, float(quality)).verdict is Verdict.STOP:
                reached = rung
                break
        cost += reached
    return cost
