"""LoHa in a plan: four matrices for each layer, and the whole update that they make in every pass."""

from collections.abc import Iterator

from raytune.config.sections.adapter import LohaAdapter
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


def _trained(adapter: LohaAdapter, shape: ModelShape, quantization: Quantization | None) -> Trained:
    def addition(module: Module) -> Addition:
        sides = module.inputs + module.outputs
        return Addition(
            num_parameters=2 * adapter.rank * sides,
            num_sides=2 * (sides + 2 * adapter.rank),
            num_made=module.inputs * module.outputs,
            # The update's gradient, scaled, and for each pair of matrices what it is multiplied by and the product.
            making_back=5 * module.inputs * module.outputs,
        )

    layers = target_modules(adapter, shape)
    # Under autocast the product of its matrices is in the run's precision, and so computes with the layer's own inputs.
    return trained_in_layers(adapter, shape, quantization, layers, addition, how="product", reads_inputs=True, casts_inputs=False)


def _unread(adapter: LohaAdapter, shape: ModelShape) -> Iterator[str]:
    return unread_names(adapter, shape, target_modules)


METHOD = Method(
    trained=_trained,
    check=checked_products("LoHa"),
    in_words=lambda adapter, held, trained: f"loha rank {adapter.rank} on {named_targets(adapter)}{held}, {trained}",
    expert_notes=without_experts("Hadamard products"),
    # PEFT's comparison of methods (method_comparison/MetaMathQA, Llama 3.2 3B) gives it the rate of LoRA.
    learning_rate=adapter_rate,
    epochs=adapter_epochs,
    weight_decay=0.0,  # as low-rank updates: the rank already limits what it can do
    unread=_unread,
    when="updates of rank up to the square of `rank`; as large as the weights while it computes",
)
