"""OFT in a plan: rotations of blocks of a layer's inputs, and block sizes that fit."""

from collections.abc import Iterator

from raytune.config.sections.adapter import OftAdapter
from raytune.config.sections.model import Quantization
from raytune.config.sections.quantization import HeldBase
from raytune.config.sections.run import RunConfig
from raytune.errors import ModelError
from raytune.plan.defaults import adapter_epochs, adapter_rate
from raytune.plan.methods.layers import (
    Addition,
    named_targets,
    refuse_embeddings,
    refuse_turned,
    trained_in_layers,
    unread_names,
    without_experts,
)
from raytune.plan.methods.method import Method
from raytune.plan.methods.targets import check_names, target_modules
from raytune.plan.model.shapes import ModelShape, Module
from raytune.plan.model.trained import Trained


def _trained(adapter: OftAdapter, shape: ModelShape, quantization: Quantization | None) -> Trained:
    size = adapter.block_size

    def addition(module: Module) -> Addition:
        num_blocks = 1 if adapter.block_share else max(1, module.inputs // size)
        per_block = size * (size - 1) // 2
        # Of each block: the skew matrix, its powers, and the rotation that they add up to.
        made = num_blocks * size * size * adapter.num_cayley_neumann_terms
        return Addition(
            num_parameters=num_blocks * per_block,
            num_sides=num_blocks + per_block,
            changed_inputs=module.inputs,
            # Of inputs, which are cast, rotated block by block, laid side by side and cast back.
            passing_ahead=3 * module.inputs,
            # Of rotated ones the gradient, that laid out in blocks, and that before the rotation; of three, two are in 16 bits.
            passing_back=2 * module.inputs,
            passing_back_as_it_is=3 * module.inputs,
            num_made=made,
        )

    layers = target_modules(adapter, shape)
    return trained_in_layers(adapter, shape, quantization, layers, addition, how="rotation", reads_inputs=True)


def _check(adapter: OftAdapter, config: RunConfig, held: HeldBase, shape: ModelShape) -> None:
    """Refuse what PEFT would refuse in the worker, or change with a warning."""
    check_names(adapter, shape)
    layers = target_modules(adapter, shape)
    refuse_embeddings(layers, "rotations of its own here")
    refuse_turned(layers, "oft", shape)
    odd = next((module for module in layers if module.inputs % adapter.block_size), None)
    if odd:
        widths = {module.inputs for module in layers}
        sizes = [size for size in range(2, min(widths) + 1) if all(width % size == 0 for width in widths)]
        below = max((size for size in sizes if size < adapter.block_size), default=None)
        above = min((size for size in sizes if size > adapter.block_size), default=None)
        near = " or ".join(str(size) for size in (below, above) if size)
        remedy = f"Set it to {near}, or leave" if near else "No size does for all layers: leave"
        raise ModelError(
            f"adapter.block_size is {adapter.block_size}, which does not divide the {odd.inputs} inputs of {odd.name}, so that "
            f"PEFT would rotate blocks of another size. {remedy} such layers out by adapter.exclude_modules."
        )


def _unread(adapter: OftAdapter, shape: ModelShape) -> Iterator[str]:
    yield from unread_names(adapter, shape, target_modules)
    if adapter.dropout > 0 and adapter.block_share:
        yield f"adapter.dropout {adapter.dropout:g} is not read: with adapter.block_share a layer has one rotation."


METHOD = Method(
    trained=_trained,
    check=_check,
    in_words=lambda adapter, held, trained: f"oft block size {adapter.block_size} on {named_targets(adapter)}{held}, {trained}",
    expert_notes=without_experts("rotations"),
    # PEFT's comparison of methods (method_comparison/MetaMathQA, Llama 3.2 3B) gives it the rate of LoRA.
    learning_rate=adapter_rate,
    epochs=adapter_epochs,
    weight_decay=0.0,  # it would draw the rotations back to none
    unread=_unread,
    when="rotations: what neurons know of each other stays",
)
