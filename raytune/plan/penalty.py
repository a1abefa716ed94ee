"""A penalty that holds trained weights near those of the base, as it is planned: where it means nothing it is refused. Pure."""

from collections.abc import Iterator

from raytune.config.run import RunConfig
from raytune.errors import PlanError, UserError
from raytune.plan.run_plan import OptimizationPlan
from raytune.plan.trained import Trained


def check_penalty(config: RunConfig, trained: Trained) -> None:
    """Refuse a penalty on what is not the base's, and one that would be added too late.

    Raises:
        UserError: (or PlanError) with what to set instead.
    """
    if not holds_weights(config):
        return
    if not trained.is_base:
        raise UserError(
            f"strategy.l2_sp holds trained weights near those of the base, but adapter.method {config.adapter.method} leaves "
            f"these as they are, and what it trains beside them has no place there to be held at. Set adapter.method to full, or "
            f"leave strategy.l2_sp out: a smaller adapter.rank, or training.weight_decay on the updates, keeps them small.",
            keys=("strategy.l2_sp", "adapter.method"),
        )
    if config.training.zero.offload_optimizer != "none":
        raise PlanError(
            f"strategy.l2_sp adds to complete gradients, but with training.zero.offload_optimizer "
            f"{config.training.zero.offload_optimizer} DeepSpeed has sent them off and counted their norm by then. Set "
            f"training.zero.offload_optimizer to none, or leave strategy.l2_sp out.",
            keys=("strategy.l2_sp", "training.zero.offload_optimizer"),
        )


def holds_weights(config: RunConfig) -> bool:
    """Whether weights are held near the base; strength 0 asks for nothing."""
    return l2_sp_strength(config) > 0


def l2_sp_strength(config: RunConfig) -> float:
    """0: there is no L2-SP."""
    return config.strategy.l2_sp.strength if config.strategy.l2_sp else 0.0


def penalty_in_words(plan: OptimizationPlan) -> str:
    """What is added to the loss, for the table of a plan; empty without."""
    if not plan.l2_sp_strength:
        return ""
    return f"L2-SP: {plan.l2_sp_strength:g} / 2 x squared way of the trained weights from the base, added to the loss"


def penalty_notes(config: RunConfig, *, weight_decay: float) -> Iterator[str]:
    """What a reader of the plan may not expect."""
    if config.strategy.l2_sp is None:
        return
    if not holds_weights(config):
        yield "strategy.l2_sp.strength is 0: nothing is added to the loss."
        return
    yield (
        "train/loss is without the penalty of strategy.l2_sp, which is train/penalty; the gradient that is clipped, and its "
        "norm, have both."
    )
    if weight_decay:
        yield (
            f"training.weight_decay {weight_decay:g} draws weights to 0 while strategy.l2_sp draws them to the base. It is 0 "
            f"where it is left to auto."
        )
    if config.model.new_tokens:
        yield "Rows of new tokens are held near where they start, as all that is trained."
