"""LoRA in a plan: which layers get an update and how large it is, what it leaves of ZeRO, and how a plan speaks of it."""

from collections.abc import Iterator

from raytune.config.sections.adapter import Adapter, LoraAdapter
from raytune.config.sections.model import Quantization
from raytune.plan.defaults import adapter_epochs, adapter_rate
from raytune.plan.methods.experts import (
    how_experts_are_held,
    most_in_a_module,
    of_experts,
    packed_experts,
    takes_experts,
)
from raytune.plan.methods.lora_limits import FROM_BASE, check, excluding_experts, unread, without_experts
from raytune.plan.methods.lora_updates import UpdateSize, all_updated, biases_of, sizes_of, updated_layers, updated_parameters
from raytune.plan.methods.method import Method
from raytune.plan.methods.targets import expert_parameters, in_short, saved_modules
from raytune.plan.methods.token_rows import num_rows, row_parts
from raytune.plan.model.shapes import LINEAR_KINDS, ModelShape, Module
from raytune.plan.model.stage_limit import StageLimit
from raytune.plan.model.trained import Trained, TrainedPart, lowest_layer, whole_parts
from raytune.units import format_count

WEIGHT_BASED_INITS = ("pissa", "olora", "eva")


def lora_rank(adapter: Adapter) -> int | None:
    """Of an update that other programs know as LoRA; None: it is of another kind."""
    return adapter.rank if isinstance(adapter, LoraAdapter) else None


def _trained(adapter: LoraAdapter, shape: ModelShape, quantization: Quantization | None) -> Trained:
    """LoRA trains A (rank x inputs) and B (outputs x rank) of each target, and of each expert's matrices; DoRA a magnitude per
    output as well. Modules to save are trained in full, as copies beside the frozen original."""
    layers, parameters = all_updated(adapter, shape)
    sizes = sizes_of(adapter, [*layers, *parameters])
    saved = whole_parts(saved_modules(adapter, shape))
    biases = biases_of(adapter, shape, layers)
    num_magnitudes = sum(module.outputs for module in layers) if adapter.use_dora else 0
    rows = row_parts(adapter, shape)
    parts = (*(_part(adapter, one, sizes[one.name]) for one in (*layers, *parameters)), *_bias_parts(biases), *rows)
    in_layers = [module for module in layers if module.kind in LINEAR_KINDS]
    updated = [parameter for parameter in parameters if parameter.kind == "experts"]
    packed = packed_experts(adapter, shape, quantization, parameters)
    # What these compute of their inputs needs more than 16 bits (model.adapters.input_casts).
    casts = adapter.dropout > 0 or adapter.use_dora
    return Trained(
        parts=(*parts, *saved),
        lowest_layer=lowest_layer([part.name for part in (*parts, *saved)], shape),
        num_sides=sum(module.inputs + module.outputs for module in layers)
        + sum(one.inputs + one.outputs + 2 * sizes[one.name].rank * one.copies for one in parameters)
        + num_magnitudes
        + len(rows) * (num_rows(adapter, shape) + shape.hidden)
        + sum(part.num_parameters for part in saved),
        reads_inputs=True,
        casts_inputs=casts,
        num_constants=sum(part.num_parameters for part in rows),
        target_inputs=sum(module.inputs for module in in_layers),
        # Inputs in fp32, and what of these is not dropped.
        passing_ahead=casts * (1 + (adapter.dropout > 0)) * max((module.inputs for module in in_layers), default=0),
        inner_width=sum(sizes[module.name].rank for module in in_layers),
        drops_inputs=adapter.dropout > 0,
        num_in_experts=sum(sizes[parameter.name].num_parameters for parameter in updated),
        expert_rank=adapter.rank,
        num_updated_per_layer=most_in_a_module(updated),
        largest_updated=max((one.num_parameters for one in updated), default=0),
        num_packed=sum(one.num_parameters for one in packed),
        num_packed_per_layer=most_in_a_module(packed),
        largest_packed=max((one.num_parameters for one in packed), default=0),
        way_back_rate_scale=adapter.lora_plus_ratio,
        embedding_rate=adapter.lora_plus_embedding_rate if adapter.lora_plus_ratio else None,
    )


def _part(adapter: LoraAdapter, target: Module, size: UpdateSize) -> TrainedPart:
    is_layer = target.kind not in ("experts", "router") or target.is_linear_layer
    num_magnitudes = target.outputs if adapter.use_dora and is_layer else 0
    factors = ((size.rank, target.inputs), (target.outputs, size.rank))
    return TrainedPart(
        name=target.name,
        kind=target.kind,
        how="low rank",
        num_parameters=size.num_parameters + num_magnitudes,
        matrices=factors if target.is_linear and target.kind != "head" else (),
        is_parameter=not is_layer,
    )


def _bias_parts(modules: list[Module]) -> Iterator[TrainedPart]:
    for module in modules:
        yield TrainedPart(name=module.name, kind=module.kind, how="bias", num_parameters=module.num_biases)


def _stage_limits(adapter: LoraAdapter, shape: ModelShape, quantization: Quantization | None) -> list[StageLimit]:
    limits = []
    if adapter.use_dora and quantization and any(one.kind in LINEAR_KINDS for one in updated_layers(adapter, shape)):
        because = "adapter.use_dora is true, which takes norms of whole quantised weights and finds none in a shard"
        limits.append(StageLimit(0, 2, because))
    if adapter.init in WEIGHT_BASED_INITS:
        limits.append(StageLimit(0, 2, f"adapter.init is {adapter.init}, which looks at whole weights"))
    return limits


def _in_words(adapter: LoraAdapter, held: str, trained: str) -> str:
    named = [in_short(names) for names in (adapter.target_modules, adapter.target_parameters) if names]
    return f"lora rank {adapter.rank} on {', '.join(named)}{held}, {trained}"


def _reasons(adapter: LoraAdapter, shape: ModelShape) -> Iterator[str]:
    """The rate of embeddings' low-rank updates where LoRA+ gives them one of their own."""
    if adapter.lora_plus_ratio is None or "lora_plus_embedding_rate" in adapter.model_fields_set:
        return
    embeddings = [module.name for module in updated_layers(adapter, shape) if module.kind == "embedding"]
    if embeddings:
        yield (
            f"adapter.lora_plus_embedding_rate is {adapter.lora_plus_embedding_rate:g}, PEFT's: with LoRA+ the update of "
            f"{', '.join(embeddings)} learns at this rate, whatever training.learning_rate is."
        )


def _expert_notes(adapter: LoraAdapter, shape: ModelShape, trained: Trained, quantization: Quantization | None) -> list[str]:
    packed = packed_experts(adapter, shape, quantization, updated_parameters(adapter, shape))
    to_pack_more = without_experts(adapter, shape) if takes_experts(adapter.target_modules) else ""
    held = how_experts_are_held(packed, shape, trained, quantization, to_pack_more)
    return [f"{of_experts(shape)}. {_trained_experts(shape, trained)}{held}", *_left_out(adapter, shape)]


def _trained_experts(shape: ModelShape, trained: Trained) -> str:
    targets = [part for part in trained.parts if part.kind == "experts" and part.how == "low rank"]
    if targets:
        suffixes = " and ".join(sorted({target.name.rpartition(".")[2] for target in targets}))
        num_layers = len({target.name.rpartition(".")[0] for target in targets})
        return (
            f"Every expert's {suffixes} gets an update of its own in {num_layers} of {shape.num_layers} layers: "
            f"{format_count(trained.num_in_experts)} of {format_count(trained.num_trainable)} trained parameters."
        )
    if any(part.kind == "experts" for part in trained.parts):
        return "adapter.modules_to_save trains them in full."
    return f"They are not trained; adapter.target_parameters: [{', '.join(expert_parameters(shape))}] would train them."


def _left_out(adapter: LoraAdapter, shape: ModelShape) -> list[str]:
    """Linear layers that a group would take in, had they other names."""
    alike = [
        module.name
        for layer in (shape.layer, *shape.other_layers)
        for module in layer
        if module.kind == "mlp" and module.name.rpartition(".")[2] in shape.names_of_experts
    ]
    if not (takes_experts(adapter.target_modules) and alike):
        return []
    names = ", ".join(dict.fromkeys(alike))
    return [f"{adapter.target_modules} leaves out {names}: PEFT takes these names for the fused experts'."]


def _exclusions(adapter: LoraAdapter, shape: ModelShape) -> list[str]:
    taken_in = takes_experts(adapter.target_modules) and any(one.kind == "experts" for one in updated_parameters(adapter, shape))
    return excluding_experts(adapter, shape) if taken_in else []


METHOD = Method(
    trained=_trained,
    check=check,
    in_words=_in_words,
    expert_notes=_expert_notes,
    learning_rate=adapter_rate,
    epochs=adapter_epochs,
    weight_decay=0.0,  # QLoRA: the rank already limits what it can do
    keeps_base=lambda adapter: adapter.init not in FROM_BASE and adapter.bias == "none",
    stage_limits=_stage_limits,
    unread=unread,
    reasons=_reasons,
    exclusions=_exclusions,
    when="most tasks: near full fine-tuning on what is not too far from the base, in a fraction of its bytes",
)
