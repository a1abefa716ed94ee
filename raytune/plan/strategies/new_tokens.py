"""`model.new_tokens` in a plan: the rows that embedding and head get for them, and whether these are trained."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raytune.config.sections.adapter import Adapter
from raytune.config.sections.model import ModelSection
from raytune.config.sections.strategy import StrategySection
from raytune.errors import ModelError, UserError
from raytune.hub.cache import default_hub_cache
from raytune.plan.model.base_model import find_config
from raytune.plan.model.references import planned_shape
from raytune.plan.model.shapes import ModelShape
from raytune.plan.model.trained import Trained

NEW_TOKENS = "model.new_tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What a tokenizer says of tokens that are to be added to it."""

    known: Mapping[str, int]
    """Of all tokens that it has, their numbers by their texts."""
    next_number: int
    """That the first token added to it gets; the next ones follow."""


def next_number(num_of_model: int, added: Mapping[int, Any]) -> int:
    """The number that the `tokenizers` library gives the first token that is added.

    Args:
        num_of_model: tokens of the tokenizer's own model.
        added: tokens beside these, by their numbers.
    """
    return max(num_of_model, max(added, default=-1) + 1)


def stored_vocabulary(model: ModelSection) -> Vocabulary | None:
    """What `tokenizer.json` of a base says; None: it is not here, or in another form."""
    try:
        file = find_config(model.base, model.revision, default_hub_cache()).parent / "tokenizer.json"
        return _read(file) if file.is_file() else None
    except (ModelError, OSError, ValueError, KeyError, TypeError):
        return None  # whoever opens the tokenizer says what is wrong with it


def _read(file: Path) -> Vocabulary:
    stored = json.loads(file.read_text(encoding="utf-8"))
    own = stored["model"]["vocab"]
    texts = own if isinstance(own, dict) else {piece[0]: number for number, piece in enumerate(own)}
    added = {token["id"]: token["content"] for token in stored.get("added_tokens", [])}
    known = texts | {text: number for number, text in added.items()}
    return Vocabulary(known=known, next_number=next_number(len(texts), added))


def planned_base(model: ModelSection) -> ModelShape:
    """The shape of a base for a plan that loads nothing, with rows for new tokens.

    Raises:
        ModelError: as `planned_shape` and `with_new_tokens` do.
    """
    shape = planned_shape(model.base, model.revision, trust_remote_code=model.trust_remote_code)
    return with_new_tokens(shape, model, stored_vocabulary(model)) if model.new_tokens else shape


def with_new_tokens(shape: ModelShape, model: ModelSection, vocabulary: Vocabulary | None) -> ModelShape:
    """The shape of a base with rows for the tokens that are added.

    Args:
        vocabulary: of the base's tokenizer; None: it is taken to have as many tokens as the base has rows.

    Raises:
        ModelError: if the base has a token already.
    """
    tokens = [one.token for one in model.new_tokens]
    if not tokens:
        return shape
    vocabulary = vocabulary or Vocabulary(known={}, next_number=shape.vocab)
    numbers, following = [], vocabulary.next_number
    for position, token in enumerate(tokens):
        number = vocabulary.known.get(token)
        if number is not None and number < shape.vocab:
            raise ModelError(
                f"{NEW_TOKENS} names {token!r}, which is a token of {model.base} already, number {number}, with a row of its "
                f"own. Leave it out; adapter.trainable_tokens trains the rows of tokens that are there.",
                keys=(f"{NEW_TOKENS}.{position}", NEW_TOKENS),
            )
        if number is None:  # else the tokenizer was given it, and the model was not
            number, following = following, following + 1
        numbers.append(number)
    needed = max(numbers) + 1
    rows = shape.vocab if needed <= shape.vocab else -(-needed // model.vocabulary_multiple) * model.vocabulary_multiple
    num_inside = sum(number < shape.vocab for number in numbers)
    embedding, *others = shape.embeddings
    head = replace(shape.head, outputs=rows, num_biases=rows if shape.head.num_biases else 0)
    return replace(
        shape,
        vocab=rows,
        new_tokens=tuple(tokens),
        added_rows=rows - shape.vocab,
        new_rows=rows - shape.vocab + num_inside,
        embeddings=(replace(embedding, inputs=rows), *others),
        head=head,
    )


def check_rows_are_trained(trained: Trained, shape: ModelShape, adapter: Adapter, strategy: StrategySection) -> None:
    """Refuse new tokens whose rows nothing trains: they would stay what all tokens are on average.

    Args:
        trained: by the end of the run.

    Raises:
        UserError: with what trains them.
    """
    if not shape.new_tokens:
        return
    embedding, head = shape.embeddings[0].name, shape.head.name
    covered = {part.name for part in trained.parts if part.how in ("whole", "rows")}
    in_rows = {part.name for part in trained.parts if part.how == "rows"}
    # A tied head that is trained as a module of its own is another matrix then.
    if shape.is_tied and embedding in (covered if trained.is_base else in_rows):
        covered.add(head)
    lacking = [name for name in (embedding, head) if name not in covered]
    if lacking:
        raise UserError(
            f"{NEW_TOKENS} adds {_listed(shape.new_tokens)}, but nothing trains the new rows of {' and '.join(lacking)}, which "
            f"would stay as they start. {_way_out(trained, shape, adapter, strategy)}.",
            keys=(NEW_TOKENS,),
        )


def _way_out(trained: Trained, shape: ModelShape, adapter: Adapter, strategy: StrategySection) -> str:
    """What trains rows that nothing trains, of what the method and the strategy leave."""
    if trained.is_base:
        ways = ["leave them out of strategy.freeze"] if strategy.freeze.embeddings or strategy.freeze.modules else []
        ways += ["name `embeddings` and `head` in strategy.freeze.train_only"] if strategy.freeze.train_only else []
        ends_early = strategy.unfreeze and strategy.unfreeze[-1].last_layers != "all"
        ways += ["add a phase of last_layers: all to strategy.unfreeze"] if ends_early else []
        return f"To train them, {' and '.join(ways)}"
    names = ", ".join(module.name.rpartition(".")[2] for module in (shape.embeddings[0], shape.head))
    whole = f"Set adapter.modules_to_save to [{names}]" if hasattr(adapter, "modules_to_save") else ""
    alone = "set adapter.method to lora or trainable_tokens, whose adapter.trainable_tokens trains the new rows alone"
    rows: Any = getattr(adapter, "trainable_tokens", None)
    if rows is not None:
        key = "modules_to_save" if rows else "trainable_tokens"
        alone = f"leave out adapter.{key}, and the new rows are trained alone"
    return f"{whole}; or {alone}" if whole else f"{alone[0].upper()}{alone[1:]}"


def new_token_notes(shape: ModelShape, trained: Trained, model: ModelSection) -> Iterator[str]:
    """What becomes of new tokens, in sentences."""
    if not shape.new_tokens:
        return
    described = sum(one.description is not None for one in model.new_tokens)
    start = "the mean of all rows" if not described else "the mean of the rows of their descriptions"
    start += " or, without one, of all rows" if 0 < described < len(model.new_tokens) else ""
    verb, whose = ("is", "Its row starts") if len(shape.new_tokens) == 1 else ("are", "Their rows start")
    room = f"{shape.vocab} rows, {shape.added_rows} of them added" if shape.added_rows else f"{shape.vocab} rows, as in the base"
    yield f"{_listed(shape.new_tokens)} {verb} new to the model, whose embedding has {room}. {whose} as {start}."
    if shape.added_rows and not trained.is_base:
        yield (
            f"Whoever loads the adapter with PEFT gives its base these rows first: model.resize_token_embeddings({shape.vocab}); "
            f"raytune merge does it by itself."
        )


def _listed(tokens: tuple[str, ...]) -> str:
    more = f" and {len(tokens) - 3} more" if len(tokens) > 3 else ""
    return ", ".join(map(repr, tokens[:3])) + more
