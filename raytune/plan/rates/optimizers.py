"""What an optimizer updates of what is trained, at which rates: refused where it cannot in its own way, put into words. Pure."""

from collections.abc import Iterator

from raytune.config.sections.run import RunConfig
from raytune.config.sections.training import SCHEDULE_FREE, USUAL_SCHEDULE, Schedule, TrainingSection
from raytune.errors import UserError
from raytune.plan.costs.memory import ORTHOGONAL
from raytune.plan.defaults import Choice
from raytune.plan.model.trained import Trained
from raytune.units import format_count


def check_optimizer(config: RunConfig, trained: Trained) -> None:
    """Refuse an optimizer where what is trained, or how, is not for it.

    Raises:
        UserError: with what to set instead.
    """
    if config.training.optimizer in ORTHOGONAL:
        _check_orthogonal(config, trained)
    if config.training.optimizer in SCHEDULE_FREE:
        _check_schedule_free(config, trained)


def _check_orthogonal(config: RunConfig, trained: Trained) -> None:
    """There are matrices, and each stands for itself."""
    name, method = config.training.optimizer, config.adapter.method
    if trained.num_in_experts:
        raise UserError(
            f"training.optimizer is {name}, but updates of fused experts lie stacked in one matrix, which is not to be "
            f"orthogonalised as one. Set training.optimizer to adamw, or leave the experts out (adapter.target_modules, "
            f"adapter.target_parameters).",
            keys=("training.optimizer",),
        )
    if not trained.num_in_matrices:
        raise UserError(
            f"training.optimizer is {name}, which orthogonalises updates of matrices of hidden layers, but adapter.method "
            f"{method} trains none here. Set training.optimizer to adamw, or adapter.method to lora or full.",
            keys=("training.optimizer", "adapter.method"),
        )


def _check_schedule_free(config: RunConfig, trained: Trained) -> None:
    """Nothing else shapes the rate, or makes an average, and all that is trained is from the first step on."""
    training, own = config.training, "training.optimizer"
    said = f"{own} is {training.optimizer}"
    if training.lr_scheduler_type not in ("auto", "constant"):
        raise UserError(
            f"{said}, which averages weights in place of a schedule, but training.lr_scheduler_type is "
            f"{training.lr_scheduler_type}. Set training.lr_scheduler_type to constant (with a warm-up or without), or {own} to "
            f"adamw.",
            keys=("training.lr_scheduler_type", own),
        )
    if not training.adam_beta1:
        raise UserError(
            f"{said}, which holds its average as training.adam_beta1 of the way between two weights, but that is 0, and the "
            f"average would be lost. Set training.adam_beta1 to 0.9, or {own} to adamw.",
            keys=("training.adam_beta1", own),
        )
    if training.averaging:
        raise UserError(
            f"{said}, whose model is an average already, and training.averaging would make one of weights that are no model. "
            f"Leave training.averaging out, or set {own} to adamw.",
            keys=("training.averaging", own),
        )
    if config.strategy.unfreeze:
        raise UserError(
            f"{said}, whose average is over all steps of a run at one rate, but strategy.unfreeze begins to train weights later. "
            f"Set {own} to adamw, or leave strategy.unfreeze out and train all of its parts from the start.",
            keys=(own, "strategy.unfreeze"),
        )
    if trained.num_followed:
        raise UserError(
            f"{said}, whose average would bring back ranks that adapter.method {config.adapter.method} sets to 0 as it trains. "
            f"Set {own} to adamw, or adapter.method to lora.",
            keys=(own, "adapter.method"),
        )


def schedule_of(training: TrainingSection) -> Choice[Schedule]:
    """The shape of the rate after the warm-up; see `_check_schedule_free`."""
    if training.lr_scheduler_type != "auto":
        return Choice(training.lr_scheduler_type)
    if training.optimizer in SCHEDULE_FREE:
        return Choice("constant", f"training.lr_scheduler_type is constant: {training.optimizer} has no other.")
    return Choice(USUAL_SCHEDULE)


def optimizer_notes(config: RunConfig, trained: Trained) -> Iterator[str]:
    """What a reader of the plan may not expect of the optimizer."""
    name = config.training.optimizer
    if name in SCHEDULE_FREE:
        yield (
            f"The model of the run is the average that training.optimizer {name} makes of its weights: validation/... and what "
            f"is saved are of it, train/... is of the weights that gradients are taken at."
        )
    if name not in ORTHOGONAL:
        return
    num_others = trained.num_trainable - trained.num_in_matrices
    others = (
        f", and AdamW updates the other {format_count(num_others)} (embeddings, head, norms, biases, experts)"
        if num_others
        else ""
    )
    yield (
        f"training.optimizer {name} orthogonalises the updates of {format_count(trained.num_in_matrices)} trained parameters, "
        f"matrices of hidden layers{others}. Its updates are scaled to be as large as AdamW's usually are, so that "
        f"training.learning_rate and weight_decay mean the same for both."
    )
    if any(part.how == "low rank" for part in trained.parts):
        yield f"Of low-rank updates {name} orthogonalises both factors, each by itself, and not their product."
