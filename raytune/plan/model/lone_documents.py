"""Models whose forward pass may hold one document only: hybrids whose layers keep a state, and those without packed attention."""

from raytune.config.sections.model import Attention
from raytune.config.sections.quantization import HeldBase
from raytune.config.sections.run import RunConfig
from raytune.config.sections.training import TrainingSection
from raytune.errors import ModelError, PlanError, UserError, capitalised
from raytune.plan.defaults import Choice
from raytune.plan.model.shapes import ModelShape


def check_lone_documents(config: RunConfig, held: HeldBase, shape: ModelShape) -> None:
    """Refuse rows that hold more than one document, and passes that hold more than one row.

    Raises:
        UserError: (or ModelError) with what to set instead.
    """
    if not shape.why_lone:
        return
    if config.data.packing != "none":
        raise ModelError(
            f"{shape.why_lone}, and data.packing is {config.data.packing}. Set data.packing to none: each forward pass then has "
            f"one document, without padding."
        )
    rows = config.training.per_device_train_batch_size
    if rows not in ("auto", 1):
        raise UserError(
            f"training.per_device_train_batch_size is {rows}, but {shape.why_lone}: a forward pass has one document. Set "
            f"it to 1; training.gradient_accumulation_steps {rows} makes as many rows per step."
        )
    bypassed = [module.name for layer in shape.layers() for module in layer if module.is_linear and module.is_bypassed]
    if bypassed and held.quantization:
        raise ModelError(
            f"{held.key('format')} is {held.quantization.format}, but a {shape.model_type} model hands the weight of "
            f"{bypassed[0]} to a kernel, which cannot read packed numbers. {capitalised(held.to_undo)}."
        )


def choose_lone_attention(wanted: str, usable: list[Attention], shape: ModelShape) -> Choice[Attention]:
    """transformers' own attention, the best that machine and model have.

    Args:
        usable: what the machine computes in this precision.

    Raises:
        PlanError: if the one asked for is not among them.
    """
    both: list[Attention] = [kind for kind in shape.lone_attention if kind in usable]
    if not both:
        raise PlanError(f"No attention of this {shape.model_type} model ({', '.join(shape.lone_attention)}) works here.")
    if wanted == "auto":
        return Choice(both[0], f"model.attention is {both[0]}, transformers' own: each forward pass has one document.")
    chosen: list[Attention] = [kind for kind in both if kind == wanted]
    if not chosen:
        raise PlanError(
            f"model.attention {wanted} does not work for this {shape.model_type} model here. Set it to {' or '.join(both)}."
        )
    return Choice(chosen[0])


def rows_of_a_pass(training: TrainingSection, shape: ModelShape) -> TrainingSection:
    """The training section with what such a model leaves of it: one row per forward pass."""
    return training.model_copy(update={"per_device_train_batch_size": 1}) if shape.why_lone else training


def lone_notes(shape: ModelShape) -> list[str]:
    """What a plan says of such a model."""
    if not shape.why_lone:
        return []
    notes = [f"{shape.why_lone}: each forward pass has one document."]
    if shape.state_width:
        notes += [
            "Parameters and weights are exact; activations of layers with a state are an estimate for transformers' elementary "
            "steps. Where their kernels (mamba-ssm, causal-conv1d, flash-linear-attention) are installed, they keep less and are "
            "faster."
        ]
    linear = (module for layer in shape.layers() for module in layer if module.is_linear)
    bypassed = list(dict.fromkeys(module.name for module in linear if module.is_bypassed))
    if bypassed:
        notes += [f"Groups of target modules leave out {', '.join(bypassed)}, whose weights go to a kernel past the layer."]
    return notes
