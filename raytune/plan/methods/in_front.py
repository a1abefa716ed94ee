"""What methods share that lay virtual tokens in front of each document: what is trained, what is refused, and their words."""

from collections.abc import Callable, Iterator, Sequence

from raytune.config.sections.adapter import Adapter, num_virtual_tokens
from raytune.config.sections.model import Quantization
from raytune.config.sections.quantization import HeldBase
from raytune.config.sections.run import RunConfig
from raytune.errors import ModelError, UserError
from raytune.plan.defaults import adapter_rate
from raytune.plan.methods.experts import how_experts_are_held, most_in_a_module, of_experts, packed_experts
from raytune.plan.model.shapes import ModelShape
from raytune.plan.model.trained import Trained, TrainedPart

MAX_RATE = 1e-2
ENCODER = "prompt_encoder.default"
"""PEFT's name of the module that makes virtual tokens, beside the base."""


class _NothingSaved:
    """What says of modules of the base that a section trains them: none of these methods does."""

    target_modules: list[str] = []
    exclude_modules: list[str] = []
    modules_to_save: list[str] = []


def trained_in_front(
    adapter: Adapter,
    shape: ModelShape,
    quantization: Quantization | None,
    *,
    embedding: int,
    layers: Sequence[tuple[str, int, int]] = (),
    lengthens_rows: bool,
) -> Trained:
    """What is trained where virtual tokens come from embeddings, and perhaps from linear layers behind them.

    Args:
        embedding: width of an embedding.
        layers: name, inputs and outputs of each linear layer, which has biases.
        lengthens_rows: as of `Trained`.
    """
    num_virtual = num_virtual_tokens(adapter)
    sizes = [("embedding", num_virtual * embedding), *((name, (inputs + 1) * outputs) for name, inputs, outputs in layers)]
    parts = tuple(
        TrainedPart(
            name=f"{ENCODER}.{name}", kind="embedding" if name == "embedding" else "mlp", how="in front", num_parameters=size
        )
        for name, size in sizes
    )
    packed = packed_experts(_NothingSaved(), shape, quantization)
    return Trained(
        parts=parts,
        lowest_layer=0,
        num_sides=num_virtual + embedding + sum(inputs + 2 * outputs for _, inputs, outputs in layers),
        num_virtual=num_virtual,
        lengthens_rows=lengthens_rows,
        num_packed=sum(one.num_parameters for one in packed),
        num_packed_per_layer=most_in_a_module(packed),
        largest_packed=max((one.num_parameters for one in packed), default=0),
    )


def check_embeds(adapter: Adapter, config: RunConfig, held: HeldBase, shape: ModelShape) -> None:
    """`Method.check` of methods whose virtual tokens are embeddings.

    Raises:
        UserError: (or ModelError) with the setting that works.
    """
    if not shape.heads:
        raise ModelError(
            f"adapter.method {adapter.method} is PEFT's, which asks for the number of heads of attention, and this "
            f"{shape.model_type} model has none. Set adapter.method to lora."
        )
    if config.training.neftune_noise_alpha:
        raise UserError(
            f"training.neftune_noise_alpha is {config.training.neftune_noise_alpha:g}, but adapter.method {adapter.method} makes "
            f"embeddings of its own, for which the noise has no rule. Set it to 0, or adapter.method to prefix_tuning or lora.",
            keys=("training.neftune_noise_alpha", "adapter.method"),
        )


def rate_in_front(factor: float) -> Callable[[int], float]:
    """The usual peak rate, by parameters of the base.

    Args:
        factor: times the rate of low-rank updates.
    """
    return lambda num_parameters: min(MAX_RATE, factor * adapter_rate(num_parameters))


def words_in_front(what: str) -> Callable[[Adapter, str, str], str]:
    """`Method.in_words`.

    Args:
        what: the virtual tokens are.
    """

    def in_words(adapter: Adapter, held: str, trained: str) -> str:
        return f"{adapter.method}, {num_virtual_tokens(adapter)} virtual tokens {what}{held}, {trained}"

    return in_words


def frozen_experts(adapter: Adapter, shape: ModelShape, trained: Trained, quantization: Quantization | None) -> list[str]:
    """`Method.expert_notes`: nothing of the base is trained."""
    held = how_experts_are_held(packed_experts(_NothingSaved(), shape, quantization), shape, trained, quantization, "")
    return [f"{of_experts(shape)}. They are not trained: nothing of the base is.{held}"]


def virtual_notes(trained: Trained, row_length: int, *, is_packed: bool) -> Iterator[str]:
    """What a plan says of virtual tokens.

    Args:
        row_length: tokens of the longest document.
        is_packed: whether documents share rows.
    """
    num_virtual = trained.num_virtual
    if not num_virtual:
        return
    where = "of each document" if trained.lengthens_rows else "of each document's keys and values, in each layer"
    row = "a packed row" if is_packed else "a document"
    longer = f"{row} of up to {row_length} tokens takes up to {row_length + num_virtual} positions"
    room = f", and rows leave room for {num_virtual} with each document" if is_packed else ""
    yield f"{num_virtual} virtual tokens lie in front {where}: {longer}{room}. What is trained cannot be merged into the base."
