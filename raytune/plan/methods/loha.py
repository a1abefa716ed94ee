"""LoHa in a plan: four matrices for each layer, and the whole update that they make in every pass."""

from collections.abc import Iterator

from raytune.config.adapter import LohaAdapter
from raytune.config.model import Quantization
from raytune.config.quantization import HeldBase
from raytune.config.run import RunConfig
from raytune.plan.defaults import adapter_epochs, adapter_rate
from raytune.plan.methods.layers import (
    Addition,
    named_targets,
    refuse_embeddings,
    refuse_quantised,
    refuse_turned,
    trained_in_layers,
    unread_names,
    without_experts,
)
from raytune.plan.methods.method import Method
from raytune.plan.methods.targets import check_names, target_modules
from raytune.plan.shapes import ModelShape, Module
from raytune.plan.trained import Trained


def _trained(adapter: LohaAdapter, shape: ModelShape, quantization: Quantization | None) -> Trained:
    def addition(module: Module) -> Addition:
        sides = module.inputs + module.outputs
        return Addition(
            num_parameters=2 * adapter.rank * sides,
            num_sides=2 * (sides + 2 * adapter.rank),
            num_made=module.inputs * module.outputs,
        )

    layers = target_modules(adapter, shape)
    # Under autocast the product of its matrices is in the run's precision, and so computes with the layer's own inputs.
    return trained_in_layers(adapter, shape, quantization, layers, addition, how="product", reads_inputs=True, casts_inputs=False)


def _check(adapter: LohaAdapter, config: RunConfig, held: HeldBase, shape: ModelShape) -> None:
    """Refuse what PEFT would refuse in the worker."""
    check_names(adapter, shape)
    layers = target_modules(adapter, shape)
    refuse_embeddings(layers, "LoHa")
    refuse_turned(layers, "loha", shape)
    refuse_quantised(held, "loha")


def _unread(adapter: LohaAdapter, shape: ModelShape) -> Iterator[str]:
    return unread_names(adapter, shape, target_modules)


METHOD = Method(
    trained=_trained,
    check=_check,
    in_words=lambda adapter, held, trained: f"loha rank {adapter.rank} on {named_targets(adapter)}{held}, {trained}",
    expert_notes=without_experts("Hadamard products"),
    # PEFT's comparison of methods (method_comparison/MetaMathQA, Llama 3.2 3B) gives it the rate of LoRA.
    learning_rate=adapter_rate,
    epochs=adapter_epochs,
    weight_decay=0.0,  # as low-rank updates: the rank already limits what it can do
    unread=_unread,
    when="updates of rank up to the square of `rank`; as large as the weights while it computes",
)
