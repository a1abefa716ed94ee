"""Penalties that hold trained weights near those of the base, as planned: where they mean nothing they are refused. Pure."""

from collections.abc import Iterator

from raytune.config.sections.data import named_sources
from raytune.config.sections.row_sources import weighed_sources
from raytune.config.sections.run import RunConfig
from raytune.errors import PlanError, UserError
from raytune.plan.facts.data_facts import DataFacts
from raytune.plan.model.trained import Trained
from raytune.plan.run_plan import RunPlan
from raytune.units import format_bytes, format_count, format_seconds

L2_SP, EWC = "strategy.l2_sp", "strategy.ewc"
FEW_DOCUMENTS = 50
"""Below which the plan says that they are few."""


def check_penalty(config: RunConfig, trained: Trained) -> None:
    """Refuse a penalty on what is not the base's, and one that would be added too late or be of other weights than it says.

    Raises:
        UserError: (or PlanError) with what to set instead.
    """
    for key in penalty_keys(config):
        if not trained.is_base:
            raise UserError(
                f"{key} holds trained weights near those of the base, but adapter.method {config.adapter.method} leaves these as "
                f"they are, and what it trains beside them has no place there to be held at. Set adapter.method to full, or "
                f"leave {key} out: a smaller adapter.rank, or training.weight_decay on the updates, keeps them small.",
                keys=(key, "adapter.method"),
            )
        offload = config.training.zero.offload_optimizer
        if offload != "none":
            raise PlanError(
                f"{key} adds to complete gradients, but with training.zero.offload_optimizer {offload} DeepSpeed has sent them "
                f"off and counted their norm by then. Set training.zero.offload_optimizer to none, or leave {key} out.",
                keys=(key, "training.zero.offload_optimizer"),
            )
    if weighed_sources(config) and config.strategy.unfreeze:
        raise UserError(
            f"{EWC} estimates the importance of weights before the first step, from gradients of all that is trained, and the "
            f"first phase of strategy.unfreeze has gradients of a part. Leave one of them out: strategy.l2_sp holds weights in "
            f"phases too, and strategy.freeze goes with {EWC}.",
            keys=(EWC, "strategy.unfreeze"),
        )


def check_importance(config: RunConfig, precision: str) -> None:
    """Refuse to estimate importance in a precision that cannot hold it.

    Raises:
        PlanError: with those that can.
    """
    if weighed_sources(config) and precision == "fp16":
        raise PlanError(
            f"{EWC} squares gradients, and fp16 has no numbers below 6e-8: the squares of most would be 0. Set "
            f"training.precision to bf16 or fp32, or hold weights by strategy.l2_sp, which squares none.",
            keys=(EWC, "training.precision"),
        )


def penalty_keys(config: RunConfig) -> list[str]:
    """What holds weights near the base, by its key; strength 0 asks for nothing."""
    return [key for key, strength in ((L2_SP, l2_sp_strength(config)), (EWC, ewc_strength(config))) if strength]


def l2_sp_strength(config: RunConfig) -> float:
    """0: there is no L2-SP."""
    return config.strategy.l2_sp.strength if config.strategy.l2_sp else 0.0


def ewc_strength(config: RunConfig) -> float:
    """0: there is no EWC."""
    return config.strategy.ewc.strength if config.strategy.ewc else 0.0


def ewc_name(config: RunConfig) -> str:
    """What these rows are called."""
    return ", ".join(named_sources(weighed_sources(config)))


def ewc_documents(config: RunConfig, data: DataFacts) -> int:
    """Documents that importance is estimated from."""
    if data.ewc is None or config.strategy.ewc is None:
        return 0
    return min(config.strategy.ewc.max_documents, data.ewc.num_rows)


def importance_bytes(plan: RunPlan) -> int:
    """Of the importance of weights in the run folder, over all ranks; 0 without EWC."""
    return 4 * plan.num_trainable if plan.data.ewc else 0


# --- in words


def penalty_in_words(plan: RunPlan) -> str:
    """What is added to the loss, for the table of a plan; empty without."""
    settings, words = plan.optimization, []
    if settings.l2_sp_strength:
        words.append(f"L2-SP: {settings.l2_sp_strength:g} / 2 x squared way of the trained weights from the base")
    if settings.ewc_strength:
        of_each = "that of each counted by its importance" if words else "each counted by its importance"
        what = "the squared way" if words else "squared way of the trained weights from the base"
        words.append(f"EWC: {settings.ewc_strength:g} / 2 x {what}, {of_each}")
    return f"{' + '.join(words)}, added to the loss" if words else ""


def importance_in_words(plan: RunPlan) -> str:
    """Where the importance of weights comes from, and what that takes; empty without EWC."""
    store, count, workers = plan.data.ewc, plan.optimization.ewc_documents, plan.batch.workers
    if store is None:
        return ""
    drawn = f"{count} of its {store.num_rows} documents" if count < store.num_rows else _many(count, "document")
    tokens = format_count(count * store.num_tokens / store.num_rows)
    share = f", {-(-count // workers)} a worker" if workers > 1 else ""
    time = f" in {format_seconds(plan.importance_s)}" if plan.importance_s else ""
    return (
        f"mean squared gradient of {store.name}: {drawn}, about {tokens} tokens, a forward and a backward pass for each{share}, "
        f"before the first step{time}; {format_bytes(importance_bytes(plan))} in the run folder"
    )


def penalty_notes(config: RunConfig, data: DataFacts, *, weight_decay: float) -> Iterator[str]:
    """What a reader of the plan may not expect."""
    for key, section in ((L2_SP, config.strategy.l2_sp), (EWC, config.strategy.ewc)):
        if section and not section.strength:
            yield f"{key}.strength is 0: nothing is added to the loss{' and nothing estimated' * (key == EWC)}."
    keys = penalty_keys(config)
    if not keys:
        return
    yield (
        f"train/loss is without the penalty of {' and '.join(keys)}, which is train/penalty; the gradient that is clipped, and "
        f"its norm, have both."
    )
    if weight_decay:
        yield (
            f"training.weight_decay {weight_decay:g} draws weights to 0 while {keys[0]} draws them to the base. It is 0 where it "
            f"is left to auto."
        )
    if config.model.new_tokens:
        yield "Rows of new tokens are held near where they start, as all that is trained."
    if data.ewc and ewc_documents(config, data) < FEW_DOCUMENTS:
        yield (
            f"Importance is estimated from {_many(ewc_documents(config, data), 'document')}: a weight that they do not need "
            f"counts as unimportant. Some hundred say more."
        )


def _many(count: int, one: str) -> str:
    return f"{count} {one}{'s' * (count != 1)}"
