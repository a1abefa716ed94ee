"""Trainable tokens in a plan: rows of embedding and head are trained, and nothing else."""

from raytune.config.sections.adapter import TrainableTokensAdapter
from raytune.config.sections.model import Quantization
from raytune.config.sections.quantization import HeldBase
from raytune.config.sections.run import RunConfig
from raytune.errors import UserError
from raytune.plan.defaults import adapter_epochs, adapter_rate
from raytune.plan.methods.experts import most_in_a_module, packed_experts
from raytune.plan.methods.layers import without_experts
from raytune.plan.methods.method import Method
from raytune.plan.methods.targets import NO_TARGETS
from raytune.plan.methods.token_rows import TRAINABLE, check_rows, num_rows, row_parts
from raytune.plan.model.shapes import ModelShape
from raytune.plan.model.trained import Trained, lowest_layer

MAX_RATE = 1e-2


def _trained(adapter: TrainableTokensAdapter, shape: ModelShape, quantization: Quantization | None) -> Trained:
    parts = tuple(row_parts(adapter, shape))
    packed = packed_experts(NO_TARGETS, shape, quantization)
    return Trained(
        parts=parts,
        lowest_layer=lowest_layer([part.name for part in parts], shape),
        num_sides=len(parts) * (num_rows(adapter, shape) + shape.hidden),
        num_constants=sum(part.num_parameters for part in parts),
        num_packed=sum(one.num_parameters for one in packed),
        num_packed_per_layer=most_in_a_module(packed),
        largest_packed=max((one.num_parameters for one in packed), default=0),
    )


def _check(adapter: TrainableTokensAdapter, config: RunConfig, held: HeldBase, shape: ModelShape) -> None:
    if not num_rows(adapter, shape):
        raise UserError(
            f"adapter.method trainable_tokens has no token whose rows it could train. Name new ones in model.new_tokens, or "
            f"tokens of the vocabulary in {TRAINABLE}.",
            keys=(TRAINABLE, "adapter.method"),
        )
    check_rows(adapter, config, shape)


def _in_words(adapter: TrainableTokensAdapter, held: str, trained: str) -> str:
    named = "new tokens" if adapter.trainable_tokens == "auto" else f"new tokens and {', '.join(adapter.trainable_tokens[:5])}"
    return f"trainable_tokens on rows of {named}{held}, {trained}"


METHOD = Method(
    trained=_trained,
    check=_check,
    in_words=_in_words,
    expert_notes=lambda adapter, shape, trained, quantization: without_experts("rows")(NO_TARGETS, shape, trained, quantization),
    # Rows of few tokens start far from where they should be, as prompts do (Lester et al. 2021 take up to 0.3).
    learning_rate=lambda num_parameters: min(MAX_RATE, 5 * adapter_rate(num_parameters)),
    epochs=adapter_epochs,
    weight_decay=0.0,  # it would draw the rows to 0
    when="new special tokens for a model that is to stay as it is: learns what they mean, and nothing else",
)
