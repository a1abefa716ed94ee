"""Updates of fused experts: what PEFT cannot give them, and what a plan says about the experts of a mixture."""

from raytune.config.adapter import FullAdapter, LoraAdapter, QloraAdapter
from raytune.config.run import RunConfig
from raytune.errors import ModelError, PlanError, UserError
from raytune.plan.adapter_size import (
    GROUPS_WITH_EXPERTS,
    all_parameters,
    expert_parameters,
    fits_4_bits,
    packed_experts,
    saved_modules,
    target_parameters,
    trained_size,
)
from raytune.plan.memory import num_quantised
from raytune.plan.shapes import ModelShape
from raytune.units import format_count

WITH_EXPERTS = ("default", "gaussian")
"""Starts that need neither the weights nor the inputs of a layer."""


def check_expert_updates(config: RunConfig, shape: ModelShape) -> None:
    """Refuse what PEFT's wrapper of a parameter (`ParamWrapper`) refuses, or gets wrong, in the worker.

    Raises:
        UserError: (or PlanError, ModelError) with the nearest setting that works.
    """
    adapter = config.adapter
    if isinstance(adapter, FullAdapter):
        return
    targets = target_parameters(adapter, shape)
    if not targets:
        return
    saved = {module.name for module in saved_modules(adapter, shape)}
    twice = next((target.name for target in targets if target.name.rpartition(".")[0] in saved), None)
    if twice:
        raise ModelError(
            f"adapter.target_parameters names {twice}, which adapter.modules_to_save trains in full. Take it out of one of the "
            f"two."
        )
    name = targets[0].name.removeprefix(f"{shape.layers_name}.").partition(".")[2]
    what = f"{name} is a parameter and no linear layer, so that PEFT has"
    without = _without_experts(adapter, shape) if _is_group(adapter) else "take it out of adapter.target_parameters"
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


def expert_notes(config: RunConfig, shape: ModelShape) -> list[str]:
    """What happens to the fused experts of a model, in sentences; none if it has none."""
    adapter, names = config.adapter, expert_parameters(shape)
    if not names:
        return []
    num_experts = max(module.copies for module in shape.modules() if module.kind == "experts")
    size = shape.parameters_by_kind["experts"]
    share = f"{format_count(size)} of {format_count(shape.num_parameters)} parameters ({size / shape.num_parameters:.0%})"
    have = f"The {num_experts} experts of a layer are fused in {' and '.join(names)}: {share}"
    if isinstance(adapter, FullAdapter):
        return [f"{have}. They are trained, and so are the routers."]
    return [f"{have}. {_trained(adapter, shape)}{_quantised(adapter, shape)}", *_left_out(adapter, shape)]


def _left_out(adapter: LoraAdapter, shape: ModelShape) -> list[str]:
    """Linear layers that a group would take in, had they other names."""
    alike = [
        module.name
        for layer in (shape.layer, *shape.other_layers)
        for module in layer
        if module.kind == "mlp" and module.name.rpartition(".")[2] in shape.names_of_experts
    ]
    if not (_is_group(adapter) and alike):
        return []
    names = ", ".join(dict.fromkeys(alike))
    return [f"{adapter.target_modules} leaves out {names}: PEFT takes these names for the fused experts'."]


def _trained(adapter: LoraAdapter, shape: ModelShape) -> str:
    targets = [target for target in target_parameters(adapter, shape) if target.kind == "experts"]
    if targets:
        suffixes = " and ".join(sorted({target.name.rpartition(".")[2] for target in targets}))
        size = trained_size(adapter, shape)
        num_layers = len({target.name.rpartition(".")[0] for target in targets})
        return (
            f"Every expert's {suffixes} gets an update of its own in {num_layers} of {shape.num_layers} layers: "
            f"{format_count(size.num_in_experts)} of {format_count(size.num_trainable)} trained parameters."
        )
    if any(module.kind == "experts" for module in saved_modules(adapter, shape)):
        return "adapter.modules_to_save trains them in full."
    return f"They are not trained; adapter.target_parameters: [{', '.join(expert_parameters(shape))}] would train them."


def _quantised(adapter: LoraAdapter, shape: ModelShape) -> str:
    """Which of them are packed numbers, and why others are not."""
    if not isinstance(adapter, QloraAdapter):
        return ""
    size, packed = trained_size(adapter, shape), {parameter.name for parameter in packed_experts(adapter, shape)}
    others = [parameter for parameter in all_parameters(shape) if parameter.kind == "experts" and parameter.name not in packed]
    share = f"{num_quantised(shape, size) / shape.num_parameters:.1%} of the parameters"
    if not others:
        return f" {adapter.quantization} holds them like linear layers, {share}; a pass expands those of one layer at a time."
    what = "linear layers, and the experts that nothing changes" if packed else "linear layers only"
    odd = next((one for one in others if not fits_4_bits(one.num_parameters)), None)
    if adapter.quantization == "int8":
        why = "the experts stay in the run's precision, since bitsandbytes packs them in 4 bits only"
    elif odd:
        name = odd.name.removeprefix(f"{shape.layers_name}.").partition(".")[2]
        why = f"{name} stays in the run's precision, since bitsandbytes cannot pack its {odd.num_parameters} weights at once"
    else:
        why = "experts that are trained stay in the run's precision"
        why += f"; to pack them too, {_without_experts(adapter, shape)}" if _is_group(adapter) else ""
    return f" {adapter.quantization} holds {what}, {share}; {why}."


def _without_experts(adapter: LoraAdapter, shape: ModelShape) -> str:
    return f"leave the experts frozen with adapter.exclude_modules: [{', '.join(excluding_experts(adapter, shape))}]"


def excluding_experts(adapter: LoraAdapter, shape: ModelShape) -> list[str]:
    """`adapter.exclude_modules` with which a group of layers does not take in fused experts."""
    modules = (name.rpartition(".")[0] for name in expert_parameters(shape))
    return list(dict.fromkeys([*adapter.exclude_modules, *modules]))


def takes_in_experts(adapter: LoraAdapter, shape: ModelShape) -> bool:
    """Whether fused experts get an update because their group is named."""
    return _is_group(adapter) and any(target.kind == "experts" for target in target_parameters(adapter, shape))


def _is_group(adapter: LoraAdapter) -> bool:
    return isinstance(adapter.target_modules, str) and adapter.target_modules in GROUPS_WITH_EXPERTS
