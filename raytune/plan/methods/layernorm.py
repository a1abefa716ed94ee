"""Tuning of norms in a plan: which are trained, what is refused, and how a plan speaks of it."""

from collections.abc import Iterable, Iterator

from raytune.config.sections.adapter import LayerNormAdapter
from raytune.config.sections.model import Quantization
from raytune.config.sections.quantization import HeldBase
from raytune.config.sections.run import RunConfig
from raytune.errors import ModelError
from raytune.plan.defaults import adapter_epochs, adapter_rate
from raytune.plan.methods.experts import most_in_a_module, packed_experts
from raytune.plan.methods.layers import named_targets, unread_names, without_experts
from raytune.plan.methods.method import Method
from raytune.plan.methods.targets import check_names, saved_modules
from raytune.plan.model.module_names import has_name, is_left_to_saving, is_saved, matches
from raytune.plan.model.shapes import ModelShape, Module
from raytune.plan.model.trained import Trained, lowest_layer, whole_parts

ALL = "all-norms"


def is_named(name: str, wanted: str | list[str]) -> bool:
    """Whether targets take in a norm of this name.

    Raises:
        ModelError: if they are a pattern that is no regular expression.
    """
    if isinstance(wanted, list):
        return has_name(name, wanted)
    return wanted == ALL or matches(wanted, name, "adapter.target_modules")


def is_tuned(name: str, adapter: LayerNormAdapter) -> bool:
    """Whether a norm of this name is trained as one, and not as a module to save."""
    is_left = has_name(name, adapter.exclude_modules) or is_left_to_saving(name, adapter.modules_to_save)
    return is_named(name, adapter.target_modules) and not is_left


def _norms(shape: ModelShape) -> list[Module]:
    """Without those whose weights go to a kernel."""
    return [module for module in shape.modules() if module.kind == "norm" and not module.is_bypassed]


def tuned_norms(adapter: LayerNormAdapter, shape: ModelShape) -> list[Module]:
    """The norms that are trained, under their full names.

    Raises:
        ModelError: if there are none, or a name matches none or another module.
    """
    norms, wanted = _norms(shape), adapter.target_modules
    by_name = {module.name for module in norms}
    for one in wanted if isinstance(wanted, list) else [wanted]:
        asked = [one] if isinstance(wanted, list) else one
        meant = [module.name for module in shape.modules() if asked != ALL and is_named(module.name, asked)]
        other = next((name for name in meant if name not in by_name), None)
        if other:
            raise ModelError(
                f"adapter.target_modules {one!r} takes in {other}, which is no norm that is called as one. adapter.method "
                f"layernorm trains norms; adapter.modules_to_save trains other modules in full."
            )
        if asked != ALL and not meant:
            raise ModelError(_no_such_norm(wanted, norms, shape))
    tuned = [module for module in norms if is_tuned(module.name, adapter)]
    if not tuned:
        raise ModelError(_no_such_norm(wanted, norms, shape))
    return tuned


def _no_such_norm(wanted: str | list[str], norms: Iterable[Module], shape: ModelShape) -> str:
    own = sorted({module.name.rpartition(".")[2] for module in norms})
    is_pattern = isinstance(wanted, str) and wanted != ALL
    regex = " A single string is a regular expression that must match a whole name; give a list for names." if is_pattern else ""
    return (
        f"adapter.target_modules {wanted!r} leaves no norm of this {shape.model_type} model to train. Its norms are "
        f"{', '.join(own) or 'without weights'}.{regex}"
    )


def _trained(adapter: LayerNormAdapter, shape: ModelShape, quantization: Quantization | None) -> Trained:
    parts = (*whole_parts(tuned_norms(adapter, shape)), *whole_parts(saved_modules(adapter, shape)))
    packed = packed_experts(adapter, shape, quantization)
    return Trained(
        parts=parts,
        lowest_layer=lowest_layer([part.name for part in parts], shape),
        num_sides=sum(part.num_parameters for part in parts),
        num_packed=sum(one.num_parameters for one in packed),
        num_packed_per_layer=most_in_a_module(packed),
        largest_packed=max((one.num_parameters for one in packed), default=0),
    )


def _check(adapter: LayerNormAdapter, config: RunConfig, held: HeldBase, shape: ModelShape) -> None:
    check_names(adapter, shape)
    both = next((norm.name for norm in tuned_norms(adapter, shape) if is_saved(norm.name, adapter.modules_to_save)), None)
    if both:
        raise ModelError(
            f"adapter.modules_to_save {adapter.modules_to_save} takes in {both}, because PEFT asks for the end of a name only, "
            f"and adapter.method layernorm trains it already. Leave the name out, or write the whole name of a module."
        )


def _unread(adapter: LayerNormAdapter, shape: ModelShape) -> Iterator[str]:
    return unread_names(adapter, shape, tuned_norms)


METHOD = Method(
    trained=_trained,
    check=_check,
    in_words=lambda adapter, held, trained: f"layernorm on {named_targets(adapter)}{held}, {trained}",
    expert_notes=without_experts("norms"),
    # PEFT's comparison of methods (method_comparison/MetaMathQA, Llama 3.2 3B) gives norms the rate of LoRA.
    learning_rate=adapter_rate,
    epochs=adapter_epochs,
    weight_decay=0.0,  # it would draw the norms' weights to 0, and so the base
    unread=_unread,
    when="a change of tone or domain in the fewest parameters",
)
