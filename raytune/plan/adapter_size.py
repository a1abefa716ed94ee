"""Which modules an adapter changes, and how many parameters it trains; the same rules as PEFT's, without PEFT."""

import re

from raytune.config.adapter import Adapter, FullAdapter, LoraAdapter
from raytune.errors import ModelError
from raytune.plan.shapes import ModelShape, Module

_KINDS_OF_GROUP = {"all-linear": ("attention", "mlp"), "attention": ("attention",), "mlp": ("mlp",)}


def num_trainable(adapter: Adapter, shape: ModelShape) -> int:
    """Parameters that are trained.

    LoRA trains A (rank x inputs) and B (outputs x rank) of each target; DoRA a magnitude per output as well. Modules to save are
    trained in full, as copies beside the frozen original.

    Raises:
        ModelError: if a name matches nothing.
    """
    if isinstance(adapter, FullAdapter):
        return shape.num_parameters
    targets = target_modules(adapter, shape)
    updates = sum(rank_of(adapter, module) * (module.inputs + module.outputs) for module in targets)
    magnitudes = sum(module.outputs for module in targets) if adapter.use_dora else 0
    return updates + magnitudes + _num_trained_biases(adapter, shape, targets) + num_saved_copies(adapter, shape)


def target_modules(adapter: LoraAdapter, shape: ModelShape) -> list[Module]:
    """Modules that get an update, under their full names.

    Raises:
        ModelError: if there are none.
    """
    wanted = adapter.target_modules
    found = [
        module
        for module in shape.modules()
        if module.kind != "norm"
        and _is_wanted(module, wanted)
        and not _has_name(module.name, adapter.exclude_modules)
        and not _is_inside(module.name, adapter.modules_to_save)
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
    patterns = (rank for pattern, rank in adapter.rank_pattern.items() if re.match(rf"(.*\.)?({pattern})$", module.name))
    return next(patterns, adapter.rank)


def num_saved_copies(adapter: LoraAdapter, shape: ModelShape) -> int:
    """Parameters of `modules_to_save`, which are trained as copies.

    Raises:
        ModelError: if a name matches no module.
    """
    saved = {module.name: module for module in shape.modules() if _is_inside(module.name, adapter.modules_to_save)}
    for name in adapter.modules_to_save:
        if not any(_is_inside(module, [name]) for module in saved):
            others = ", ".join(module.name for module in (*shape.embeddings, shape.final_norm, shape.head))
            raise ModelError(
                f"adapter.modules_to_save names {name!r}, which this {shape.model_type} model does not have. "
                f"It has {others}, and the modules of its layers."
            )
    return sum(module.num_parameters for module in saved.values())


def _is_wanted(module: Module, wanted: str | list[str]) -> bool:
    if isinstance(wanted, list):
        return _has_name(module.name, wanted)
    if wanted in _KINDS_OF_GROUP:
        return module.kind in _KINDS_OF_GROUP[wanted]
    return re.fullmatch(wanted, module.name) is not None


def _has_name(name: str, wanted: list[str]) -> bool:
    return any(name == one or name.endswith(f".{one}") for one in wanted)


def _is_inside(name: str, wanted: list[str]) -> bool:
    """Whether a module is one of the named ones, or a part of it."""
    return any(re.match(rf"(^|.*\.){re.escape(one)}($|\..*)", name) for one in wanted)


def _num_trained_biases(adapter: LoraAdapter, shape: ModelShape, targets: list[Module]) -> int:
    match adapter.bias:
        case "none":
            return 0
        case "lora_only":
            return sum(module.num_biases for module in targets)
        case "all":
            # A saved module's original stays frozen, its bias too.
            return sum(m.num_biases for m in shape.modules() if not _is_inside(m.name, adapter.modules_to_save))
