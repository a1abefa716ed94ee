"""What is minimised, as it is planned: cross-entropy, or a loss of the user's whose code goes with the plan. Pure."""

import math
from collections.abc import Iterator

from raytune.config.sections.run import RunConfig
from raytune.config.sections.strategy import CROSS_ENTROPY
from raytune.errors import PlanError, UserError
from raytune.plan.run_plan import ObjectivePlan, OptimizationPlan
from raytune.plan.strategies.distillation import distillation_of
from raytune.user_code import read_code

KEY = "strategy.objective"
ASSUMED_BYTES_PER_LOGIT = 24.0
"""Of a loss of the user's that nobody has tried: six copies of the logits in fp32."""


def objective_of(config: RunConfig) -> ObjectivePlan | None:
    """The loss that a config names, with its code; None: cross-entropy.

    Raises:
        UserError: if the code is not here.
    """
    asked = config.strategy.objective
    if asked is None:
        return None
    try:
        code = read_code(asked.function)
    except UserError as error:
        raise UserError(str(error), keys=(KEY,)) from error
    return ObjectivePlan(
        module=code.module,
        name=code.name,
        text=code.text,
        sha256=code.sha256,
        options=asked.options,
        bytes_per_logit=ASSUMED_BYTES_PER_LOGIT,
    )


def check_objective(config: RunConfig) -> None:
    """Refuse two things to minimise at once.

    Raises:
        PlanError: with what to set instead.
    """
    if config.strategy.objective and distillation_of(config):
        raise PlanError(
            f"{KEY} names a loss of your own, and strategy.distillation one of a teacher's beside cross-entropy. Leave one of "
            f"them out.",
            keys=(KEY, "strategy.distillation"),
        )


def objective_in_words(plan: OptimizationPlan) -> str:
    """What is minimised in place of cross-entropy, for the table of a plan; empty where it is not."""
    asked = plan.objective
    if asked is None:
        return ""
    options = "".join(f", {name} {value}" for name, value in asked.options.items())
    return f"{asked.module}:{asked.name}{options} (code {asked.sha256[:12]}); of held-out rows: {CROSS_ENTROPY}"


def objective_notes(objective: ObjectivePlan | None) -> Iterator[str]:
    """What a reader of the plan may not expect."""
    if objective is None:
        return
    took = f"{math.ceil(objective.bytes_per_logit)} bytes for each logit beside the logits themselves"
    was = "took, when it was tried," if objective.is_tried else "was not tried here; assumed are"
    yield f"train/loss is the loss of {KEY}; validation/loss is cross-entropy, as it always is. It {was} {took}."
