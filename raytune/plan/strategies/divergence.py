"""The divergence guard as it is planned: refused where it cannot do what it promises, and put into words. Pure."""

import math
from collections.abc import Iterator

from raytune.config.sections.divergence import DivergenceSection
from raytune.config.sections.run import RunConfig
from raytune.errors import UserError
from raytune.plan.calendar import in_steps
from raytune.plan.run_plan import CheckpointPlan, RunPlan

FEWEST = 16
"""Logged values before which nothing is a spike."""
_KEY = "training.divergence"
_TOLD = {
    "warn": "is told",
    "skip": "is not updated with",
    "stop": "ends the run",
}


def guard_of(config: RunConfig, checkpoint: CheckpointPlan) -> DivergenceSection | None:
    """The guard that a config asks for.

    Raises:
        UserError: if it could not roll back.
    """
    rule = config.training.divergence
    if rule is None or rule.policy != "roll_back":
        return rule
    if config.strategy.unfreeze:
        raise UserError(
            f"{_KEY}.policy roll_back does not go with strategy.unfreeze: a checkpoint holds what its phase trains, and what a "
            f"later phase has changed would stay changed. Set {_KEY}.policy to stop, skip or warn, or strategy.unfreeze to []."
        )
    num_steps = rule.patience * config.training.logging_steps
    num_saves = math.ceil(num_steps / checkpoint.every_steps)
    if num_saves >= checkpoint.keep_last:
        raise UserError(
            f"{_KEY}.policy roll_back may find no checkpoint to go back to: divergence takes {_KEY}.patience {rule.patience} x "
            f"training.logging_steps {config.training.logging_steps} = {num_steps} steps to be seen, in which up to {num_saves} "
            f"checkpoints are saved (every {in_steps(checkpoint.every_steps)} steps), and the last {checkpoint.keep_last} are "
            f"kept. Set checkpoint.keep_last to {num_saves + 1} or more, or checkpoint.every_steps to more than {num_steps}."
        )
    return rule


def guard_in_words(plan: RunPlan) -> str:
    """What the guard looks for and does, for the table of a plan; empty without one."""
    rule = plan.divergence
    if rule is None:
        return ""
    log_every = f" (every {plan.logging_steps} steps)" if plan.logging_steps > 1 else ""
    spike = f"more than {rule.threshold:g} robust deviations above the median of the last {rule.window} logged steps{log_every}"
    if rule.policy == "skip":
        return f"a step whose gradient norm is {spike} {_TOLD[rule.policy]}"
    watched = {"loss": "the loss", "grad_norm": "the gradient norm", "both": "the loss or the gradient norm"}[rule.watch]
    times = "once" if rule.patience == 1 else f"{rule.patience} times in a row"
    does = _TOLD.get(
        rule.policy,
        f"rolls back to the newest checkpoint before, at {rule.rate_factor:g} of the rate; at most {rule.max_roll_backs} times",
    )
    return f"{watched} {spike} {times} {does}"


def guard_notes(plan: RunPlan) -> Iterator[str]:
    """What a reader of the plan may not expect of the guard."""
    rule = plan.divergence
    if rule is None:
        return
    num_logged = plan.optimization.num_steps // plan.logging_steps
    fewest = min(FEWEST, rule.window)
    if num_logged <= fewest:
        yield (
            f"{_KEY} cannot find a spike: nothing is one before {fewest} logged steps, and {plan.optimization.num_steps} steps "
            f"have {num_logged} (training.logging_steps {plan.logging_steps})."
        )
    if rule.policy == "roll_back":
        yield (
            "A run that is rolled back trains steps again: planned time and money are those without. The state before the first "
            "step is saved as well."
        )
