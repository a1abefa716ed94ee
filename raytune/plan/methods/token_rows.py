"""Rows of tokens that are trained in embedding and head, and nothing else of these: what methods share that train them."""

from collections.abc import Iterable
from typing import Any

from raytune.config.sections.run import RunConfig
from raytune.errors import ModelError, UserError
from raytune.plan.model.module_names import is_saved
from raytune.plan.model.shapes import ModelShape, Module
from raytune.plan.model.trained import TrainedPart

TRAINABLE = "adapter.trainable_tokens"


def modules_with_rows(adapter: Any, shape: ModelShape) -> list[Module]:
    """The embedding of tokens, and a head that is not tied to it, unless they are trained whole."""
    around = [shape.embeddings[0]] if shape.is_tied else [shape.embeddings[0], shape.head]
    return [module for module in around if not is_saved(module.name, getattr(adapter, "modules_to_save", []))]


def num_rows(adapter: Any, shape: ModelShape) -> int:
    """Rows that are trained in each of `modules_with_rows`: of new tokens, and of others that are named."""
    named = adapter.trainable_tokens
    if not named:
        return 0
    others = [] if named == "auto" else named
    return shape.new_rows + len({*others} - {*shape.new_tokens})


def row_parts(adapter: Any, shape: ModelShape) -> list[TrainedPart]:
    """What is trained of embedding and head, as parts; none if no row is."""
    rows = num_rows(adapter, shape)
    modules = modules_with_rows(adapter, shape) if rows else []
    return [TrainedPart(name=one.name, kind=one.kind, how="rows", num_parameters=rows * shape.hidden) for one in modules]


def check_rows(adapter: Any, config: RunConfig, shape: ModelShape, updated: Iterable[Module] = ()) -> None:
    """Refuse what PEFT would refuse in the worker, or get wrong.

    Args:
        updated: modules that get another update.

    Raises:
        UserError: (or ModelError) with the setting that works.
    """
    named = adapter.trainable_tokens
    if isinstance(named, list) and (twice := next((token for token in named if named.count(token) > 1), None)):
        raise UserError(f"{TRAINABLE} names {twice!r} twice. Leave one of them out.", keys=(TRAINABLE,))
    parts = {part.name for part in row_parts(adapter, shape)}
    saved = [one.name for one in (shape.embeddings[0], shape.head) if is_saved(one.name, getattr(adapter, "modules_to_save", []))]
    if saved and isinstance(named, list) and named and not parts:
        raise UserError(
            f"{TRAINABLE} names tokens whose rows are trained already: adapter.modules_to_save trains all of {', '.join(saved)}. "
            f"Leave one of the two out.",
            keys=(TRAINABLE, "adapter.modules_to_save"),
        )
    if not parts:
        return
    if shape.is_tied and saved:
        raise UserError(
            f"adapter.modules_to_save trains {saved[0]} as a matrix of its own, which parts it from the one that it is tied to, "
            f"and {TRAINABLE} trains rows of both. Leave one of the two out, or save both embedding and head.",
            keys=("adapter.modules_to_save", TRAINABLE),
        )
    both = next((module.name for module in updated if module.name in parts or module.name == shape.head.name), None)
    if both:
        raise ModelError(
            f"adapter.target_modules takes in {both}, and {TRAINABLE} trains rows of it, which PEFT cannot do both. Leave it out "
            f"of adapter.target_modules, or set {TRAINABLE} to [].",
            keys=("adapter.target_modules", TRAINABLE),
        )
    if shape.head.num_biases:
        raise ModelError(
            f"{TRAINABLE} trains rows of {shape.head.name}, whose biases PEFT leaves out where it does. Set {TRAINABLE} to [], "
            f"and adapter.modules_to_save to [{shape.embeddings[0].name.rpartition('.')[2]}, {shape.head.name}].",
            keys=(TRAINABLE,),
        )
    if config.training.neftune_noise_alpha:
        raise UserError(
            f"training.neftune_noise_alpha adds noise to what the embedding gives, and {TRAINABLE} replaces rows of that. Leave "
            f"one of the two out.",
            keys=("training.neftune_noise_alpha", TRAINABLE),
        )
