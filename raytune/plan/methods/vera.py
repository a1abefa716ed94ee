"""VeRA in a plan: factors of each layer, and the random matrices that all layers share."""

from collections.abc import Iterator

from raytune.config.sections.adapter import VeraAdapter
from raytune.config.sections.model import Quantization
from raytune.config.sections.quantization import HeldBase
from raytune.config.sections.run import RunConfig
from raytune.plan.defaults import adapter_epochs, adapter_rate
from raytune.plan.methods.layers import (
    Addition,
    named_targets,
    refuse_embeddings,
    trained_in_layers,
    unread_names,
    without_experts,
)
from raytune.plan.methods.method import Method
from raytune.plan.methods.targets import check_names, target_modules
from raytune.plan.model.shapes import ModelShape, Module
from raytune.plan.model.trained import Trained

MAX_RATE = 1e-2


def _trained(adapter: VeraAdapter, shape: ModelShape, quantization: Quantization | None) -> Trained:
    def addition(module: Module) -> Addition:
        width = module.outputs + adapter.rank
        # What runs between the shared matrices and what leaves them is multiplied by factors, and kept for their gradients.
        return Addition(
            num_parameters=width,
            num_sides=width + 2,
            inner_width=width,
            frozen_inputs=adapter.rank,
            # What a layer gives in fp32, the update, and their sum.
            passing_ahead=3 * module.outputs,
            # The gradient of that sum, those of the factors before they are summed and of what they multiply, and this, cast.
            passing_back=4 * module.outputs,
            passing_back_as_it_is=3 * module.outputs,
        )

    layers = target_modules(adapter, shape)
    # As wide as the widest layers; PEFT slices them for the others.
    shared = max(module.inputs for module in layers) + max(module.outputs for module in layers)
    return trained_in_layers(
        adapter,
        shape,
        quantization,
        layers,
        addition,
        how="scale",
        drops_inputs=adapter.dropout > 0,
        num_constants=adapter.rank * shared,
    )


def _check(adapter: VeraAdapter, config: RunConfig, held: HeldBase, shape: ModelShape) -> None:
    """Refuse what PEFT would refuse in the worker."""
    check_names(adapter, shape)
    refuse_embeddings(target_modules(adapter, shape), "VeRA")


def _unread(adapter: VeraAdapter, shape: ModelShape) -> Iterator[str]:
    return unread_names(adapter, shape, target_modules)


METHOD = Method(
    trained=_trained,
    check=_check,
    in_words=lambda adapter, held, trained: f"vera rank {adapter.rank} on {named_targets(adapter)}{held}, {trained}",
    expert_notes=without_experts("shared matrices"),
    # Kopiczko et al. 2024 take 4e-3 for Llama 2 7B, ten times and more what low-rank updates take there.
    learning_rate=lambda num_parameters: min(MAX_RATE, 20 * adapter_rate(num_parameters)),
    epochs=adapter_epochs,
    weight_decay=0.0,  # it would draw the factors to 0
    unread=_unread,
    when="the smallest files; needs a rate of its own",
)
