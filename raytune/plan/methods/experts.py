"""Fused experts of a mixture in a plan: their parameters, which of them a quantised base packs, and what is said of them."""

from collections import Counter
from collections.abc import Iterable

from raytune.config.sections.model import Quantization
from raytune.plan.methods.targets import NamesTargets, all_parameters, expert_parameters, is_within_saved
from raytune.plan.model.quantization import num_quantised
from raytune.plan.model.shapes import ModelShape, Module
from raytune.plan.model.trained import Trained
from raytune.units import format_count

GROUPS_WITH_EXPERTS = ("all-linear", "mlp")
"""Fused experts are an MLP's linear layers in everything but their class."""


def takes_experts(target_modules: str | list[str]) -> bool:
    """Whether targets are a group that takes in fused experts."""
    return isinstance(target_modules, str) and target_modules in GROUPS_WITH_EXPERTS


def packed_experts(
    adapter: NamesTargets, shape: ModelShape, quantization: Quantization | None, updated: Iterable[Module] = ()
) -> list[Module]:
    """Parameters of fused experts that are held in 4 bits, each as a module of its own: those that nothing changes.

    Args:
        updated: parameters that get an update, for which PEFT needs them in floating point.
    """
    if quantization is None or not quantization.is_4_bit:
        return []
    changed = {parameter.name for parameter in updated}
    return [
        parameter
        for parameter in all_parameters(shape)
        if parameter.kind == "experts"
        and parameter.name not in changed
        and not is_within_saved(parameter.name, adapter)
        and fits_4_bits(parameter.num_parameters)
    ]


def fits_4_bits(num_weights: int) -> bool:
    """Whether bitsandbytes packs so many weights at once: its kernels count in 32 bits
    (https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1785), and 8 weights fill any dtype that may hold them."""
    return num_weights < 2**31 and num_weights % 8 == 0


def most_in_a_module(parameters: Iterable[Module]) -> int:
    """Weights of these parameters in the module that has most of them."""
    counts = Counter[str]()
    for parameter in parameters:
        counts[parameter.name.rpartition(".")[0]] += parameter.num_parameters
    return max(counts.values(), default=0)


def of_experts(shape: ModelShape) -> str:
    """How many experts there are, in which parameters, and how much of the model they are."""
    num_experts = max(module.copies for module in shape.modules() if module.kind == "experts")
    size = shape.parameters_by_kind["experts"]
    share = f"{format_count(size)} of {format_count(shape.num_parameters)} parameters ({size / shape.num_parameters:.0%})"
    return f"The {num_experts} experts of a layer are fused in {' and '.join(expert_parameters(shape))}: {share}"


def how_experts_are_held(
    packed: list[Module], shape: ModelShape, trained: Trained, quantization: Quantization | None, to_pack_more: str
) -> str:
    """Which of them are packed numbers, and why others are not.

    Args:
        packed: parameters that are.
        to_pack_more: what to set so that those are packed as well that are trained; empty: nothing can be set.
    """
    if quantization is None:
        return ""
    names = {parameter.name for parameter in packed}
    others = [parameter for parameter in all_parameters(shape) if parameter.kind == "experts" and parameter.name not in names]
    share = f"{num_quantised(shape, trained) / shape.num_parameters:.1%} of the parameters"
    if not others:
        return f" {quantization.format} holds them like linear layers, {share}; a pass expands those of one layer at a time."
    what = "linear layers, and the experts that nothing changes" if packed else "linear layers only"
    odd = next((one for one in others if not fits_4_bits(one.num_parameters)), None)
    if not quantization.is_4_bit:
        why = "the experts stay in the run's precision, since bitsandbytes packs them in 4 bits only"
    elif odd:
        name = shape.name_in_layer(odd.name)
        why = f"{name} stays in the run's precision, since bitsandbytes cannot pack its {odd.num_parameters} weights at once"
    else:
        why = "experts that are trained stay in the run's precision"
        why += f"; to pack them too, {to_pack_more}" if to_pack_more else ""
    return f" {quantization.format} holds {what}, {share}; {why}."
