"""What methods share that add something to layers: what is trained of all of them, what is refused, and their words."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from raytune.config.sections.model import Quantization
from raytune.config.sections.quantization import HeldBase
from raytune.config.sections.run import RunConfig
from raytune.errors import ModelError, UserError
from raytune.plan.methods.experts import how_experts_are_held, most_in_a_module, of_experts, packed_experts
from raytune.plan.methods.targets import NamesTargets, check_names, in_short, saved_modules, target_modules, unread_exclusions
from raytune.plan.model.shapes import LINEAR_KINDS, ModelShape, Module
from raytune.plan.model.trained import How, Trained, TrainedPart, lowest_layer, whole_parts

WAYS_BACK = ("down_proj", "fc2", "c_proj", "dense_4h_to_h", "fc_out", "w2", "wo", "linear_out")
"""Last parts of names of an MLP's last layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Addition:
    """What a method adds to a layer."""

    num_parameters: int
    """That are trained."""
    num_sides: int
    """Rows and columns of the trained matrices."""
    inner_width: int = 0
    """Numbers per token that it keeps beside the layer's inputs."""
    width_in_16_bits: int = 0
    """Numbers per token that it keeps besides where products are in 16 bits."""
    scaled_inputs: int = 0
    """Width of the inputs that it multiplies by trained factors."""
    passing_ahead: int = 0
    """Numbers per token that pass while it is computed, as of `Trained`."""
    passing_back: int = 0
    """Numbers per token that pass on the way back."""
    passing_back_as_it_is: int = 0
    """Of these, as many as pass where nothing is cast."""
    changed_inputs: int = 0
    """Width of what it has the layer compute with in place of its inputs."""
    frozen_inputs: int = 0
    """Width of what a frozen matrix of its own reads."""
    num_made: int = 0
    """Numbers of matrices that it makes of these in each pass."""
    making_ahead: int = 0
    """Numbers that pass while it makes these, as of `Trained`."""
    making_back: int = 0
    """Numbers that pass when their gradient is on the way back."""
    num_applied: int = 0
    """Numbers of a matrix among these that tokens are multiplied by, in place of what is trained."""
    making_flops: int = 0
    """Floating-point operations of making these in a forward pass, where they are many."""


def trained_in_layers(
    adapter: NamesTargets,
    shape: ModelShape,
    quantization: Quantization | None,
    layers: Sequence[Module],
    addition: Callable[[Module], Addition],
    *,
    how: How,
    reads_inputs: bool = False,
    casts_inputs: bool = True,
    drops_inputs: bool = False,
    num_constants: int = 0,
    num_followed: int = 0,
) -> Trained:
    """What is trained where a method adds the like to each of some layers.

    Args:
        addition: what it adds to a layer.
        how, reads_inputs, casts_inputs, drops_inputs, num_constants, num_followed: as of `Trained`.
    """
    added = {module.name: addition(module) for module in layers}
    parts = [TrainedPart(name=one.name, kind=one.kind, how=how, num_parameters=added[one.name].num_parameters) for one in layers]
    saved = whole_parts(saved_modules(adapter, shape))
    inside = [module for module in layers if module.kind in LINEAR_KINDS]
    packed = packed_experts(adapter, shape, quantization)
    return Trained(
        parts=(*parts, *saved),
        lowest_layer=lowest_layer([part.name for part in (*parts, *saved)], shape),
        num_sides=sum(one.num_sides for one in added.values()) + sum(part.num_parameters for part in saved),
        reads_inputs=reads_inputs,
        target_inputs=sum(module.inputs for module in inside) if reads_inputs else 0,
        inner_width=sum(added[module.name].inner_width for module in inside),
        width_in_16_bits=sum(added[module.name].width_in_16_bits for module in inside),
        scaled_inputs=sum(added[module.name].scaled_inputs for module in inside),
        casts_inputs=casts_inputs,
        changed_inputs=sum(added[module.name].changed_inputs for module in inside),
        frozen_inputs=sum(added[module.name].frozen_inputs for module in inside),
        passing_ahead=max((one.passing_ahead for one in added.values()), default=0),
        passing_back=max((one.passing_back for one in added.values()), default=0),
        passing_back_as_it_is=max((one.passing_back_as_it_is for one in added.values()), default=0),
        num_made=sum(added[module.name].num_made for module in inside),
        making_ahead=max((one.making_ahead for one in added.values()), default=0),
        making_back=max((one.making_back for one in added.values()), default=0),
        num_applied=sum(one.num_applied for one in added.values()),
        making_flops=sum(one.making_flops for one in added.values()),
        num_constants=num_constants,
        num_followed=num_followed,
        drops_inputs=drops_inputs,
        num_packed=sum(one.num_parameters for one in packed),
        num_packed_per_layer=most_in_a_module(packed),
        largest_packed=max((one.num_parameters for one in packed), default=0),
    )


def ways_back(mlp: list[str]) -> list[str]:
    """The last layers of MLPs, out of the full names of all their layers."""
    return [name for name in mlp if name.rpartition(".")[2] in WAYS_BACK]


def refuse_embeddings(layers: Iterable[Module], what: str) -> None:
    """Refuse embeddings among the layers that get something.

    Args:
        what: they would get, which PEFT has not for them.

    Raises:
        ModelError: naming the first.
    """
    embedding = next((module.name for module in layers if module.kind == "embedding"), None)
    if embedding:
        raise ModelError(
            f"adapter.target_modules takes in the embedding {embedding}, for which PEFT has no {what}. Name linear layers only; "
            f"adapter.modules_to_save trains it in full."
        )


def refuse_turned(layers: Iterable[Module], method: str, shape: ModelShape) -> None:
    """Refuse layers of transformers' Conv1D, which PEFT does not take for linear ones.

    Raises:
        ModelError: naming the first.
    """
    turned = next((module.name for module in layers if module.is_turned), None)
    if turned:
        raise ModelError(
            f"adapter.method {method} has nothing for {turned}: layers of a {shape.model_type} model are transformers' Conv1D, "
            f"which PEFT does not take for linear ones here. Set adapter.method to lora or vera, or exclude them."
        )


def refuse_quantised(held: HeldBase, method: str) -> None:
    """Refuse a quantised base under a method whose updates have the shape of a weight, which packed numbers do not have.

    Raises:
        UserError: with the settings that work.
    """
    if held.quantization is not None:
        key = held.key("format")
        raise UserError(
            f"{key} is {held.quantization.format}, but adapter.method is {method}, whose updates PEFT gives the shape of the "
            f"layers' weights, which packed numbers have not. Set adapter.method to lora, or {held.to_undo}.",
            keys=(key, "adapter.method"),
        )


def checked_products(name: str) -> Callable[[NamesTargets, RunConfig, HeldBase, ModelShape], None]:
    """`Method.check` of a method whose updates are products as large as the weights: what PEFT would refuse in the worker.

    Args:
        name: of the method, as its authors write it.
    """

    def check(adapter: NamesTargets, config: RunConfig, held: HeldBase, shape: ModelShape) -> None:
        check_names(adapter, shape)
        layers = target_modules(adapter, shape)
        refuse_embeddings(layers, name)
        refuse_turned(layers, name.lower(), shape)
        refuse_quantised(held, name.lower())

    return check


def unread_names(adapter: Any, shape: ModelShape, layers_of: Callable[[Any, ModelShape], list[Module]]) -> Iterator[str]:
    """A sentence for each exclusion that leaves none of a section's layers out.

    Args:
        adapter: a section that names targets.
        layers_of: gives the layers of a section.
    """
    if adapter.exclude_modules:
        without = adapter.model_copy(update={"exclude_modules": []})
        kept = {module.name for module in layers_of(adapter, shape)}
        yield from unread_exclusions(adapter, {module.name for module in layers_of(without, shape)} - kept)


def named_targets(adapter: NamesTargets) -> str:
    """The targets of a section in a line."""
    return in_short(adapter.target_modules)


def without_experts(what: str) -> Callable[[NamesTargets, ModelShape, Trained, Quantization | None], list[str]]:
    """Words about fused experts, for a method that adds nothing to them.

    Args:
        what: layers get, and experts do not, after "PEFT has no".
    """

    def notes(adapter: NamesTargets, shape: ModelShape, trained: Trained, quantization: Quantization | None) -> list[str]:
        in_full = any(part.kind == "experts" for part in trained.parts)
        said = (
            "adapter.modules_to_save trains them in full." if in_full else f"They are not trained: PEFT has no {what} for them."
        )
        held = how_experts_are_held(packed_experts(adapter, shape, quantization), shape, trained, quantization, "")
        return [f"{of_experts(shape)}. {said}{held}"]

    return notes
