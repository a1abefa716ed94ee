"""`model.rope_scaling` in a plan: whether a base's rotary positions can be stretched, and how far they reach then. Pure."""

from collections.abc import Iterator, Mapping
from typing import Any

from raytune.config.sections.model import ModelSection, RopeScalingSection
from raytune.errors import UserError
from raytune.plan.model.shapes import ModelShape, Rope
from raytune.plan.model.trained import Trained
from raytune.plan.run_plan import RopePlan

KEY = "model.rope_scaling"
PLAIN = "default"
REPLACED = (PLAIN, "linear", "dynamic", "yarn", "llama3")
"""Kinds of a base's own rotary positions that another scaling can take the place of: functions of theta and an original length.
Others (LongRoPE) have factors that were searched for, or several kinds of positions at once."""
WITH_ORIGINAL = ("yarn", "llama3")
"""Kinds whose parameters name the length that the base was first trained with. `linear` needs none, and `dynamic` takes the
config's `max_position_embeddings` for it."""

GIVEN = (
    *("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    *("low_freq_factor", "high_freq_factor"),
)
"""Keys of the section that go into the parameters as they are, where they are given."""


def own_rope(config: Mapping[str, Any]) -> Rope:
    """The rotary positions that the `config.json` of an architecture which has them describes.

    Args:
        config: content of the file, in the form of transformers 5 (`rope_parameters`) or 4 (`rope_scaling`).
    """
    written = config.get("rope_parameters") or config.get("rope_scaling")
    values: Mapping[str, Any] = written if isinstance(written, Mapping) else {}
    if any(isinstance(value, Mapping) for value in values.values()):
        return Rope(kind="of its own for each kind of layer")
    kind = "mrope" if "mrope_section" in values else str(values.get("rope_type") or values.get("type") or PLAIN)
    factor, original = values.get("factor"), None
    if kind in WITH_ORIGINAL:
        original = config.get("original_max_position_embeddings") or values.get("original_max_position_embeddings")
    return Rope(
        kind=kind,
        factor=float(factor) if isinstance(factor, int | float) and factor >= 1 else 1.0,
        original=original if isinstance(original, int) and original > 0 else None,
    )


def own_positions(rope: Rope | None, written: int) -> int:
    """Positions that a base has by itself.

    Args:
        written: `max_position_embeddings`, which `dynamic` scaling is reckoned from and so does not contain.
    """
    return int(written * rope.factor) if rope and rope.kind == "dynamic" else written


def positions_of(model: ModelSection, shape: ModelShape) -> int:
    """Positions that the base has as it is trained."""
    if model.rope_scaling is None:
        return shape.max_positions
    return int(model.rope_scaling.factor * (_original(model.rope_scaling, shape) or shape.max_positions))


def reach(rope: RopePlan | None, own: int) -> int:
    """Positions that a model has, stretched or not.

    Args:
        own: of its config.
    """
    if rope is None:
        return own
    return max(rope.max_position_embeddings, int(float(rope.parameters["factor"]) * rope.original_positions))


def resolve_rope(model: ModelSection, shape: ModelShape) -> RopePlan | None:
    """What becomes of the rotary positions of a base; None: they stay.

    Raises:
        UserError: if the base has none, or none that this can be done to, with what to set instead.
    """
    section, name = model.rope_scaling, f"{model.base} ({shape.model_type})"
    if section is None:
        return None
    if shape.rope is None:
        raise UserError(
            f"{KEY} stretches rotary positions, and {name} has none that transformers stretches: its positions are learned, kept "
            f"by distance or states, or computed in its own way. Leave {KEY} out, or train another base.",
            keys=(KEY, "model.base"),
        )
    if shape.rope.kind not in REPLACED:
        raise UserError(
            f"{KEY} would take the place of the scaling that {name} was made with ({shape.rope.kind}), which is no function of "
            f"a factor and a length. Leave {KEY} out; data.max_length may be up to {shape.max_positions} as it is.",
            keys=(KEY,),
        )
    original = _original(section, shape)
    if original is None:
        raise UserError(
            f"{name} is scaled by itself ({shape.rope.kind}, factor {shape.rope.factor:g}), and its config does not say which "
            f"length it had before. Set {KEY}.original_max_position_embeddings to it, or leave {KEY} out.",
            keys=(f"{KEY}.original_max_position_embeddings", KEY),
        )
    limit = int(section.factor * original)
    if original > shape.max_positions or limit < shape.max_positions:
        least = -(-shape.max_positions // original)
        raise UserError(
            f"{KEY}: factor {section.factor:g} x {original} original positions are {limit}, but {name} has {shape.max_positions} "
            f"as it is. "
            + (
                f"Set {KEY}.factor to {least} or more, or leave {KEY} out."
                if original <= shape.max_positions
                else f"Set {KEY}.original_max_position_embeddings to {shape.max_positions} or less."
            ),
            keys=(f"{KEY}.factor", f"{KEY}.original_max_position_embeddings", KEY),
        )
    given = {name: value for name in GIVEN if (value := getattr(section, name)) is not None}
    named = {"original_max_position_embeddings": original} if section.type in WITH_ORIGINAL else {}
    return RopePlan(
        parameters={"rope_type": section.type, **given, **named},
        original_positions=original,
        max_position_embeddings=original if section.type == "dynamic" else limit,
    )


def _original(section: RopeScalingSection, shape: ModelShape) -> int | None:
    """Positions that the base was first trained with; None: not known."""
    if section.original_max_position_embeddings != "auto":
        return section.original_max_position_embeddings
    rope = shape.rope
    if rope is None or rope.kind == PLAIN:
        return shape.max_positions
    return int(shape.max_positions / rope.factor) if rope.kind == "dynamic" else rope.original


def rope_in_words(plan: RopePlan) -> str:
    """For the table of a plan."""
    values = dict(plan.parameters)
    kind, factor = values.pop("rope_type"), values.pop("factor")
    more = "".join(f", {name} {value}" for name, value in values.items() if name != "original_max_position_embeddings")
    return f"rotary positions stretched by {kind}: {factor} x {plan.original_positions}{more}"


def rope_notes(plan: RopePlan | None, model: ModelSection, shape: ModelShape, trained: Trained, row_length: int) -> Iterator[str]:
    """What a reader of the plan may not expect."""
    if plan is None:
        return
    own = shape.rope
    if own is not None and own.kind != PLAIN:
        yield f"{KEY} takes the place of the scaling that {model.base} has by itself ({own.kind}, factor {own.factor:g})."
    if row_length <= plan.original_positions:
        yield (
            f"{KEY} is of no use for documents of at most {row_length} tokens, where {model.base} was made for "
            f"{plan.original_positions} as it is. Raise data.max_length for longer ones."
        )
    if plan.parameters["rope_type"] == "dynamic":
        yield (
            "Dynamic scaling depends on the length of a document: each document of a packed row has the frequencies that it "
            "would have alone in a model that has seen no other. transformers itself takes the longest of a row, and keeps those "
            "of the longest one so far."
        )
    if not trained.is_base:
        values = ", ".join(f"{name!r}: {value!r}" for name, value in plan.parameters.items())
        yield (
            f"Whoever loads the adapter with PEFT gives its base the same positions, in config.rope_parameters, beside its "
            f"rope_theta: {{{values}}}, and max_position_embeddings={plan.max_position_embeddings}; they are in base_rope.json "
            f"beside it. raytune merge does it by itself."
        )
