"""After how much training trials are compared, by stopping rule. Pure: numbers in, numbers out.

Amounts count rounds of `grace`: Ray's Hyperband makes a bracket for each power of the reduction factor below the budget, and
counted in tokens that would be a dozen brackets of no use.
"""

import math

from raytune.sweeps.halving import halving_rungs


def rungs_of(stopping: str, budget: float, reduction_factor: float) -> tuple[float, ...]:
    """Amounts in rounds, ascending, all below the budget.

    Args:
        stopping: `asha`, `hyperband`, `median` or `none`.
        budget: full training of a trial, in rounds.
    """
    match stopping:
        case "asha":
            return halving_rungs(1.0, budget, reduction_factor)
        case "hyperband":
            return _hyperband_rungs(budget, reduction_factor)
        case "median":
            return tuple(float(round_) for round_ in range(1, math.ceil(budget)))
        case _:
            return ()


def _hyperband_rungs(budget: float, reduction_factor: float) -> tuple[float, ...]:
    """Where the brackets of Ray's HyperBandScheduler compare: each begins at a power of the factor below the budget."""
    most = max(1, math.ceil(budget))
    num_brackets = round(math.log(most) / math.log(reduction_factor)) + 1
    rungs: set[int] = set()
    for bracket in range(num_brackets):
        rung = int(most * reduction_factor**-bracket)
        for _ in range(bracket + 1):
            rungs.add(rung)
            rung = int(min(rung * reduction_factor, most))
    return tuple(float(rung) for rung in sorted(rungs) if 0 < rung < budget)
