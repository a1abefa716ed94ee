"""`model.dropout` against the dropouts that an architecture has: values of the base's own config. Pure."""

from raytune.config.sections.model import Attention, ModelSection
from raytune.errors import PlanError, UserError
from raytune.plan.model.shapes import ModelShape

WITHOUT_DROPOUT: tuple[Attention, ...] = ("flex_attention", "flash_attention_3")
"""Kinds of attention whose kernels drop nothing."""


def resolve_dropout(section: ModelSection, shape: ModelShape) -> dict[str, float]:
    """Keys of the base's config with the rates that they are to have.

    Raises:
        UserError: if the architecture has no such dropout.
    """
    known = dict(shape.dropouts)
    asked = {kind: rate for kind, rate in section.dropout.model_dump().items() if rate is not None}
    for kind, rate in asked.items():
        if kind not in known:
            others = ", ".join(f"{name} (its {key})" for name, key in known.items())
            raise UserError(
                f"model.dropout.{kind} is {rate:g}, but a {shape.model_type} model has no such dropout"
                f"{f': only {others}' if known else ', nor any other'}. Leave it out.",
                keys=(f"model.dropout.{kind}",),
            )
    return {known[kind]: rate for kind, rate in asked.items()}


def drops_attention(section: ModelSection) -> bool:
    """Whether the config asks for dropout of attention probabilities."""
    return bool(section.dropout.attention)


def check_drops(section: ModelSection) -> None:
    """Refuse a kind of attention that would drop nothing.

    Raises:
        PlanError: naming the key.
    """
    if drops_attention(section) and section.attention in WITHOUT_DROPOUT:
        raise PlanError(
            f"model.dropout.attention is {section.dropout.attention:g}, but model.attention {section.attention} has no dropout. "
            f"Set model.attention to auto.",
            keys=("model.dropout.attention", "model.attention"),
        )
