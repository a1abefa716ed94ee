"""Updates of fused experts: what PEFT cannot give them, and what a plan says about the experts of a mixture."""

from raytune.config.adapter import FullAdapter, LoraAdapter, QloraAdapter
from raytune.config.run import RunConfig
from raytune.errors import ModelError, PlanError, UserError
from raytune.plan.adapter_size import GROUPS_WITH_EXPERTS, expert_parameters, saved_modules, target_parameters, trained_size
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
    is_group = isinstance(adapter.target_modules, str) and adapter.target_modules in GROUPS_WITH_EXPERTS
    what = f"{name} is a parameter and no linear layer, so that PEFT has"
    without = _without_experts(adapter, shape) if is_group else "take it out of adapter.target_parameters"
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
    is_group = isinstance(adapter.target_modules, str) and adapter.target_modules in GROUPS_WITH_EXPERTS
    alike = [
        module.name
        for layer in (shape.layer, *shape.other_layers)
        for module in layer
        if module.kind == "mlp" and module.name.rpartition(".")[2] in shape.names_of_experts
    ]
    if not (is_group and alike):
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
    if not isinstance(adapter, QloraAdapter):
        return ""
    share = shape.num_quantizable / shape.num_parameters
    others = "the experts stay in the run's precision"
    return f" {adapter.quantization} holds linear layers only, {share:.1%} of the parameters; {others}."


def _without_experts(adapter: LoraAdapter, shape: ModelShape) -> str:
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in expert_parameters(shape)))
    return f"leave the experts frozen with adapter.exclude_modules: [{', '.join([*adapter.exclude_modules, *modules])}]"
