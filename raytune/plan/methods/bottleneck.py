"""Bottleneck adapters in a plan: where they stand, how wide they are, and how a plan speaks of them."""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from raytune.config.sections.adapter import BottleneckAdapter
from raytune.config.sections.model import Quantization
from raytune.config.sections.quantization import HeldBase
from raytune.config.sections.run import RunConfig
from raytune.errors import ModelError
from raytune.plan.defaults import adapter_epochs, adapter_rate
from raytune.plan.methods.experts import how_experts_are_held, of_experts, packed_experts
from raytune.plan.methods.layers import Addition, named_targets, trained_in_layers, unread_names, ways_back
from raytune.plan.methods.method import Method
from raytune.plan.methods.targets import check_names, target_modules
from raytune.plan.model.shapes import ModelShape, Module
from raytune.plan.model.trained import Trained

PLACES = ("attention-mlp", "attention", "mlp")
WAYS_OUT = ("o_proj", "out_proj", "c_proj", "dense", "wo", "proj_out", "out_lin")
"""Last parts of names of attention's last layer."""
KEPT_INSIDE = {"relu": 1, "gelu": 2, "silu": 2, "tanh": 1}
"""Numbers that autograd keeps for each inside a network: what the activation gives, and, where its gradient asks for it, gets."""


def places(where: str, attention: list[str], mlp: list[str], blocks: list[str]) -> list[str]:
    """Full names of the modules that a place stands for: the last layers of attention and of MLPs, and whole mixtures.

    Args:
        where: one of `PLACES`.
        attention, mlp: full names of the linear layers of attention and MLPs.
        blocks: of mixtures of experts, which give what their experts and all around these add up to.
    """
    found = []
    if "attention" in where:
        found += [name for name in attention if name.rpartition(".")[2] in WAYS_OUT]
    if "mlp" in where:
        found += [*blocks, *(name for name in ways_back(mlp) if not name.startswith(tuple(f"{block}." for block in blocks)))]
    return found


def block_of(name: str) -> str:
    """The mixture that fused experts of a name belong to; empty: it is the layer itself."""
    return name.rpartition(".")[0]


@lru_cache(maxsize=4)
def with_blocks(shape: ModelShape) -> ModelShape:
    """The shape with mixtures of experts as modules of their layers, as wide as the model."""

    def layer_with(layer: tuple[Module, ...]) -> tuple[Module, ...]:
        blocks = dict.fromkeys(block_of(module.name) for module in layer if module.kind == "experts")
        added = (Module(name=name, kind="mlp", inputs=shape.hidden, outputs=shape.hidden) for name in blocks if name)
        return (*layer, *added)

    return replace(shape, layer=layer_with(shape.layer), other_layers=tuple(map(layer_with, shape.other_layers)))


def placed_behind(adapter: BottleneckAdapter, shape: ModelShape) -> list[Module]:
    """Modules behind which a network stands, under their full names.

    Raises:
        ModelError: if there are none, or a name matches none.
    """
    whole = with_blocks(shape)
    if adapter.target_modules not in PLACES:
        return target_modules(adapter, whole)
    of_kind = {kind: _linear(shape, kind) for kind in ("attention", "mlp")}
    names = places(adapter.target_modules, of_kind["attention"], of_kind["mlp"], _blocks(shape))
    if not names:
        raise ModelError(
            f"adapter.target_modules {adapter.target_modules} knows no layer of this {shape.model_type} model by its name. Its "
            f"layers have {', '.join(module.name for module in shape.layer if module.is_linear)}: name the last of attention and "
            f"that of the MLP."
        )
    return target_modules(adapter.model_copy(update={"target_modules": names}), whole)


def _linear(shape: ModelShape, kind: str) -> list[str]:
    seen = (module for module in shape.modules() if module.kind == kind and not module.is_bypassed)
    return [module.name for module in seen if module.name.rpartition(".")[2] not in shape.names_of_experts]


def _blocks(shape: ModelShape) -> list[str]:
    theirs = {module.name for module in with_blocks(shape).modules()} - {module.name for module in shape.modules()}
    return [module.name for module in with_blocks(shape).modules() if module.name in theirs]


def width_behind(adapter: BottleneckAdapter, outputs: int) -> int:
    """How wide a network is inside that stands behind so many outputs."""
    return adapter.width or max(1, outputs // adapter.reduction)


def _addition(adapter: BottleneckAdapter, module: Module) -> Addition:
    width, outputs = width_behind(adapter, module.outputs), module.outputs
    return Addition(
        num_parameters=2 * width * outputs + width + outputs,
        num_sides=3 * (width + outputs),
        # What it stands behind is kept too, since it reads it.
        inner_width=outputs + (KEPT_INSIDE[adapter.activation] + (adapter.dropout > 0)) * width,
    )


def _trained(adapter: BottleneckAdapter, shape: ModelShape, quantization: Quantization | None) -> Trained:
    layers = placed_behind(adapter, shape)
    return trained_in_layers(adapter, shape, quantization, layers, lambda module: _addition(adapter, module), how="network")


def _check(adapter: BottleneckAdapter, config: RunConfig, held: HeldBase, shape: ModelShape) -> None:
    """Refuse what has no place in the layers."""
    check_names(adapter, with_blocks(shape))
    if adapter.target_modules == "all-linear":
        raise ModelError(
            f"adapter.target_modules all-linear is no place of a bottleneck. Set it to {' or '.join(PLACES)}, or name layers."
        )
    embedding = next((module.name for module in placed_behind(adapter, shape) if module.kind == "embedding"), None)
    if embedding:
        raise ModelError(
            f"adapter.target_modules takes in the embedding {embedding}, and bottlenecks stand in layers. Name linear layers "
            f"only; adapter.modules_to_save trains it in full."
        )


def _expert_notes(
    adapter: BottleneckAdapter, shape: ModelShape, trained: Trained, quantization: Quantization | None
) -> list[str]:
    in_full = any(part.kind == "experts" for part in trained.parts)
    said = (
        "adapter.modules_to_save trains them in full."
        if in_full
        else "They are not trained; a bottleneck reads what they add up to."
    )
    held = how_experts_are_held(packed_experts(adapter, shape, quantization), shape, trained, quantization, "")
    return [f"{of_experts(shape)}. {said}{held}"]


def _in_words(adapter: BottleneckAdapter, held: str, trained: str) -> str:
    width = f"width {adapter.width}" if adapter.width else f"reduction {adapter.reduction}"
    return f"bottleneck {width} behind {named_targets(adapter)}{held}, {trained}"


def _unread(adapter: BottleneckAdapter, shape: ModelShape) -> Iterator[str]:
    return unread_names(adapter, shape, placed_behind)


def _reasons(adapter: BottleneckAdapter, shape: ModelShape) -> Iterator[str]:
    yield (
        "Networks of adapter.method bottleneck are not linear, so that no weight of the base can hold them: nothing merges. "
        "raytune reads what is saved, plain PEFT does not."
    )


METHOD = Method(
    trained=_trained,
    check=_check,
    in_words=_in_words,
    expert_notes=_expert_notes,
    # Houlsby et al. 2019 and Pfeiffer et al. 2021 take 1e-4 to 3e-4, which is what low-rank updates take.
    learning_rate=adapter_rate,
    epochs=adapter_epochs,
    weight_decay=0.0,  # as low-rank updates: the width already limits what it can do
    unread=_unread,
    reasons=_reasons,
    when="something new on top of what stays: not linear, so it never merges and costs time in every answer",
)
