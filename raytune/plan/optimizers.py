"""What an optimizer updates of what is trained: refused where it would update nothing in its own way, put into words. Pure."""

from collections.abc import Iterator

from raytune.config.run import RunConfig
from raytune.errors import UserError
from raytune.plan.memory import ORTHOGONAL
from raytune.plan.trained import Trained
from raytune.units import format_count


def check_optimizer(config: RunConfig, trained: Trained) -> None:
    """Refuse an optimizer of matrices where there are none, or none that stands for itself.

    Raises:
        UserError: with what to set instead.
    """
    name, method = config.training.optimizer, config.adapter.method
    if name not in ORTHOGONAL:
        return
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


def optimizer_notes(config: RunConfig, trained: Trained) -> Iterator[str]:
    """What a reader of the plan may not expect of the optimizer."""
    name = config.training.optimizer
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
