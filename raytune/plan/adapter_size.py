"""Which modules an adapter changes, or leaves packed, and how many parameters it trains: PEFT's rules, without PEFT."""

import re
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from raytune.config.adapter import Adapter, FullAdapter, LoraAdapter, QloraAdapter
from raytune.config.training import Precision
from raytune.errors import ModelError
from raytune.plan.shapes import Matrix, ModelShape, Module

WITHOUT_UPDATE = ("norm", "experts", "router", "state")
"""Kinds of modules that are no layers of PEFT's."""
_KINDS_OF_GROUP = {"all-linear": ("attention", "mlp", "mixer"), "attention": ("attention",), "mlp": ("mlp",)}
_TARGETS = "adapter.target_modules"
GROUPS_WITH_EXPERTS = ("all-linear", "mlp")
"""Fused experts are an MLP's linear layers in everything but their class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedSize:
    """What is trained, in numbers; and what of fused experts is not, over a base in 4 bits."""

    num_trainable: int
    """Parameters that are trained, an adapter's or the model's own."""
    target_inputs: int = 0
    """Widths of the inputs of all layers that get an update."""
    target_ranks: int = 0
    """Ranks of all updates."""
    num_sides: int
    """Rows and columns of all trained matrices."""
    num_in_experts: int = 0
    """Of the trained parameters, those of updates of fused experts."""
    num_updated_per_layer: int = 0
    """Weights of fused experts that get an update, in one layer."""
    largest_updated: int = 0
    """Weights of the largest parameter among these."""
    num_packed: int = 0
    """Weights of fused experts that are held in 4 bits."""
    num_packed_per_layer: int = 0
    """Of these, in one layer."""
    largest_packed: int = 0
    """Weights of the largest parameter among these."""


def trained_size(adapter: Adapter, shape: ModelShape) -> TrainedSize:
    """Count what is trained.

    LoRA trains A (rank x inputs) and B (outputs x rank) of each target, and of each expert's matrices; DoRA a magnitude per
    output as well. Modules to save are trained in full, as copies beside the frozen original.

    Raises:
        ModelError: if a name matches nothing, or a pattern is no regular expression.
    """
    if isinstance(adapter, FullAdapter):
        sides = sum(module.inputs + module.outputs + module.num_biases for module in shape.modules())
        return TrainedSize(num_trainable=shape.num_parameters, num_sides=sides)
    targets = target_modules(adapter, shape)
    parameters = target_parameters(adapter, shape)
    in_experts = sum(_num_in_update(adapter, parameter) for parameter in parameters if parameter.kind == "experts")
    updates = sum(_num_in_update(adapter, target) for target in (*targets, *parameters))
    updated = [parameter for parameter in parameters if parameter.kind == "experts"]
    packed = packed_experts(adapter, shape)
    copies = sum(module.num_parameters for module in saved_modules(adapter, shape))
    magnitudes = sum(module.outputs for module in targets) if adapter.use_dora else 0
    in_layers = [module for module in targets if module.kind in ("attention", "mlp", "mixer")]
    return TrainedSize(
        num_trainable=updates + magnitudes + num_trained_biases(adapter, shape, targets) + copies,
        target_inputs=sum(module.inputs for module in in_layers),
        target_ranks=sum(rank_of(adapter, module) for module in in_layers),
        num_sides=sum(module.inputs + module.outputs for module in targets)
        + sum(
            parameter.inputs + parameter.outputs + 2 * rank_of(adapter, parameter) * parameter.copies for parameter in parameters
        )
        + magnitudes
        + copies,
        num_in_experts=in_experts,
        num_updated_per_layer=_most_in_a_module(updated),
        largest_updated=max((one.num_parameters for one in updated), default=0),
        num_packed=sum(one.num_parameters for one in packed),
        num_packed_per_layer=_most_in_a_module(packed),
        largest_packed=max((one.num_parameters for one in packed), default=0),
    )


def _most_in_a_module(parameters: Iterable[Module]) -> int:
    counts = Counter[str]()
    for parameter in parameters:
        counts[parameter.name.rpartition(".")[0]] += parameter.num_parameters
    return max(counts.values(), default=0)


def _num_in_update(adapter: LoraAdapter, target: Module) -> int:
    return rank_of(adapter, target) * target.copies * (target.inputs + target.outputs)


def target_modules(adapter: LoraAdapter, shape: ModelShape) -> list[Module]:
    """Linear layers and embeddings that get an update, under their full names.

    Raises:
        ModelError: if there are none, and no parameters either.
    """
    wanted = adapter.target_modules
    layers = [module for module in shape.modules() if module.kind not in WITHOUT_UPDATE or module.is_linear_layer]
    found = [
        module
        for module in layers
        if _is_wanted(module, wanted, shape)
        and not has_name(module.name, adapter.exclude_modules)
        and not _is_left_to_saving(module.name, adapter.modules_to_save)
    ]
    missing = (
        [name for name in wanted if not any(has_name(module.name, [name]) for module in layers)]
        if isinstance(wanted, list)
        else []
    )
    if missing or not (found or target_parameters(adapter, shape)):
        raise ModelError(_no_such_layer(missing or wanted, adapter, shape))
    return found


def _no_such_layer(wanted: str | list[str], adapter: LoraAdapter, shape: ModelShape) -> str:
    linear = [module for module in shape.modules() if module.is_linear and module.name.startswith(f"{shape.layers_name}.")]
    own = sorted({module.name.rpartition(".")[2] for module in linear})
    is_pattern = isinstance(wanted, str) and wanted not in _KINDS_OF_GROUP
    regex = " A single string is a regular expression that must match a whole name; give a list for names." if is_pattern else ""
    experts = expert_parameters(shape)
    fused = f" Its fused experts are parameters, for adapter.target_parameters: {', '.join(experts)}." if experts else ""
    others = [f"adapter.{name} leaves to it" for name in ("exclude_modules", "modules_to_save") if getattr(adapter, name)]
    that = f" that {' and '.join(others)}" if others else ""
    return (
        f"{_TARGETS} {wanted!r} matches no module of this {shape.model_type} model{that}. Its linear layers are "
        f"{', '.join(own)} (for example {linear[0].name}).{regex}{fused}"
    )


def all_parameters(shape: ModelShape) -> list[Module]:
    """Parameters outside linear layers that could get an update, each as a module of its own."""
    return [parameter for module in shape.modules() for parameter in _bare_parameters(module)]


def target_parameters(adapter: LoraAdapter, shape: ModelShape) -> list[Module]:
    """Parameters outside linear layers that get an update, each as a module of its own: of fused experts and of routers.

    A group takes in the experts; what is named may be either.

    Raises:
        ModelError: if a name matches none of them.
    """
    theirs = all_parameters(shape)
    for name in adapter.target_parameters:
        if not any(has_name(parameter.name, [name]) for parameter in theirs):
            raise ModelError(_no_such_parameter(name, theirs, shape))
    takes_experts = isinstance(adapter.target_modules, str) and adapter.target_modules in GROUPS_WITH_EXPERTS
    return [
        parameter
        for parameter in theirs
        if has_name(parameter.name, adapter.target_parameters)
        or (takes_experts and parameter.kind == "experts" and not is_left_out(parameter.name, adapter))
    ]


def packed_experts(adapter: LoraAdapter, shape: ModelShape) -> list[Module]:
    """Parameters of fused experts that are held in 4 bits, each as a module of its own: those that nothing changes.

    PEFT's update of a parameter needs that parameter in floating point.
    """
    if not isinstance(adapter, QloraAdapter) or adapter.quantization == "int8":
        return []
    updated = {parameter.name for parameter in target_parameters(adapter, shape)}
    return [
        parameter
        for parameter in all_parameters(shape)
        if parameter.kind == "experts"
        and parameter.name not in updated
        and not is_within_saved(parameter.name, adapter)
        and fits_4_bits(parameter.num_parameters)
    ]


def fits_4_bits(num_weights: int) -> bool:
    """Whether bitsandbytes packs so many weights at once: its kernels count in 32 bits
    (https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1785), and 8 weights fill any dtype that may hold them."""
    return num_weights < 2**31 and num_weights % 8 == 0


def expert_parameters(shape: ModelShape) -> list[str]:
    """Names of the parameters of fused experts, behind the layer's number."""
    names = (
        parameter.name
        for layer in (shape.layer, *shape.other_layers)
        for module in layer
        for parameter in _bare_parameters(module)
        if parameter.kind == "experts"
    )
    return list(dict.fromkeys(names))


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


def _no_such_parameter(name: str, theirs: list[Module], shape: ModelShape) -> str:
    said = f"adapter.target_parameters names {name!r}, which is no parameter of fused experts or routers in this model"
    if any(has_name(module.name, [name, name.removesuffix(".weight")]) for module in shape.modules() if module.is_linear):
        return f"{said}. It is a linear layer: name it in adapter.target_modules."
    in_first = sorted(
        {one.name.removeprefix(f"{shape.layers_name}.{index}.") for one in theirs for index in _number_of(one, shape)}
    )
    return f"{said} ({shape.model_type}). " + (
        f"It has {', '.join(in_first)}." if in_first else "It has none; leave the key out."
    )


def _number_of(module: Module, shape: ModelShape) -> list[str]:
    rest = module.name.removeprefix(f"{shape.layers_name}.")
    return [rest.partition(".")[0]] if rest != module.name else []


def rank_of(adapter: LoraAdapter, module: Module) -> int:
    """Rank of a module's update: that of the first matching pattern, else the adapter's."""
    ranks = (
        rank
        for pattern, rank in adapter.rank_pattern.items()
        if _matches(pattern, module.name, "adapter.rank_pattern", before=r"(.*\.)?")
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


def _is_wanted(module: Module, wanted: str | list[str], shape: ModelShape) -> bool:
    is_taken_for_expert = module.name.rpartition(".")[2] in shape.names_of_experts
    if isinstance(wanted, str) and wanted in _KINDS_OF_GROUP:
        return module.kind in _KINDS_OF_GROUP[wanted] and not (is_taken_for_expert or module.is_bypassed)
    is_named = has_name(module.name, wanted) if isinstance(wanted, list) else _matches(wanted, module.name, _TARGETS)
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


def _matches(pattern: str, name: str, setting: str, *, before: str = "") -> bool:
    """Whether a user's pattern, behind one of PEFT's, is a whole name."""
    try:
        re.compile(pattern)
        return re.fullmatch(f"{before}({pattern})", name) is not None
    except re.error as error:
        raise ModelError(f"{setting}: {pattern!r} is not a regular expression: {error}.") from error


def is_left_out(parameter: str, adapter: LoraAdapter) -> bool:
    """Whether a group passes a parameter of fused experts over: it or its module is excluded, or trained in full."""
    names = (parameter, parameter.rpartition(".")[0])
    return any(has_name(name, adapter.exclude_modules) for name in names) or is_within_saved(parameter, adapter)


def is_within_saved(parameter: str, adapter: LoraAdapter) -> bool:
    """Whether the module of a parameter, or one that it is a part of, is trained in full and saved."""
    return _is_saved(parameter.rpartition(".")[0], adapter.modules_to_save)


def has_name(name: str, wanted: Sequence[str]) -> bool:
    """PEFT's rule for a module named in a list."""
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
            # A saved module's original stays frozen, its bias too; those of fused experts are not called `bias`.
            free = (module for module in shape.modules() if not _is_saved(module.name, adapter.modules_to_save))
            return sum(module.num_biases for module in free if module.kind != "experts")


def quant_storage(adapter: QloraAdapter, precision: Precision) -> Precision | Literal["uint8"]:
    """The dtype that packed weights are stored as: the run's, which ZeRO-3 can shard with all others."""
    return precision if adapter.quant_storage == "auto" else adapter.quant_storage
