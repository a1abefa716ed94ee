"""(IA)^3 in a plan: which layers get factors, on which side, and how a plan speaks of it."""

from collections.abc import Iterator
from dataclasses import replace

from raytune.config.sections.adapter import Ia3Adapter
from raytune.config.sections.model import Quantization
from raytune.config.sections.quantization import HeldBase
from raytune.config.sections.run import RunConfig
from raytune.errors import ModelError
from raytune.plan.defaults import adapter_epochs, adapter_rate
from raytune.plan.methods.layers import (
    Addition,
    named_targets,
    refuse_embeddings,
    trained_in_layers,
    unread_names,
    ways_back,
    without_experts,
)
from raytune.plan.methods.method import Method
from raytune.plan.methods.targets import check_names, target_modules
from raytune.plan.model.module_names import has_name
from raytune.plan.model.shapes import ModelShape, Module
from raytune.plan.model.trained import Trained

PAPER = "keys-values-mlp"
KEYS_AND_VALUES = (
    "k_proj", "v_proj", "key", "value", "key_proj", "value_proj",
    "qkv_proj", "c_attn", "query_key_value", "Wqkv", "W_pack",
)  # fmt: skip
"""Last parts of names of layers that give keys or values, or all of queries, keys and values."""
MAX_RATE = 1e-2


def paper_targets(attention: list[str], mlp: list[str]) -> list[str]:
    """Full names of the layers that the paper multiplies, out of those of attention and of the MLPs."""
    keys_and_values = [name for name in attention if name.rpartition(".")[2] in KEYS_AND_VALUES]
    return [*keys_and_values, *ways_back(mlp)]


def is_of_feedforward(name: str, adapter: Ia3Adapter, backs: set[str]) -> bool:
    """Whether the inputs of a layer are multiplied, and not its outputs.

    Args:
        backs: full names of the MLPs' ways back.
    """
    named = adapter.feedforward_modules
    return name in backs if named == "auto" else has_name(name, named)


def scaled_layers(adapter: Ia3Adapter, shape: ModelShape) -> list[Module]:
    """Linear layers that get factors, under their full names.

    Raises:
        ModelError: if there are none, or a name matches none.
    """
    if adapter.target_modules != PAPER:
        return target_modules(adapter, shape)
    by_kind = {kind: _names(shape, kind) for kind in ("attention", "mlp")}
    names = paper_targets(by_kind["attention"], by_kind["mlp"])
    if not names:
        raise ModelError(
            f"adapter.target_modules {PAPER} knows no layer of this {shape.model_type} model by its name. Its layers have "
            f"{', '.join(module.name for module in shape.layer if module.is_linear)}: name those that give keys and values, and "
            f"the MLP's last as adapter.feedforward_modules too."
        )
    return target_modules(adapter.model_copy(update={"target_modules": names}), shape)


def _names(shape: ModelShape, kind: str) -> list[str]:
    seen = (module for module in shape.modules() if module.kind == kind and not module.is_bypassed)
    return [module.name for module in seen if module.name.rpartition(".")[2] not in shape.names_of_experts]


def _trained(adapter: Ia3Adapter, shape: ModelShape, quantization: Quantization | None) -> Trained:
    backs = {*ways_back(_names(shape, "mlp"))}

    def addition(module: Module) -> Addition:
        if is_of_feedforward(module.name, adapter, backs):
            width = module.inputs
            sides = Addition(num_parameters=width, num_sides=width + 1, scaled_inputs=width, changed_inputs=width)
        else:
            width = module.outputs
            sides = Addition(num_parameters=width, num_sides=width + 1, inner_width=width)
        # The gradient of what is multiplied, those of both that are, and the latter before it is summed.
        return replace(sides, passing_back=3 * width, passing_back_as_it_is=3 * width)

    return trained_in_layers(adapter, shape, quantization, scaled_layers(adapter, shape), addition, how="scale")


def _check(adapter: Ia3Adapter, config: RunConfig, held: HeldBase, shape: ModelShape) -> None:
    """Refuse what PEFT would refuse in the worker, or not hear."""
    check_names(adapter, shape)
    layers = scaled_layers(adapter, shape)
    refuse_embeddings(layers, "factors")
    named = [] if adapter.feedforward_modules == "auto" else adapter.feedforward_modules
    for name in named:
        if not any(has_name(module.name, [name]) for module in layers):
            raise ModelError(
                f"adapter.feedforward_modules names {name!r}, which is not among the layers that get factors: "
                f"{', '.join(sorted({module.name.rpartition('.')[2] for module in layers}))}."
            )


def _unread(adapter: Ia3Adapter, shape: ModelShape) -> Iterator[str]:
    return unread_names(adapter, shape, scaled_layers)


METHOD = Method(
    trained=_trained,
    check=_check,
    in_words=lambda adapter, held, trained: f"ia3 on {named_targets(adapter)}{held}, {trained}",
    expert_notes=without_experts("factors"),
    # Liu et al. 2022 take 3e-3 for 3B, about ten times what low-rank updates take there.
    learning_rate=lambda num_parameters: min(MAX_RATE, 10 * adapter_rate(num_parameters)),
    epochs=adapter_epochs,
    weight_decay=0.0,  # it would draw the factors to 0, and so the base
    unread=_unread,
    when="few rows and very many tasks: the smallest adapters; learns less than lora",
)
