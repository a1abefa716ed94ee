"""LoRA that PEFT or bitsandbytes could not start, train or save, and settings that a model does not read. Pure.

Each limit was seen to fail on a small model: `tests/unit/test_adapter_limits.py` provokes them.
"""

from collections.abc import Iterator

from raytune.config.sections.adapter import LoraAdapter
from raytune.config.sections.quantization import HeldBase
from raytune.config.sections.run import RunConfig
from raytune.errors import ModelError, PlanError, UserError, capitalised
from raytune.plan.methods.experts import takes_experts
from raytune.plan.methods.lora_updates import all_updated, biases_of, rank_of
from raytune.plan.methods.targets import check_names, expert_parameters, names_in, own_names, saved_modules, unread_exclusions
from raytune.plan.methods.token_rows import check_rows
from raytune.plan.model.module_names import matches_end
from raytune.plan.model.shapes import LINEAR_KINDS, ModelShape, Module

FROM_BASE = ("pissa", "olora")
"""Starts that take their share out of the base weights; saving makes an adapter of twice the rank out of them."""
TRANSPOSED = ("gpt2", "openai-gpt")
"""Architectures whose layers are Conv1D, with weights of (inputs, outputs), which OLoRA in PEFT 0.21 does not turn around."""
WITH_EXPERTS = ("default", "gaussian")
"""Starts that need neither the weights nor the inputs of a layer."""


def check(adapter: LoraAdapter, config: RunConfig, held: HeldBase, shape: ModelShape) -> None:
    """Refuse an adapter that would fail once the weights are loaded, or be saved as what nothing can load.

    Raises:
        UserError: (or PlanError, ModelError) with the setting that works.
    """
    targets, parameters = all_updated(adapter, shape)
    _check_parameters(adapter, config, shape, parameters)
    _check_names(adapter, shape)
    _check_biases(adapter, shape, targets)
    if adapter.init == "orthogonal":
        _check_orthogonal(adapter, targets)
    if adapter.init in FROM_BASE:
        if held.quantization:
            raise UserError(
                f"adapter.init {adapter.init} takes its share out of the base weights, which a quantised base cannot give "
                f"exactly. {capitalised(held.to_undo)}, or adapter.init to default, gaussian or eva."
            )
        _check_start_from_base(adapter, shape, targets)
    if adapter.init == "eva":
        _check_eva(adapter, targets)
    _check_quantised(adapter, held, targets)
    check_rows(adapter, config, shape, targets)


def unread(adapter: LoraAdapter, shape: ModelShape) -> Iterator[str]:
    """A sentence for each setting that has no effect on this model's targets."""
    targets = _updated(adapter, shape)
    embeddings = [module.name for module in targets if module.kind == "embedding"]
    for setting, patterns in (("rank_pattern", adapter.rank_pattern), ("alpha_pattern", adapter.alpha_pattern)):
        for pattern in patterns:
            if not any(matches_end(pattern, module.name, f"adapter.{setting}") for module in targets):
                yield f"adapter.{setting} {pattern!r} is not read: no module with an update has such a name."
    if adapter.exclude_modules:
        everything = {module.name for module in _updated(adapter.model_copy(update={"exclude_modules": []}), shape)}
        yield from unread_exclusions(adapter, everything - {module.name for module in targets})
    if adapter.lora_plus_ratio and not embeddings and adapter.lora_plus_embedding_rate != _DEFAULT.lora_plus_embedding_rate:
        yield "adapter.lora_plus_embedding_rate is not read: no embedding gets an update."
    if adapter.dropout and len(embeddings) == len(targets):
        yield f"adapter.dropout is {adapter.dropout:g}, but PEFT's updates of embeddings have no dropout."
    if adapter.init == "eva" and embeddings:
        yield f"adapter.init is eva, but {', '.join(embeddings)} starts as by default: EVA looks at linear layers only."


def _updated(adapter: LoraAdapter, shape: ModelShape) -> list[Module]:
    """All that gets an update: layers, and parameters beside them."""
    layers, parameters = all_updated(adapter, shape)
    return [*layers, *parameters]


_DEFAULT = LoraAdapter()


def _check_parameters(adapter: LoraAdapter, config: RunConfig, shape: ModelShape, targets: list[Module]) -> None:
    """Refuse what PEFT's wrapper of a parameter (`ParamWrapper`) refuses, or gets wrong, in the worker."""
    if not targets:
        return
    saved = {module.name for module in saved_modules(adapter, shape)}
    twice = next((target.name for target in targets if target.name.rpartition(".")[0] in saved), None)
    if twice:
        raise ModelError(
            f"adapter.target_parameters names {twice}, which adapter.modules_to_save trains in full. Take it out of one of the "
            f"two."
        )
    name = shape.name_in_layer(targets[0].name)
    what = f"{name} is a parameter and no linear layer, so that PEFT has"
    without = (
        without_experts(adapter, shape) if takes_experts(adapter.target_modules) else "take it out of adapter.target_parameters"
    )
    if adapter.dropout:
        raise UserError(
            f"adapter.dropout is {adapter.dropout:g}, but {what} no input to drop from. Set adapter.dropout to 0, or {without}."
        )
    if adapter.use_dora:
        raise UserError(f"adapter.use_dora is true, but {what} no DoRA for it. Set adapter.use_dora to false, or {without}.")
    if adapter.init not in WITH_EXPERTS:
        raise UserError(
            f"adapter.init is {adapter.init}, but {what} no such start for it. Set adapter.init to default or gaussian, or "
            f"{without}."
        )
    if config.training.compile:
        raise PlanError(
            f"training.compile is true, but {what} to change the model around it in every pass, and each change would be "
            f"compiled again. Set training.compile to false, or {without}."
        )


def without_experts(adapter: LoraAdapter, shape: ModelShape) -> str:
    """What to set so that a group does not take in fused experts, as the end of a sentence."""
    return f"leave the experts frozen with adapter.exclude_modules: [{', '.join(excluding_experts(adapter, shape))}]"


def excluding_experts(adapter: LoraAdapter, shape: ModelShape) -> list[str]:
    """`adapter.exclude_modules` with which a group of layers does not take in fused experts."""
    modules = (name.rpartition(".")[0] for name in expert_parameters(shape))
    return list(dict.fromkeys([*adapter.exclude_modules, *modules]))


def _check_names(adapter: LoraAdapter, shape: ModelShape) -> None:
    """Names and patterns that match nothing in the model at all: they are misspelt."""
    check_names(adapter, shape)
    names = names_in(shape)
    for setting, patterns in (("rank_pattern", adapter.rank_pattern), ("alpha_pattern", adapter.alpha_pattern)):
        for pattern in patterns:
            if not any(matches_end(pattern, name, f"adapter.{setting}") for name in names):
                raise ModelError(
                    f"adapter.{setting}: {pattern!r} matches no module of this {shape.model_type} model. {own_names(shape)}"
                )


def _check_biases(adapter: LoraAdapter, shape: ModelShape, targets: list[Module]) -> None:
    if adapter.bias == "none" or biases_of(adapter, shape, targets):
        return
    of_all = biases_of(adapter.model_copy(update={"bias": "all"}), shape, targets)
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


def _check_quantised(adapter: LoraAdapter, held: HeldBase, targets: list[Module]) -> None:
    quantization = held.quantization
    touched = next((module.name for module in targets if module.kind in LINEAR_KINDS), None)
    if quantization is None or touched is None:
        return
    of_format = held.key("format")
    if not quantization.is_4_bit and adapter.use_dora:
        raise UserError(
            f"adapter.use_dora needs the norms of {touched}'s weights, which bitsandbytes does not give in int8: training would "
            f"fail. Set {of_format} to nf4, or adapter.use_dora to false."
        )
    of_storage = held.key("quant_storage")
    integers, fix = "", ""
    if not quantization.is_4_bit:
        integers, fix = f"{of_format} int8", f"{of_format} to nf4"
    elif quantization.quant_storage == "uint8":
        integers, fix = f"{of_storage} uint8", f"{of_storage} to auto"
    if adapter.init == "orthogonal" and integers:
        raise UserError(
            f"adapter.init is orthogonal, which takes its dtype from the base weights, but {integers} makes {touched}'s "
            f"integers: the adapter could not be made. Set {fix}, or adapter.init to default, gaussian or eva."
        )
