"""A teacher in a plan: who it is, what cannot be learned from it, and the words for it. Pure."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from raytune.config.sections.adapter import without_preset
from raytune.config.sections.model import ModelSection
from raytune.config.sections.run import RunConfig
from raytune.config.sections.strategy import DistillationSection
from raytune.errors import UserError
from raytune.plan.methods import method_of
from raytune.plan.model.references import planned_shape
from raytune.plan.model.shapes import ModelShape
from raytune.plan.run_plan import DistillationPlan, ModelPlan
from raytune.units import format_count

BASE = "base"
"""The teacher that is the base of the run itself."""
SECTION = "strategy.distillation"
MOST_NAMES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherFiles:
    """A teacher beside the model in training, as it was found."""

    path: str
    revision: str | None
    content: dict[str, str]
    """As `ModelPlan.content`."""


def distillation_of(config: RunConfig) -> DistillationSection | None:
    """What is asked for; None without a teacher. Weight 0 asks for none."""
    section = config.strategy.distillation
    return section if section and section.weight > 0 else None


def teacher_section(config: RunConfig) -> ModelSection | None:
    """The model that is loaded beside the one in training; None if there is none."""
    section = distillation_of(config)
    if section is None or _is_beneath(config, section):
        return None
    if section.teacher == BASE:
        return ModelSection(
            base=config.model.base, revision=config.model.revision, trust_remote_code=config.model.trust_remote_code
        )
    return ModelSection(base=section.teacher, revision=section.revision, trust_remote_code=section.trust_remote_code)


def planned_teacher(config: RunConfig) -> ModelShape | None:
    """The shape of what `teacher_section` names, for a plan that loads nothing.

    Raises:
        ModelError: as `planned_shape` does.
    """
    section = teacher_section(config)
    return section and planned_shape(section.base, section.revision, trust_remote_code=section.trust_remote_code)


def names_base(config: RunConfig) -> bool:
    """Whether the teacher is the base of the run, beneath what is trained or as a second copy."""
    section = distillation_of(config)
    return section is not None and section.teacher == BASE


def is_beneath(config: RunConfig) -> bool:
    """Whether the teacher is the frozen base beneath what is trained."""
    section = distillation_of(config)
    return section is not None and _is_beneath(config, section)


def _is_beneath(config: RunConfig, section: DistillationSection) -> bool:
    adapter = without_preset(config.adapter)
    return section.teacher == BASE and method_of(adapter).keeps_base(adapter)


def check_distillation(config: RunConfig, shape: ModelShape, teacher: ModelShape | None, row_length: int | None) -> None:
    """Refuse a teacher that cannot see what the model sees, or not say something about it.

    Args:
        shape: of the base.
        teacher: shape of what `teacher_section` names; None: there is none, or it is not here.
        row_length: tokens that a row holds at most, if that is known.

    Raises:
        UserError: with what to set instead.
    """
    section = distillation_of(config)
    if section is None:
        return
    if config.model.new_tokens:
        raise UserError(
            f"model.new_tokens are unknown to the teacher ({section.teacher}), which could say nothing behind them. Leave "
            f"{SECTION} out, or add the tokens to both models first.",
            keys=(SECTION, "model.new_tokens"),
        )
    if teacher is None:
        return
    key = f"{SECTION}.teacher"
    if teacher.stored_quantization is not None:
        raise UserError(
            f"The teacher {section.teacher} is stored quantised (quantization_config in its config.json). Give its original "
            f"weights as {key}.",
            keys=(key,),
        )
    if teacher.why_lone and not shape.why_lone:
        raise UserError(
            f"The teacher {section.teacher} sees a document at a time, and the rows of this run are packed: {teacher.why_lone}. "
            f"Give another {key}.",
            keys=(key,),
        )
    if row_length is not None and row_length > teacher.max_positions:
        raise UserError(
            f"Rows have {row_length} tokens, and the teacher {section.teacher} has {teacher.max_positions} positions. Set "
            f"data.max_length to {teacher.max_positions}, or give another {key}.",
            keys=(key, "data.max_length"),
        )


def check_vocabularies(teacher_name: str, own: Mapping[str, int], teachers: Mapping[str, int], num_shared: int) -> None:
    """Refuse a teacher that has other tokens: its probabilities would be of something else.

    Args:
        own, teachers: token -> number.
        num_shared: tokens that both models have a logit for.

    Raises:
        UserError: naming some of the tokens that differ.
    """
    key = f"{SECTION}.teacher"
    names = [token for token in {**own, **teachers} if own.get(token) != teachers.get(token)]
    if names:
        some = ", ".join(f"{name!r} ({_number(own, name)} here, {_number(teachers, name)} there)" for name in names[:MOST_NAMES])
        raise UserError(
            f"The teacher {teacher_name} has another vocabulary than the model that is to learn from it: {len(names)} tokens "
            f"differ, such as {some}. Distillation compares probabilities token by token: give a teacher with the same tokens, "
            f"usually one of the same family, as {key}; or let it write answers, and train on these as rows.",
            keys=(key,),
        )
    if (largest := max(own.values(), default=-1)) >= num_shared:
        raise UserError(
            f"Token number {largest} has no logit in one of the two models, which share {num_shared}: the tokenizer of "
            f"{teacher_name} has more tokens than a model has rows of embeddings. Give another {key}.",
            keys=(key,),
        )


def _number(vocabulary: Mapping[str, int], name: str) -> str:
    return str(vocabulary[name]) if name in vocabulary else "absent"


def distillation_plan(config: RunConfig, teacher: ModelPlan | None) -> DistillationPlan | None:
    """
    Args:
        teacher: what `teacher_section` names, as it is loaded.
    """
    section = distillation_of(config)
    if section is None:
        return None
    return DistillationPlan(weight=section.weight, temperature=section.temperature, top_k=section.top_k, teacher=teacher)


def distillation_in_words(plan: DistillationPlan | None, base: str) -> str:
    """Whom the model learns from, for the table of a plan; empty without a teacher."""
    if plan is None:
        return ""
    if plan.teacher is None:
        who = "the frozen base beneath the adapter, no second copy"
    else:
        who = f"{plan.teacher.path}{' as it is now, a second copy' if plan.teacher.path == base else ''}, in {plan.teacher.dtype}"
    top = f", among its {plan.top_k} likeliest tokens" if plan.top_k else ""
    return (
        f"{who}; loss: {1 - plan.weight:.3g} x cross-entropy + {plan.weight:.3g} x {plan.temperature:g}^2 x KL(teacher || model) "
        f"at temperature {plan.temperature:g}{top}"
    )


def distillation_notes(config: RunConfig, shape: ModelShape, teacher: ModelShape | None) -> Iterator[str]:
    """What a reader of the plan may not expect."""
    if config.strategy.distillation is None:
        return
    section = distillation_of(config)
    if section is None:
        yield f"{SECTION}.weight is 0: there is no teacher, and none is loaded."
        return
    yield (
        "train/loss is all that is minimised, with the teacher's part, which is train/distillation. validation/loss is "
        "cross-entropy alone, so that runs compare."
    )
    if is_beneath(config) and config.model.rope_scaling is not None:
        yield (
            "The teacher is the base beneath the adapter with the positions of model.rope_scaling, untrained with these, and not "
            "the base as it was."
        )
    if section.teacher == BASE and teacher is not None and config.adapter.method != "full":
        yield (
            f"As it is set here, adapter.method {config.adapter.method} changes weights of the base: the teacher is a second "
            f"copy of it."
        )
    if teacher is not None and teacher.vocab != shape.vocab:
        yield (
            f"The teacher has {format_count(teacher.vocab)} rows of embeddings and the model {format_count(shape.vocab)}: the "
            f"divergence is over the {min(teacher.vocab, shape.vocab)} tokens that both have."
        )
