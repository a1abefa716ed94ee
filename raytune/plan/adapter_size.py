"""Which modules an adapter changes, and how many parameters it trains; the same rules as PEFT's, without PEFT."""

import re
from dataclasses import dataclass

from raytune.config.adapter import Adapter, FullAdapter, LoraAdapter
from raytune.errors import ModelError
from raytune.plan.shapes import ModelShape, Module

WITHOUT_UPDATE = ("norm", "experts", "router")
"""Kinds of modules that are no layers of PEFT's."""
_KINDS_OF_GROUP = {"all-linear": ("attention", "mlp"), "attention": ("attention",), "mlp": ("mlp",)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedSize:
    """What is trained, in numbers."""

    num_trainable: int
    """Parameters that are trained, an adapter's or the model's own."""
    target_inputs: int = 0
    """Widths of the inputs of all layers that get an update."""
    target_ranks: int = 0
    """Ranks of all updates."""
    num_sides: int
    """Rows and columns of all trained matrices."""


def trained_size(adapter: Adapter, shape: ModelShape) -> TrainedSize:
    """Count what is trained.

    LoRA trains A (rank x inputs) and B (outputs x rank) of each target; DoRA a magnitude per output as well. Modules to save are
    trained in full, as copies beside the frozen original.

    Raises:
        ModelError: if a name matches nothing, or a pattern is no regular expression.
    """
    if isinstance(adapter, FullAdapter):
        sides = sum(module.inputs + module.outputs + module.num_biases for module in shape.modules())
        return TrainedSize(num_trainable=shape.num_parameters, num_sides=sides)
    targets = target_modules(adapter, shape)
    updates = sum(rank_of(adapter, module) * (module.inputs + module.outputs) for module in targets)
    copies = sum(module.num_parameters for module in saved_modules(adapter, shape))
    magnitudes = sum(module.outputs for module in targets) if adapter.use_dora else 0
    in_layers = [module for module in targets if module.kind in ("attention", "mlp")]
    return TrainedSize(
        num_trainable=updates + magnitudes + num_trained_biases(adapter, shape, targets) + copies,
        target_inputs=sum(module.inputs for module in in_layers),
        target_ranks=sum(rank_of(adapter, module) for module in in_layers),
        num_sides=sum(module.inputs + module.outputs for module in targets) + magnitudes + copies,
    )


def target_modules(adapter: LoraAdapter, shape: ModelShape) -> list[Module]:
    """Modules that get an update, under their full names.

    Raises:
        ModelError: if there are none.
    """
    wanted = adapter.target_modules
    found = [
        module
        for module in shape.modules()
        if module.kind not in WITHOUT_UPDATE
        and _is_wanted(module, wanted)
        and not _has_name(module.name, adapter.exclude_modules)
        and not _is_left_to_saving(module.name, adapter.modules_to_save)
    ]
    if not found:
        own = sorted({module.name.rpartition(".")[2] for module in shape.layer if module.is_linear})
        regex = " A single string is a regular expression that must match a whole name; give a list for names."
        raise ModelError(
            f"adapter.target_modules {wanted!r} matches no module of this {shape.model_type} model"
            f"{' that is not excluded' if adapter.exclude_modules or adapter.modules_to_save else ''}. Its linear layers are "
            f"{', '.join(own)} (for example {shape.layers_name}.0.{next(m.name for m in shape.layer if m.is_linear)})."
            + (regex if isinstance(wanted, str) and wanted not in _KINDS_OF_GROUP else "")
        )
    return found


def rank_of(adapter: LoraAdapter, module: Module) -> int:
    """Rank of a module's update: that of the first matching pattern, else the adapter's."""
    ranks = (
        rank
        for pattern, rank in adapter.rank_pattern.items()
        if _matches(rf"(.*\.)?({pattern})", module.name, "adapter.rank_pattern")
    )
    return next(ranks, adapter.rank)


def saved_modules(adapter: LoraAdapter, shape: ModelShape) -> list[Module]:
    """Modules that are trained in full, as copies.

    Raises:
        ModelError: if a name matches none.
    """
    for name in adapter.modules_to_save:
        if not any(_is_saved(module.name, [name]) for module in shape.modules()):
            others = ", ".join(module.name for module in (*shape.embeddings, shape.final_norm, shape.head))
            raise ModelError(
                f"adapter.modules_to_save names {name!r}, which this {shape.model_type} model does not have. "
                f"It has {others}, and the modules of its layers."
            )
    wanted = adapter.modules_to_save
    return [module for module in shape.modules() if _is_saved(module.name, wanted)] if wanted else []


def _is_wanted(module: Module, wanted: str | list[str]) -> bool:
    if isinstance(wanted, list):
        return _has_name(module.name, wanted)
    if wanted in _KINDS_OF_GROUP:
        return module.kind in _KINDS_OF_GROUP[wanted]
    return _matches(wanted, module.name, "adapter.target_modules")


def _matches(pattern: str, name: str, setting: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ModelError(f"{setting}: {pattern!r} is not a regular expression: {error}.") from error


def _has_name(name: str, wanted: list[str]) -> bool:
    return any(name == one or name.endswith(f".{one}") for one in wanted)


def _is_saved(name: str, wanted: list[str]) -> bool:
    """Whether a module, or one that it is a part of, is saved: PEFT asks for the end of a name only, so `norm` is every norm."""
    parts = name.split(".")
    paths = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
    return any(path.endswith(one) for path in paths for one in wanted)


def _is_left_to_saving(name: str, wanted: list[str]) -> bool:
    """Whether PEFT adds no update because the module is saved; here whole parts of names must agree."""
    return any(re.match(rf"(^|.*\.){re.escape(one)}($|\..*)", name) for one in wanted)


def num_trained_biases(adapter: LoraAdapter, shape: ModelShape, targets: list[Module]) -> int:
    """Biases that `adapter.bias` adds to what is trained."""
    match adapter.bias:
        case "none":
            return 0
        case "lora_only":
            return sum(module.num_biases for module in targets)
        case "all":
            # A saved module's original stays frozen, its bias too.
            return sum(m.num_biases for m in shape.modules() if not _is_saved(m.name, adapter.modules_to_save))
