"""LoKr in a plan: into which two matrices a layer's update divides, and how large they are."""

from collections.abc import Iterator

from raytune.config.sections.adapter import LokrAdapter
from raytune.config.sections.model import Quantization
from raytune.plan.defaults import adapter_epochs, adapter_rate
from raytune.plan.methods.layers import (
    Addition,
    checked_products,
    named_targets,
    trained_in_layers,
    unread_names,
    without_experts,
)
from raytune.plan.methods.method import Method
from raytune.plan.methods.targets import target_modules
from raytune.plan.model.shapes import ModelShape, Module
from raytune.plan.model.trained import Trained

MAX_RATE = 1e-2


def divided(side: int, factor: int | str) -> tuple[int, int]:
    """A layer's side as a product of two, the smaller first: PEFT's `factorization`.

    Args:
        factor: the smaller one, if it divides the side; else it is at most this. "auto": as near the other as can be.
    """
    if factor != "auto" and side % int(factor) == 0:
        return int(factor), side // int(factor)
    most = side if factor == "auto" else int(factor)
    small, large = 1, side
    while small < large:
        larger = next(number for number in range(small + 1, side + 1) if side % number == 0)
        if larger + side // larger > small + large or larger > most:
            break
        small, large = larger, side // larger
    return min(small, large), max(small, large)


def _sizes(adapter: LokrAdapter, module: Module) -> tuple[tuple[int, int], tuple[int, int]]:
    """Parameters, and sides of the matrices, of both factors of the product."""
    inputs, outputs = divided(module.inputs, adapter.decompose_factor), divided(module.outputs, adapter.decompose_factor)
    may_divide = (adapter.decompose_both, True)
    first, second = (_size(adapter.rank, outputs[one], inputs[one], may_divide=may_divide[one]) for one in (0, 1))
    return first, second


def _size(rank: int, rows: int, columns: int, *, may_divide: bool) -> tuple[int, int]:
    if may_divide and rank < max(rows, columns) / 2:
        return rank * (rows + columns), rows + columns + 2 * rank
    return rows * columns, rows + columns


def _addition(adapter: LokrAdapter, module: Module) -> Addition:
    (first, first_sides), (second, second_sides) = _sizes(adapter, module)
    return Addition(
        num_parameters=first + second,
        num_sides=first_sides + second_sides,
        passing_ahead=module.inputs,  # in fp32
        num_made=module.inputs * module.outputs,
        making_ahead=2 * module.inputs * module.outputs,  # in fp32, before it is cast
    )


def _trained(adapter: LokrAdapter, shape: ModelShape, quantization: Quantization | None) -> Trained:
    layers = target_modules(adapter, shape)
    return trained_in_layers(
        adapter, shape, quantization, layers, lambda module: _addition(adapter, module), how="product", reads_inputs=True
    )


def _unread(adapter: LokrAdapter, shape: ModelShape) -> Iterator[str]:
    yield from unread_names(adapter, shape, target_modules)
    layers = target_modules(adapter, shape)
    sides = [[divided(side, adapter.decompose_factor) for side in (one.inputs, one.outputs)] for one in layers]
    if all(adapter.rank >= max(inputs[1], outputs[1]) / 2 for inputs, outputs in sides):
        yield (
            f"adapter.rank {adapter.rank} only scales the update: both matrices of all layers are at most twice as wide, and "
            f"so are trained as they are."
        )


METHOD = Method(
    trained=_trained,
    check=checked_products("LoKr"),
    in_words=lambda adapter, held, trained: f"lokr rank {adapter.rank} on {named_targets(adapter)}{held}, {trained}",
    expert_notes=without_experts("Kronecker products"),
    # PEFT's comparison of methods (method_comparison/MetaMathQA, Llama 3.2 3B) takes 3e-3, fifteen times LoRA's rate here, with
    # other settings than the defaults here: decompose_factor 4, and an alpha of twice the rank (64 and 32).
    learning_rate=lambda num_parameters: min(MAX_RATE, 15 * adapter_rate(num_parameters)),
    epochs=adapter_epochs,
    weight_decay=0.0,  # as low-rank updates: the product already limits what it can do
    unread=_unread,
    when="updates of high rank in few parameters; as large as the weights while it computes",
)
