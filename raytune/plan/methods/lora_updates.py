"""What LoRA updates in the shape of a model, and how many numbers an update has."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from raytune.config.sections.adapter import LoraAdapter
from raytune.errors import ModelError
from raytune.plan.methods.experts import takes_experts
from raytune.plan.methods.targets import all_parameters, is_left_out, target_modules
from raytune.plan.model.module_names import has_name, is_saved, matches_end
from raytune.plan.model.shapes import ModelShape, Module


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateSize:
    """How large a low-rank update is."""

    rank: int
    num_parameters: int
    """Of A (rank x inputs) and B (outputs x rank), for each of an expert's matrices."""


def updated_layers(adapter: LoraAdapter, shape: ModelShape) -> list[Module]:
    """Linear layers and embeddings that get an update, under their full names.

    Raises:
        ModelError: if there are none, and no parameters either.
    """
    return all_updated(adapter, shape)[0]


def all_updated(adapter: LoraAdapter, shape: ModelShape) -> tuple[list[Module], list[Module]]:
    """`updated_layers` and `updated_parameters`.

    Raises:
        ModelError: as these do.
    """
    parameters = updated_parameters(adapter, shape)
    return target_modules(adapter, shape, or_none=bool(parameters)), parameters


def updated_parameters(adapter: LoraAdapter, shape: ModelShape) -> list[Module]:
    """Parameters outside linear layers that get an update, each as a module of its own: of fused experts and of routers.

    A group takes in the experts; what is named may be either.

    Raises:
        ModelError: if a name matches none of them.
    """
    theirs = all_parameters(shape)
    for name in adapter.target_parameters:
        if not any(has_name(parameter.name, [name]) for parameter in theirs):
            raise ModelError(_no_such_parameter(name, theirs, shape))
    if not theirs:
        return []
    takes_in = takes_experts(adapter.target_modules)
    return [
        parameter
        for parameter in theirs
        if has_name(parameter.name, adapter.target_parameters)
        or (takes_in and parameter.kind == "experts" and not is_left_out(parameter.name, adapter))
    ]


def _no_such_parameter(name: str, theirs: Sequence[Module], shape: ModelShape) -> str:
    said = f"adapter.target_parameters names {name!r}, which is no parameter of fused experts or routers in this model"
    if any(has_name(module.name, [name, name.removesuffix(".weight")]) for module in shape.modules() if module.is_linear):
        return f"{said}. It is a linear layer: name it in adapter.target_modules."
    in_first = sorted({name for one in theirs if (name := shape.name_in_layer(one.name))})
    return f"{said} ({shape.model_type}). " + (
        f"It has {', '.join(in_first)}." if in_first else "It has none; leave the key out."
    )


def rank_of(adapter: LoraAdapter, module: Module) -> int:
    """Rank of a module's update: that of the first matching pattern, else the adapter's."""
    ranks = (rank for pattern, rank in adapter.rank_pattern.items() if matches_end(pattern, module.name, "adapter.rank_pattern"))
    return next(ranks, adapter.rank)


def sizes_of(adapter: LoraAdapter, targets: Iterable[Module]) -> dict[str, UpdateSize]:
    """Rank and numbers of the update of each target, by its name."""
    ranks = ((target, rank_of(adapter, target)) for target in targets)
    return {
        target.name: UpdateSize(rank=rank, num_parameters=rank * target.copies * (target.inputs + target.outputs))
        for target, rank in ranks
    }


def biases_of(adapter: LoraAdapter, shape: ModelShape, targets: list[Module]) -> list[Module]:
    """Modules whose biases are trained as well, because of `adapter.bias`."""
    match adapter.bias:
        case "none":
            return []
        case "lora_only":
            return [module for module in targets if module.num_biases]
        case "all":
            # A saved module's original stays frozen, its bias too; those of fused experts are not called `bias`.
            free = (module for module in shape.modules() if not is_saved(module.name, adapter.modules_to_save))
            return [module for module in free if module.num_biases and module.kind != "experts"]
