"""BOFT in a plan: rotations of a layer's inputs, mixed as a butterfly does, and the square matrices that PEFT makes of them."""

from collections.abc import Iterator

from raytune.config.sections.adapter import BoftAdapter
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


def _trained(adapter: BoftAdapter, shape: ModelShape, quantization: Quantization | None) -> Trained:
    factors, size = adapter.num_butterfly_factors, adapter.block_size

    def addition(module: Module) -> Addition:
        square, in_blocks = module.inputs**2, factors * module.inputs * size
        return Addition(
            num_parameters=in_blocks + module.outputs,
            num_sides=2 * factors * module.inputs + module.outputs + 1,
            inner_width=module.outputs,  # what its factors multiply
            changed_inputs=module.inputs,
            passing_ahead=min(module.inputs, module.outputs),  # the gradient of what an MLP's last layer gives, in fp32
            # Each factor among its permutations and what they make together so far; of blocks, the skew matrix, the solution of
            # Cayley's equation and how that was found, and the rotation.
            num_made=2 * factors * square + 4 * in_blocks,
            # What the factors make together and the product before that, with the permutation.
            making_ahead=2 * square,
            num_applied=square,
            making_flops=3 * factors * 2 * module.inputs * square,
        )

    layers = target_modules(adapter, shape)
    return trained_in_layers(
        adapter,
        shape,
        quantization,
        layers,
        addition,
        how="rotation",
        reads_inputs=True,
        casts_inputs=False,
        num_constants=factors * sum(module.inputs**2 for module in layers),  # permutations, as matrices
    )


def _check(adapter: BoftAdapter, config: RunConfig, held: HeldBase, shape: ModelShape) -> None:
    """Refuse what PEFT would refuse in the worker."""
    check_names(adapter, shape)
    layers = target_modules(adapter, shape)
    refuse_embeddings(layers, "rotations")
    refuse_turned(layers, "boft", shape)
    odd = next((module for module in layers if not _divides(adapter.block_size, adapter, module)), None)
    if odd is None:
        return
    sizes = [size for size in range(2, odd.inputs + 1) if all(_divides(size, adapter, module) for module in layers)]
    below = max((size for size in sizes if size < adapter.block_size), default=None)
    above = min((size for size in sizes if size > adapter.block_size), default=None)
    near = " or ".join(str(size) for size in (below, above) if size)
    many = adapter.num_butterfly_factors
    mixed = f", with adapter.num_butterfly_factors {many} in an even size and {_num_joined(adapter)} blocks at a time" * (
        many > 1
    )
    remedy = f"Set adapter.block_size to {near}" if near else "No size does for all layers"
    fewer = ", set adapter.num_butterfly_factors to 1," if many > 1 else ""
    raise ModelError(
        f"adapter.block_size is {adapter.block_size}, which does not divide the {odd.inputs} inputs of {odd.name}{mixed}, as "
        f"PEFT needs it. {remedy}{fewer} or leave such layers out by adapter.exclude_modules."
    )


def _num_joined(adapter: BoftAdapter) -> int:
    """Blocks whose inputs have met after the last rotation."""
    return 2 ** (adapter.num_butterfly_factors - 1)


def _divides(size: int, adapter: BoftAdapter, module: Module) -> bool:
    is_even = size % 2 == 0 or adapter.num_butterfly_factors == 1
    return is_even and module.inputs % (size * _num_joined(adapter)) == 0


def _unread(adapter: BoftAdapter, shape: ModelShape) -> Iterator[str]:
    yield from unread_names(adapter, shape, target_modules)
    most = max((module.inputs // adapter.block_size for module in target_modules(adapter, shape)), default=0)
    if adapter.dropout > 0 and int(adapter.dropout * most) == 0:
        yield (
            f"adapter.dropout {adapter.dropout:g} is not read: it would leave out less than one of the {most} blocks that a "
            f"layer has at most."
        )


def _reasons(adapter: BoftAdapter, shape: ModelShape) -> Iterator[str]:
    if adapter.num_butterfly_factors > 1:
        yield (
            f"adapter.num_butterfly_factors is {adapter.num_butterfly_factors}: plain PEFT reads such an adapter only where it "
            f"can compile its CUDA extension, and takes it for one of another shape elsewhere. raytune reads and merges it "
            f"everywhere."
        )


METHOD = Method(
    trained=_trained,
    check=_check,
    in_words=lambda adapter, held, trained: (
        f"boft {adapter.num_butterfly_factors} x block size {adapter.block_size} on {named_targets(adapter)}{held}, {trained}"
    ),
    expert_notes=without_experts("rotations"),
    # PEFT's comparison of methods (method_comparison/MetaMathQA, Llama 3.2 3B) gives it the rate of LoRA.
    learning_rate=adapter_rate,
    epochs=adapter_epochs,
    weight_decay=0.0,  # it would draw the rotations back to none, and the factors to 0
    unread=_unread,
    reasons=_reasons,
    when="rotations, in small models: it holds the square of each layer's inputs; else oft, or lora",
)
