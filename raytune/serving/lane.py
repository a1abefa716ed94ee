"""The rows of one model: how they join, pass and leave."""

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from raytune.evaluation.answer_text import AnswerText
from raytune.model.inference import Loaded
from raytune.plan.saved.asked_model import AskedModel
from raytune.plan.saved.serving import SPARE_COLUMNS
from raytune.serving.batches import Asked, Batch, LoneRow, PaddedBatch, Row
from raytune.serving.choosing import Choice, Settings, chosen_tokens, told_token
from raytune.serving.refusals import UnfitError
from raytune.serving.requests import Deliver, Finish, Piece, Request
from raytune.serving.rows_cache import windows_of

_LONGEST_DECIDES = ("dynamic", "longrope")
"""Kinds of rotary embedding whose angles depend on the longest row of a batch."""
_AS_KEYS = ("PREFIX_TUNING", "CARTRIDGE")
"""Kinds of adapter in front of prompts that are keys and values, not embeddings."""
_CLOSE = 2
"""How many times longer a prompt may be than another that is read beside it."""


class Lane:
    """One model of an engine with its rows, which have caches of their own.

    Args:
        loaded: facts are taken of it; it is not kept.

    Raises:
        UnfitError: if its answers cannot be written side by side.
    """

    def __init__(self, name: str, one: AskedModel, loaded: Loaded) -> None:
        model = _of_transformers(loaded.model)
        text: Any = model.config.get_text_config(decoder=True)
        if any(hasattr(module, "_setup_cache") for module in model.modules()):
            raise UnfitError(
                f"{type(model).__name__} keeps the states of an answer in its layers, so that it can write one at a time, and is "
                f"not served. `raytune generate` asks it."
            )
        self.name, self.one = name, one
        self.tokenizer: PreTrainedTokenizerBase = loaded.tokenizer
        self.settings = Settings(model, loaded.tokenizer)
        self.vocab: int = getattr(model.get_input_embeddings(), "num_embeddings", text.vocab_size)
        adapter = None if loaded.model is model else loaded.model.active_peft_config
        virtual = getattr(adapter, "num_virtual_tokens", None) or 0
        positions = getattr(text, "max_position_embeddings", None)
        self.longest: int | None = None if positions is None else positions - virtual
        """Tokens of a prompt and its answer; None: the model names no end."""
        self.virtual = virtual
        """Tokens that an adapter lays in front of a prompt."""
        in_front = adapter is not None and adapter.is_prompt_learning and adapter.peft_type not in _AS_KEYS
        # Behind prompts that are embeddings PEFT 0.21 lets the model count positions, and warns of those that it is given.
        self._accepts = frozenset({*inspect.signature(model.forward).parameters} - ({"position_ids"} if in_front else set()))
        self._left_out = _left_out(loaded)
        self._windows = windows_of(text) if loaded.can_pad and _rows_share_batch(model) else None
        self.batches: list[Batch] = []

    @property
    def rows(self) -> list[Row]:
        return [row for batch in self.batches for row in batch.rows]

    def row(self, request: Request, deliver: Deliver) -> Row:
        """A row that waits."""
        text = AnswerText(self.tokenizer, self._left_out, request.stop)
        return Row(request=request, deliver=deliver, ids=list(request.prompt), text=text)

    def reserved(self, joining: Sequence[Row] = ()) -> int:
        """Places for keys and values that its rows take at most, with others that join."""
        rows = [*self.rows, *joining]
        spaces = [row.longest + self.virtual + SPARE_COLUMNS for row in rows]
        return max(spaces, default=0) * len(rows) if self._windows else sum(spaces)

    def reads_together(self, rows: Sequence[Row], most_prefilled: int) -> bool:
        """Whether prompts are read in one batch, of which little is padding, in a step."""
        lengths = [len(row.ids) for row in rows]
        together = max(lengths) * len(rows) <= most_prefilled and max(lengths) <= _CLOSE * min(lengths)
        return self._windows is not None and together

    def join(self, rows: Sequence[Row]) -> None:
        self.batches += [PaddedBatch(rows, self._windows)] if self._windows else [LoneRow(row) for row in rows]

    @property
    def num_joining(self) -> int:
        """Batches whose prompts are being read."""
        return sum(isinstance(batch, PaddedBatch) and not batch.is_read for batch in self.batches)

    def switched(self, loaded: Loaded) -> Asked:
        model = _of_transformers(loaded.model)
        in_front = loaded.model is not model and loaded.model.active_peft_config.is_prompt_learning
        prepare = loaded.model.prepare_inputs_for_generation if in_front else model.prepare_inputs_for_generation
        return Asked(forward=model, prepare=prepare, accepts=self._accepts)

    def chosen(self, batch: Batch, asked: Asked, logits_BV: Tensor) -> list[int | None]:
        """The next token of each row; None: the model gave no numbers."""
        chooses = []
        for row in batch.rows:
            row.choice = row.choice or Choice(row.request, self.settings, asked.forward)
            chooses.append(None if row.choice.is_likeliest else partial(row.choice.of, row.ids, row.num_generated))
        return chosen_tokens(logits_BV, chooses)

    def told(self, row: Row, token: int, logits_V: Tensor) -> Piece | None:
        """What is new of an answer once a token is chosen; None: nothing that can be told yet."""
        row.ids.append(token)
        finish: Finish | None = None
        if token in self.settings.stops:
            text, finish = row.text.end(), "stop"
        else:
            text = row.text.add(token)
            if row.request.num_logprobs is not None and not row.text.is_stopped:
                row.untold.append(told_token(self.tokenizer, token, logits_V, row.request.num_logprobs))
            if row.text.is_stopped:
                finish = "stop"
            elif self.settings.ends(row.ids):
                text, finish = text + row.text.end(), "stop"
            elif row.num_generated >= row.request.max_new_tokens:
                text += row.text.end()
                finish = "stop" if row.text.is_stopped else "length"
        if not text and finish is None:
            return None
        tokens, row.untold = tuple(row.untold), []
        return Piece(text=text, num_tokens=row.num_generated, tokens=tokens, finish=finish)

    def leave(self, gone: set[int]) -> None:
        """Let rows go, by their `id()`s."""
        for batch in self.batches:
            if any(id(row) in gone for row in batch.rows):
                batch.keep([row for row in batch.rows if id(row) not in gone])
        self.batches = [batch for batch in self.batches if batch.rows]

    def put_together(self) -> None:
        """Make one batch of those that have been read."""
        read = [batch for batch in self.batches if isinstance(batch, PaddedBatch) and batch.is_read]
        for other in read[1:]:
            read[0].take_in(other)
            self.batches.remove(other)

    def drop(self, batch: Batch) -> None:
        """Let a batch go with all of its rows, and what it held."""
        self.batches.remove(batch)


def _of_transformers(model: Any) -> Any:
    """The model of transformers in one that PEFT may have wrapped, whose layers have the adapter in them."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _rows_share_batch(model: Any) -> bool:
    parameters = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    # Of one kind of layer, or of several by their names.
    kinds = [parameters, *(one for one in parameters.values() if isinstance(one, dict))]
    return model._supports_default_dynamic_cache() and not any(one.get("rope_type") in _LONGEST_DECIDES for one in kinds)


def _left_out(loaded: Loaded) -> frozenset[int]:
    """Special tokens, which are no part of an answer's text but for those that are kept."""
    tokenizer: Any = loaded.tokenizer
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset({*tokenizer.all_special_ids, *added} - {*tokenizer.convert_tokens_to_ids([*loaded.kept_tokens])})
