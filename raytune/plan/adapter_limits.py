"""Adapters that PEFT or bitsandbytes could not start, train or save, and settings of an adapter that a model does not read. Pure.

Each limit was seen to fail on a small model: `tests/unit/test_adapter_limits.py` provokes them.
"""

import re
from collections.abc import Iterator

from raytune.config.adapter import Adapter, LoraAdapter, QloraAdapter
from raytune.config.training import Precision
from raytune.errors import ModelError, UserError
from raytune.plan.adapter_size import (
    all_parameters,
    num_trained_biases,
    quant_storage,
    rank_of,
    saved_modules,
    target_modules,
    target_parameters,
)
from raytune.plan.shapes import ModelShape, Module

FROM_BASE = ("pissa", "olora")
"""Starts that take their share out of the base weights; saving makes an adapter of twice the rank out of them."""
TRANSPOSED = ("gpt2", "openai-gpt")
"""Architectures whose layers are Conv1D, with weights of (inputs, outputs), which OLoRA in PEFT 0.21 does not turn around."""
QUANTISED_KINDS = ("attention", "mlp", "mixer")
"""Kinds of modules that bitsandbytes holds; embeddings, fused experts and the output head stay as they are."""


def check_adapter(adapter: Adapter, shape: ModelShape, precision: Precision) -> None:
    """Refuse an adapter that would fail once the weights are loaded, or be saved as what nothing can load.

    Args:
        precision: of the run.

    Raises:
        UserError: (or ModelError) with the setting that works.
    """
    if not isinstance(adapter, LoraAdapter):
        return
    targets = target_modules(adapter, shape)
    _check_names(adapter, shape)
    _check_biases(adapter, shape, targets)
    if adapter.init == "orthogonal":
        _check_orthogonal(adapter, targets)
    if adapter.init in FROM_BASE:
        _check_start_from_base(adapter, shape, targets)
    if adapter.init == "eva":
        _check_eva(adapter, targets)
    if isinstance(adapter, QloraAdapter):
        _check_quantised(adapter, shape, targets, precision)


def is_quantised_dora(adapter: Adapter, shape: ModelShape) -> bool:
    """Whether DoRA takes norms of quantised weights, which it has to expand whole."""
    if not isinstance(adapter, QloraAdapter) or not adapter.use_dora:
        return False
    return any(module.kind in QUANTISED_KINDS for module in target_modules(adapter, shape))


def unread_adapter_settings(adapter: Adapter, shape: ModelShape) -> Iterator[str]:
    """A sentence for each setting that has no effect on this model's targets."""
    if not isinstance(adapter, LoraAdapter):
        return
    targets = _updated(adapter, shape)
    embeddings = [module.name for module in targets if module.kind == "embedding"]
    for setting, patterns in (("rank_pattern", adapter.rank_pattern), ("alpha_pattern", adapter.alpha_pattern)):
        for pattern in patterns:
            if not any(_matches(pattern, module.name, setting) for module in targets):
                yield f"adapter.{setting} {pattern!r} is not read: no module with an update has such a name."
    if adapter.exclude_modules:
        everything = {module.name for module in _updated(adapter.model_copy(update={"exclude_modules": []}), shape)}
        left_out = everything - {module.name for module in targets}
        for name in adapter.exclude_modules:
            if not any(f".{full}.".find(f".{name}.") >= 0 for full in left_out):
                yield f"adapter.exclude_modules {name!r} is not read: adapter.target_modules takes in no module of that name."
    if adapter.lora_plus_ratio and not embeddings and adapter.lora_plus_embedding_rate != _DEFAULT.lora_plus_embedding_rate:
        yield "adapter.lora_plus_embedding_rate is not read: no embedding gets an update."
    if adapter.dropout and len(embeddings) == len(targets):
        yield f"adapter.dropout is {adapter.dropout:g}, but PEFT's updates of embeddings have no dropout."
    if adapter.init == "eva" and embeddings:
        yield f"adapter.init is eva, but {', '.join(embeddings)} starts as by default: EVA looks at linear layers only."


def _updated(adapter: LoraAdapter, shape: ModelShape) -> list[Module]:
    """All that gets an update: layers, and parameters beside them."""
    return [*target_modules(adapter, shape), *target_parameters(adapter, shape)]


_DEFAULT = LoraAdapter()


def _check_names(adapter: LoraAdapter, shape: ModelShape) -> None:
    """Names and patterns that match nothing in the model at all: they are misspelt."""
    names = [module.name for module in (*shape.modules(), *all_parameters(shape))]
    parts = {".".join(name.split(".")[:length]) for name in names for length in range(1, name.count(".") + 2)}
    for name in adapter.exclude_modules:
        if not any(part == name or part.endswith(f".{name}") for part in parts):
            raise ModelError(
                f"adapter.exclude_modules names {name!r}, which this {shape.model_type} model does not have. {_own(shape)}"
            )
    for setting, patterns in (("rank_pattern", adapter.rank_pattern), ("alpha_pattern", adapter.alpha_pattern)):
        for pattern in patterns:
            if not any(_matches(pattern, name, setting) for name in names):
                raise ModelError(
                    f"adapter.{setting}: {pattern!r} matches no module of this {shape.model_type} model. {_own(shape)}"
                )


def _own(shape: ModelShape) -> str:
    """What there is to name."""
    return f"Its layers have {', '.join(sorted({module.name for module in shape.layer}))}."


def _matches(pattern: str, name: str, setting: str) -> bool:
    """PEFT's rule for patterns."""
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None
    except re.error as error:
        raise ModelError(f"adapter.{setting}: {pattern!r} is not a regular expression: {error}.") from error


def _check_biases(adapter: LoraAdapter, shape: ModelShape, targets: list[Module]) -> None:
    if adapter.bias == "none" or num_trained_biases(adapter, shape, targets):
        return
    of_all = num_trained_biases(adapter.model_copy(update={"bias": "all"}), shape, targets)
    what = "none of the layers with an update has a bias" if of_all else f"this {shape.model_type} model has no biases"
    other = ", or to all" if of_all else ""
    raise UserError(
        f"adapter.bias is {adapter.bias}, but {what}, so that nothing more would be trained. Set adapter.bias to none{other}."
    )


def _check_orthogonal(adapter: LoraAdapter, targets: list[Module]) -> None:
    odd = sorted(rank for rank in {adapter.rank, *(rank_of(adapter, module) for module in targets)} if rank % 2)
    if odd:
        raise UserError(f"adapter.init is orthogonal, which needs even ranks, but there is rank {odd[0]}. Use an even one.")


def _check_start_from_base(adapter: LoraAdapter, shape: ModelShape, targets: list[Module]) -> None:
    if isinstance(adapter, QloraAdapter):
        raise UserError(
            f"adapter.init {adapter.init} takes its share out of the base weights, which a quantised base cannot give exactly. "
            f"Set adapter.method to lora, or adapter.init to default, gaussian or eva."
        )
    if adapter.init == "olora" and shape.model_type in TRANSPOSED:
        raise UserError(
            f"adapter.init is olora, which PEFT computes wrongly for the transposed layers (Conv1D) of a {shape.model_type} "
            f"model: training would fail. Set it to pissa, orthogonal or default."
        )
    embedding = next((module.name for module in targets if module.kind == "embedding"), None)
    if embedding:
        raise UserError(
            f"adapter.init is {adapter.init}, but adapter.target_modules takes in the embedding {embedding}, which PEFT does not "
            f"start that way: the saved adapter could not be loaded. Name linear layers only, or set adapter.init to "
            f"default, gaussian or orthogonal."
        )
    if shape.is_tied and any(module.kind == "head" for module in targets):
        raise UserError(
            f"adapter.init is {adapter.init}, which takes its share out of the weights of {shape.head.name}; but these are the "
            f"embedding's too, which would change with them, and the saved adapter would not be what was trained. Leave "
            f"{shape.head.name} out of adapter.target_modules, or set adapter.init to default, gaussian or orthogonal."
        )
    for module in targets:
        rank, most = rank_of(adapter, module), min(module.inputs, module.outputs)
        if rank > most:
            raise UserError(
                f"adapter.init is {adapter.init}, which finds at most {most} directions in {module.name} ({module.outputs} x "
                f"{module.inputs}), but its rank is {rank}: the saved adapter could not be loaded. Lower adapter.rank to {most}, "
                f"give this layer {most} in adapter.rank_pattern, or set adapter.init to default, gaussian or orthogonal."
            )


def _check_eva(adapter: LoraAdapter, targets: list[Module]) -> None:
    linear = [module for module in targets if module.kind != "embedding"]
    if not linear:
        raise UserError(
            "adapter.init is eva, which looks at inputs of linear layers, but only embeddings get an update. Set adapter.init to "
            "default, or name linear layers in adapter.target_modules as well."
        )
    other = next((module for module in linear if rank_of(adapter, module) != adapter.rank), None)
    if other:
        raise UserError(
            f"adapter.rank_pattern gives {other.name} rank {rank_of(adapter, other)}, but with adapter.init eva PEFT hands out "
            f"the ranks of all layers anew and would not keep to the pattern. Leave adapter.rank_pattern out, or set "
            f"adapter.init to default, gaussian or pissa."
        )
    narrow = min(linear, key=lambda module: module.inputs)
    if adapter.rank > narrow.inputs:
        raise UserError(
            f"adapter.init is eva, which finds at most as many directions as {narrow.name} has inputs ({narrow.inputs}), but "
            f"adapter.rank is {adapter.rank}. Lower it to {narrow.inputs}, or set adapter.init to default or gaussian."
        )


def _check_quantised(adapter: QloraAdapter, shape: ModelShape, targets: list[Module], precision: Precision) -> None:
    touched = next((module.name for module in targets if module.kind in QUANTISED_KINDS), None)
    if adapter.quantization == "int8" and adapter.use_dora and touched:
        raise UserError(
            f"adapter.use_dora needs the norms of {touched}'s weights, which bitsandbytes does not give in int8: training would "
            f"fail. Set adapter.quantization to nf4, or adapter.use_dora to false."
        )
    if adapter.init == "orthogonal" and touched:
        integers = "adapter.quantization int8" if adapter.quantization == "int8" else ""
        integers = integers or ("adapter.quant_storage uint8" if adapter.quant_storage == "uint8" else "")
        if integers:
            fix = "adapter.quantization to nf4" if adapter.quantization == "int8" else "adapter.quant_storage to auto"
            raise UserError(
                f"adapter.init is orthogonal, which takes its dtype from the base weights, but {integers} makes {touched}'s "
                f"integers: the adapter could not be made. Set {fix}, or adapter.init to default, gaussian or eva."
            )
    storage = quant_storage(adapter, precision)
    if adapter.quantization != "int8" and storage not in ("uint8", precision):
        raise UserError(
            f"adapter.quant_storage is {storage}, but the other weights are in {precision}: casting one to the other would "
            f"destroy the packed numbers. Set it to auto, {precision} or uint8."
        )
    quantised = [module.name for module in saved_modules(adapter, shape) if module.kind in QUANTISED_KINDS]
    if quantised:
        raise UserError(
            f"adapter.modules_to_save takes in {quantised[0]}, which adapter.method qlora quantises, so that it cannot be "
            f"trained in full. Name embeddings, norms or the output head only, or set adapter.method to lora."
        )
