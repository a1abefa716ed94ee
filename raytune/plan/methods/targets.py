"""Which modules a section's names and groups mean, in the shape of a model: PEFT's rules, without PEFT."""

import re
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

from raytune.errors import ModelError
from raytune.plan.model.module_names import ends_of, has_name, is_left_to_saving, is_saved, matches, paths_to
from raytune.plan.model.shapes import LINEAR_KINDS, Matrix, ModelShape, Module

WITHOUT_UPDATE = ("norm", "experts", "router", "state")
"""Kinds of modules that are no layers of PEFT's."""
KINDS_OF_GROUP = {"all-linear": LINEAR_KINDS, "attention": ("attention",), "mlp": ("mlp",)}
_TARGETS = "adapter.target_modules"
_NUMBERED = re.compile(r"(.*?\.)(\d+)\.(.+)")
"""Name of a layer's module: the list of layers, the layer's number, and the name in it."""


class NamesTargets(Protocol):
    """An adapter section that names layers."""

    @property
    def target_modules(self) -> str | list[str]: ...
    @property
    def exclude_modules(self) -> list[str]: ...
    @property
    def modules_to_save(self) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class NoTargets:
    """Of a method that names no layers."""

    target_modules: list[str] = field(default_factory=list)
    exclude_modules: list[str] = field(default_factory=list)
    modules_to_save: list[str] = field(default_factory=list)


NO_TARGETS = NoTargets()


def target_modules(adapter: NamesTargets, shape: ModelShape, *, or_none: bool = False) -> list[Module]:
    """Linear layers and embeddings that get an update, under their full names.

    Args:
        or_none: whether there may be none, because parameters outside of layers are targets too.

    Raises:
        ModelError: if there are none, or a name matches none.
    """
    wanted = adapter.target_modules
    layers = [module for module in shape.modules() if module.kind not in WITHOUT_UPDATE or module.is_linear_layer]
    found = [
        module
        for module in layers
        if _is_wanted(module, wanted, shape)
        and not has_name(module.name, adapter.exclude_modules)
        and not is_left_to_saving(module.name, adapter.modules_to_save)
    ]
    missing: list[str] = []
    if isinstance(wanted, list):
        known = {end for module in layers for end in ends_of(module.name)}
        missing = [name for name in wanted if name not in known]
    if missing or not (found or or_none):
        raise ModelError(_no_such_layer(missing or wanted, adapter, shape))
    return found


def _no_such_layer(wanted: str | list[str], adapter: NamesTargets, shape: ModelShape) -> str:
    linear = [module for module in shape.modules() if module.is_linear and module.name.startswith(f"{shape.layers_name}.")]
    own = sorted({module.name.rpartition(".")[2] for module in linear})
    is_pattern = isinstance(wanted, str) and wanted not in KINDS_OF_GROUP
    regex = " A single string is a regular expression that must match a whole name; give a list for names." if is_pattern else ""
    experts = expert_parameters(shape)
    fused = f" Its fused experts are parameters, for adapter.target_parameters: {', '.join(experts)}." if experts else ""
    others = [f"adapter.{name} leaves to it" for name in ("exclude_modules", "modules_to_save") if getattr(adapter, name)]
    that = f" that {' and '.join(others)}" if others else ""
    return (
        f"{_TARGETS} {wanted!r} matches no module of this {shape.model_type} model{that}. Its linear layers are "
        f"{', '.join(own)} (for example {linear[0].name}).{regex}{fused}"
    )


def saved_modules(adapter: NamesTargets, shape: ModelShape) -> list[Module]:
    """Modules that are trained in full, as copies.

    Raises:
        ModelError: if a name matches none.
    """
    for name in adapter.modules_to_save:
        if not any(is_saved(module.name, [name]) for module in shape.modules()):
            others = ", ".join(module.name for module in (*shape.embeddings, shape.final_norm, shape.head))
            raise ModelError(
                f"adapter.modules_to_save names {name!r}, which this {shape.model_type} model does not have. "
                f"It has {others}, and the modules of its layers."
            )
    wanted = adapter.modules_to_save
    return [module for module in shape.modules() if is_saved(module.name, wanted)] if wanted else []


def check_names(adapter: NamesTargets, shape: ModelShape) -> None:
    """Refuse `exclude_modules` that match nothing in the model at all: they are misspelt.

    Raises:
        ModelError: naming what there is.
    """
    names = names_in(shape)
    parts = {path for name in names for path in paths_to(name)}
    for name in adapter.exclude_modules:
        if not any(has_name(part, [name]) for part in parts):
            raise ModelError(
                f"adapter.exclude_modules names {name!r}, which this {shape.model_type} model does not have. {own_names(shape)}"
            )


def names_in(shape: ModelShape) -> list[str]:
    """Full names of all modules, and of the parameters outside of layers."""
    return [module.name for module in (*shape.modules(), *all_parameters(shape))]


def own_names(shape: ModelShape) -> str:
    """What there is to name."""
    return f"Its layers have {', '.join(sorted({module.name for module in shape.layer}))}."


def unread_exclusions(adapter: NamesTargets, left_out: set[str]) -> Iterator[str]:
    """A sentence for each name that leaves nothing out.

    Args:
        left_out: full names of what the names leave out of the targets.
    """
    for name in adapter.exclude_modules:
        if not any(f".{full}.".find(f".{name}.") >= 0 for full in left_out):
            yield f"adapter.exclude_modules {name!r} is not read: adapter.target_modules takes in no module of that name."


def _is_wanted(module: Module, wanted: str | list[str], shape: ModelShape) -> bool:
    is_taken_for_expert = module.name.rpartition(".")[2] in shape.names_of_experts
    if isinstance(wanted, str) and wanted in KINDS_OF_GROUP:
        return module.kind in KINDS_OF_GROUP[wanted] and not (is_taken_for_expert or module.is_bypassed)
    is_named = has_name(module.name, wanted) if isinstance(wanted, list) else matches(wanted, module.name, _TARGETS)
    if is_named:
        check_is_seen(module.name, shape.names_of_experts, is_bypassed=module.is_bypassed)
    return is_named


def check_is_seen(name: str, names_of_experts: Container[str], *, is_bypassed: bool) -> None:
    """Refuse a layer that was named as a target and whose update would not be seen, by the model or by PEFT.

    Args:
        name: of the layer.
        names_of_experts: as `ModelShape.names_of_experts`.
        is_bypassed: as `Module.is_bypassed`.

    Raises:
        ModelError: saying why.
    """
    if name.rpartition(".")[2] in names_of_experts:
        raise ModelError(
            f"adapter.target_modules takes in {name}, whose name PEFT takes for that of a fused expert, which it would train "
            f"instead. Leave it out; the experts themselves are named in adapter.target_parameters."
        )
    if is_bypassed:
        raise ModelError(
            f"adapter.target_modules takes in {name}, whose weight this model hands to a kernel itself, so that an update of the "
            f"layer would not be seen. Leave it out."
        )


def in_short(named: str | list[str]) -> str:
    """Targets in words: full names of the same layers' modules, which `strategy.freeze` leaves, by their last parts."""
    if isinstance(named, str):
        return named
    found = [_NUMBERED.match(name) for name in named]
    layers = sorted({int(match[2]) for match in found if match})
    if len(named) == 1 or not layers:
        return ", ".join(named)
    short = dict.fromkeys(match[3].rpartition(".")[2] if match else name for name, match in zip(named, found))
    where = f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers from {layers[0]} to {layers[-1]}"
    return f"{', '.join(short)} of {where}"


def is_within_saved(parameter: str, adapter: NamesTargets) -> bool:
    """Whether the module of a parameter, or one that it is a part of, is trained in full and saved."""
    return is_saved(parameter.rpartition(".")[0], adapter.modules_to_save)


def is_left_out(parameter: str, adapter: NamesTargets) -> bool:
    """Whether a group passes a parameter of fused experts over: it or its module is excluded, or trained in full."""
    names = (parameter, parameter.rpartition(".")[0])
    return any(has_name(name, adapter.exclude_modules) for name in names) or is_within_saved(parameter, adapter)


@lru_cache(maxsize=4)
def all_parameters(shape: ModelShape) -> tuple[Module, ...]:
    """Parameters outside linear layers that could get an update, each as a module of its own."""
    return tuple(parameter for module in shape.modules() for parameter in _bare_parameters(module))


@lru_cache(maxsize=4)
def expert_parameters(shape: ModelShape) -> tuple[str, ...]:
    """Names of the parameters of fused experts, behind the layer's number."""
    names = (
        parameter.name
        for layer in (shape.layer, *shape.other_layers)
        for module in layer
        for parameter in _bare_parameters(module)
        if parameter.kind == "experts"
    )
    return tuple(dict.fromkeys(names))


def _bare_parameters(module: Module) -> list[Module]:
    """A module's matrices that are in no layer of PEFT's."""
    if module.kind == "experts":
        matrices = [*module.matrices]
    elif module.kind == "router" and not module.is_linear_layer:
        matrices = [Matrix(name="weight", inputs=module.inputs, outputs=module.outputs)]
    else:
        return []
    return [
        Module(
            name=f"{module.name}.{matrix.name}",
            kind=module.kind,
            inputs=matrix.inputs,
            outputs=matrix.outputs,
            copies=module.copies,
            copies_per_token=module.copies_per_token,
        )
        for matrix in matrices
    ]
