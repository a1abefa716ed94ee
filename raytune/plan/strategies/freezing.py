"""What `strategy.freeze` leaves of what a method trains: a smaller `Trained`; of adapters, a section with fewer targets. Pure."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import TypeVar

from raytune.config.sections.adapter import Adapter
from raytune.config.sections.model import Quantization
from raytune.config.sections.strategy import FreezeSection
from raytune.errors import ModelError, UserError
from raytune.plan.methods import trained_by
from raytune.plan.model.module_names import WORDS, has_name, is_meant, is_saved, paths_to
from raytune.plan.model.shapes import ModelShape
from raytune.plan.model.trained import Trained, TrainedPart, layer_of, lowest_layer, num_sides

FREEZE = "strategy.freeze"
NOT_FROZEN = FreezeSection()

ITSELF = " itself"
"""Behind the name of a module: what it holds itself, and not what the modules in it hold."""

Value = TypeVar("Value")


def narrowed(adapter: Adapter, shape: ModelShape, freeze: FreezeSection) -> Adapter:
    """An adapter section whose targets are those that stay, by their full names; the section itself where the base is trained.

    Raises:
        UserError: (or ModelError) if a key freezes nothing, all is frozen, or what is frozen cannot be told apart from the rest.
    """
    if freeze == NOT_FROZEN:
        return adapter
    trained = trained_by(adapter, shape)
    kept = _kept(trained, adapter, shape, freeze)
    if trained.is_base:
        return adapter
    if not hasattr(adapter, "target_modules"):
        raise UserError(
            f"{FREEZE} is for what is trained module by module, and adapter.method {adapter.method} is not. Leave it out.",
            keys=(FREEZE,),
        )
    left_out = [part for part in trained.parts if part not in kept]
    saved: list[str] = getattr(adapter, "modules_to_save", [])
    beside = next((part for part in left_out if is_saved(part.name, saved)), None)
    if beside:
        raise UserError(
            f"adapter.modules_to_save takes in {beside.name}, which {FREEZE} freezes. Leave it out of one of the two.",
            keys=("adapter.modules_to_save", FREEZE),
        )
    rows = next((part for part in left_out if part.how == "rows"), None)
    if rows:
        raise UserError(
            f"{FREEZE} freezes {rows.name}, of which adapter.trainable_tokens trains rows of tokens. "
            + (f"Name it in {FREEZE}.train_only" if freeze.train_only else f"Leave it out of {FREEZE}")
            # New tokens have to be trained by something.
            + ("." if shape.new_tokens else ", or set adapter.trainable_tokens to []."),
            keys=("adapter.trainable_tokens", FREEZE),
        )
    named = getattr(adapter, "target_modules", [])
    for name in named if isinstance(named, list) else []:
        if not any(has_name(part.name, [name]) for part in kept):
            raise UserError(
                f"adapter.target_modules names {name!r}, and {FREEZE} freezes all of it. Leave it out of one of the two.",
                keys=("adapter.target_modules", FREEZE),
            )
    updates = [part for part in kept if part.how not in ("bias", "rows") and not is_saved(part.name, saved)]
    in_layers = [part.name for part in updates if not part.is_parameter]
    fields = {
        "target_modules": in_layers,
        "target_parameters": [part.name for part in updates if part.is_parameter],
        "exclude_modules": [],
    }
    section = adapter.model_copy(update={name: value for name, value in fields.items() if hasattr(adapter, name)})
    still = {(part.name, part.how) for part in left_out}
    free = next((part for part in trained_by(section, shape).parts if (part.name, part.how) in still), None)
    if free:
        raise UserError(
            f"adapter.bias {getattr(adapter, 'bias', '')} trains the {free.how} of {free.name}, which {FREEZE} freezes. Set "
            f"adapter.bias to lora_only or none.",
            keys=("adapter.bias", FREEZE),
        )
    return section


def trained_with(adapter: Adapter, shape: ModelShape, freeze: FreezeSection, quantization: Quantization | None = None) -> Trained:
    """What is trained of a model.

    Args:
        adapter: as `narrowed` gives it.
        quantization: of the base; None: it is held as it is.

    Raises:
        UserError: (or ModelError) as `narrowed` does.
    """
    trained = trained_by(adapter, shape, quantization)
    if freeze == NOT_FROZEN or not trained.is_base:
        return trained
    kept = tuple(_kept(trained, adapter, shape, freeze))
    names = [part.name for part in kept]
    modules = [module for module in shape.modules() if module.name in {*names}]
    return replace(trained, parts=kept, lowest_layer=lowest_layer(names, shape), num_sides=num_sides(modules))


def frozen_names(trained: Trained, shape: ModelShape) -> list[str]:
    """Modules of a trained base that stay as they are, each under its own name or that of what holds nothing else (`folded`)."""
    if not trained.is_base:
        return []
    kept = {part.name for part in trained.parts}
    is_frozen = {module.name: module.name not in kept for module in shape.modules()}
    return [name for name, frozen in folded(is_frozen).items() if frozen]


def folded(values: Mapping[str, Value]) -> dict[str, Value]:
    """Values by module, where all modules that another one holds have the same value under the name of that one alone.

    A module whose own weights have another value than those of a module in it is marked as `ITSELF`.

    Args:
        values: by full names.
    """
    below: dict[str, set[Value]] = {}
    for name, value in values.items():
        for path in paths_to(name):
            below.setdefault(path, set()).add(value)
    found: dict[str, Value] = {}
    for name, value in values.items():
        found[next((path for path in paths_to(name) if len(below[path]) == 1), name + ITSELF)] = value
    return found


def is_in(parameter: str, module: str) -> bool:
    """Whether a parameter lies in a module, named as `folded` names them."""
    if module.endswith(ITSELF):
        return parameter.rpartition(".")[0] == module.removesuffix(ITSELF)
    return parameter.startswith(f"{module}.")


def freezing_notes(trained: Trained, shape: ModelShape, freeze: FreezeSection) -> Iterator[str]:
    """What is not to be expected of what is frozen, in sentences."""
    if freeze == NOT_FROZEN:
        return
    num_layers, lowest = shape.num_layers, trained.lowest_layer
    if lowest == num_layers:
        yield f"No backward pass runs through any of the {num_layers} layers: nothing in or below them is trained."
    elif lowest:
        yield f"No backward pass runs below layer {lowest} (of 0 to {num_layers - 1}), the lowest that is trained."
    elif freeze.first_layers or freeze.train_only:
        below = next((part.name for part in trained.parts if layer_of(part.name, shape) is None and part.kind == "embedding"), "")
        if below:
            yield f"Backward passes run through all layers, because {below} is trained, which lies below them."
    if trained.is_base and shape.is_tied:
        is_trained = shape.embeddings[0].name in trained.whole
        yield (
            f"{shape.head.name} is {shape.embeddings[0].name} (tied): one matrix, which is "
            f"{'trained as both' if is_trained else 'frozen as both'}."
        )


def _kept(trained: Trained, adapter: Adapter, shape: ModelShape, freeze: FreezeSection) -> list[TrainedPart]:
    """The parts that stay trained.

    Raises:
        UserError: (or ModelError) if an item of the section freezes nothing or keeps nothing, or nothing is left.
    """
    parts = trained.parts
    if freeze.first_layers > shape.num_layers:
        raise UserError(
            f"{FREEZE}.first_layers is {freeze.first_layers}, but the model has {shape.num_layers} layers.",
            keys=(f"{FREEZE}.first_layers",),
        )
    frozen: set[str] = set()
    if freeze.embeddings:
        frozen |= _found("embeddings", f"{FREEZE}.embeddings", trained, adapter, shape)
    if freeze.first_layers:
        lowest = {
            part.name for part in parts if (layer := layer_of(part.name, shape)) is not None and layer < freeze.first_layers
        }
        if not lowest:
            raise nothing_meant(f"{FREEZE}.first_layers {freeze.first_layers}", "", trained, _untouched(adapter), shape)
        frozen |= lowest
    for pattern in freeze.modules:
        frozen |= _found(pattern, f"{FREEZE}.modules", trained, adapter, shape)
    wanted = {part.name for part in parts}
    if freeze.train_only:
        wanted = {
            name for pattern in freeze.train_only for name in _found(pattern, f"{FREEZE}.train_only", trained, adapter, shape)
        }
    kept = wanted - frozen
    if trained.is_base and shape.is_tied:
        kept = _with_tied(kept, frozen, shape, freeze)
    found = [part for part in parts if part.name in kept]
    if not sum(part.num_parameters for part in found):
        raise UserError(
            f"{FREEZE} leaves nothing that is trained of what adapter.method {adapter.method} trains. Freeze less.",
            keys=(FREEZE,),
        )
    return found


def _with_tied(kept: set[str], frozen: set[str], shape: ModelShape, freeze: FreezeSection) -> set[str]:
    """A tied head and the embedding are one matrix: both are trained, or none.

    Raises:
        UserError: if one of them is asked for without the other.
    """
    embedding, head = shape.embeddings[0].name, shape.head.name
    if (embedding in kept) == (head in kept):
        return kept
    tied = f"{head} is {embedding}: they are tied, one matrix"
    if embedding in kept and head in frozen:
        raise UserError(
            f"{FREEZE}.modules freezes {head} and not {embedding}, but {tied}. Freeze both (`embeddings` too), or none.",
            keys=(f"{FREEZE}.modules",),
        )
    if embedding in kept:
        return kept | {head}
    if freeze.train_only and embedding not in frozen:
        raise UserError(
            f"{FREEZE}.train_only takes in {head} and not {embedding}, but {tied}, and training it takes backward passes through "
            f"all layers. Add `embeddings`, or leave `{head}` out and train `norms` or the last layers.",
            keys=(f"{FREEZE}.train_only",),
        )
    if freeze.train_only:
        raise UserError(
            f"{FREEZE}.train_only takes in {head}, but {embedding} is frozen, and {tied}.", keys=(f"{FREEZE}.train_only",)
        )
    return kept - {head}


def _found(pattern: str, setting: str, trained: Trained, adapter: Adapter, shape: ModelShape) -> set[str]:
    """Names of the parts that a pattern means.

    Raises:
        UserError: (or ModelError) if there are none.
    """
    found = {part.name for part in meant(trained.parts, pattern, shape, setting)}
    if not found:
        said = f"{setting} {'true' if setting.endswith('embeddings') else repr(pattern)}"
        raise nothing_meant(said, pattern, trained, _untouched(adapter), shape)
    return found


def meant(parts: Iterable[TrainedPart], pattern: str, shape: ModelShape, setting: str) -> list[TrainedPart]:
    """The parts that a pattern of `strategy` means.

    Raises:
        ModelError: if it is neither a word nor a regular expression.
    """
    return [part for part in parts if is_meant(pattern, part.name, part.kind, shape, setting)]


def _untouched(adapter: Adapter) -> str:
    return f"adapter.method {adapter.method} trains nothing of that"


def nothing_meant(said: str, pattern: str, trained: Trained, why: str, shape: ModelShape) -> UserError:
    """The error of a setting that means no trained part: because the model has no such module, or for another reason.

    Args:
        said: the setting as it was written, its key first.
        pattern: among it, if it is one.
        why: the other reason.
    """
    setting, modules = said.partition(" ")[0], list(shape.modules())
    if pattern and not any(is_meant(pattern, module.name, module.kind, shape, setting) for module in modules):
        own = sorted({path.rpartition(".")[2] for module in modules for path in paths_to(module.name)} - _numbers(shape))
        near = get_close_matches(pattern.rpartition(".")[2], [*WORDS, *own], n=3, cutoff=0.5)
        weight = " Patterns name modules, without `weight` or `bias`." if pattern.endswith(("weight", "weight$", "bias")) else ""
        hint = f" Did you mean {' or '.join(near)}?" if near and not weight else weight
        return ModelError(
            f"{said} matches no module of this {shape.model_type} model.{hint} Its modules have {', '.join(own)}; `head`, "
            f"`embeddings` and `norms` stand for groups.",
            keys=(setting,),
        )
    trains = sorted({_last_words(part.name) for part in trained.parts})
    return UserError(f"{said} has no effect: {why}. What is trained: {', '.join(trains)}.", keys=(setting,))


def _last_words(name: str) -> str:
    """The end of a module's name that says what it is: layers in a row have numbers."""
    path, _, last = name.rpartition(".")
    return f"{path.rpartition('.')[2]}.{last}" if last.isdigit() else last


def _numbers(shape: ModelShape) -> set[str]:
    return {str(number) for number in range(shape.num_layers)}
