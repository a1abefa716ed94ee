"""Rows that pass through a model together, token by token, as its `generate` has them pass.

Shapes: B rows, C columns, T new tokens of each row, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from raytune.evaluation.answer_text import AnswerText
from raytune.serving.choosing import Choice
from raytune.serving.requests import Deliver, Request, Token
from raytune.serving.rows_cache import RowsCache


@dataclass(eq=False, slots=True, kw_only=True)
class Row:
    """A request, and how far its answer is."""

    request: Request
    deliver: Deliver
    ids: list[int]
    """Of the prompt, and what was generated."""
    text: AnswerText
    choice: Choice | None = None
    """None before it has joined others."""
    untold: list[Token] = field(default_factory=list)
    """Whose text is held back."""
    is_cancelled: bool = False

    @property
    def num_generated(self) -> int:
        return len(self.ids) - len(self.request.prompt)

    @property
    def longest(self) -> int:
        """Tokens that it has at the end, at most."""
        return len(self.request.prompt) + self.request.max_new_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A model, switched to what is asked."""

    forward: Any
    """Of transformers."""
    prepare: Any
    """Its `prepare_inputs_for_generation`, or PEFT's, which lays prompts in front."""
    accepts: frozenset[str]
    """Names of what its forward pass takes."""


class Batch(Protocol):
    rows: list[Row]

    def advance(self, asked: Asked, most_prefilled: int) -> Tensor | None:
        """Pass on by a token, or by some of the prompts.

        Returns:
            Logits [B, V] in fp32 of the next token of each row; None if the prompts are not at their ends.
        """
        ...

    def keep(self, rows: Sequence[Row]) -> None:
        """Go on with these of the rows."""
        ...


class PaddedBatch:
    """Rows padded on the left, with their keys and values side by side."""

    def __init__(self, rows: Sequence[Row], windows: Sequence[int | None]) -> None:
        self.rows = list(rows)
        self.cache = RowsCache(windows)

    @property
    def is_read(self) -> bool:
        """Whether the prompts have passed, and tokens are awaited one by one."""
        return self.cache.width >= max(len(row.ids) for row in self.rows) - 1 and self.cache.width > 0

    def advance(self, asked: Asked, most_prefilled: int) -> Tensor | None:
        done, longest = self.cache.width, max(len(row.ids) for row in self.rows)
        columns = min(longest - done, max(1, most_prefilled // len(self.rows)))
        device = asked.forward.device
        ids_BT = torch.zeros(len(self.rows), columns, dtype=torch.long)
        for place, row in enumerate(self.rows):
            first = done - (longest - len(row.ids))  # of its own tokens, with columns in front of these if negative
            own = row.ids[max(first, 0) : max(first + columns, 0)]
            if own:
                ids_BT[place, -len(own) :] = torch.tensor(own)
        begins_B1 = torch.tensor([[longest - len(row.ids)] for row in self.rows], device=device)
        places_C = torch.arange(done + columns, device=device)
        inputs: dict[str, Any] = {"past_key_values": self.cache, "use_cache": True} | _last_logits(asked)
        if any(len(row.ids) < longest for row in self.rows):
            inputs["attention_mask"] = (places_C >= begins_B1).long()
        if "position_ids" in asked.accepts:
            inputs["position_ids"] = (places_C[done:] - begins_B1).clamp(min=0)
        inputs = asked.prepare(ids_BT.to(device), is_first_iteration=done == 0, **inputs)
        logits_BV = asked.forward(**inputs, return_dict=True).logits[:, -1]
        return logits_BV.float() if done + columns == longest else None

    def take_in(self, other: "PaddedBatch") -> None:
        """Append the rows of another batch, all of which are read as far as these."""
        self.cache.take_in(other.cache)
        self.rows += other.rows

    def keep(self, rows: Sequence[Row]) -> None:
        wanted = {id(row) for row in rows}
        stay = [place for place, row in enumerate(self.rows) if id(row) in wanted]
        order, behind = list(range(len(stay))), [place for place in stay if place >= len(stay)]
        for hole in sorted({*order} - {*stay}):
            order[hole] = behind.pop()
        self.rows = [self.rows[place] for place in order]
        if self.rows and self.cache.width:
            self.cache.keep(order, min(self.cache.width, max(len(row.ids) for row in self.rows) - 1))


class LoneRow:
    """A row with a cache that is the model's own affair: states, virtual tokens, positions that depend on the longest."""

    def __init__(self, row: Row) -> None:
        self.rows = [row]
        self._inputs: dict[str, Any] = {}

    def advance(self, asked: Asked, most_prefilled: int) -> Tensor | None:
        model, device = asked.forward, asked.forward.device
        ids_1C = torch.tensor([self.rows[0].ids], device=device)
        is_first = not self._inputs
        if is_first:
            self._inputs = self._begun(asked)
        inputs = asked.prepare(ids_1C, next_sequence_length=None if is_first else 1, is_first_iteration=is_first, **self._inputs)
        outputs = model(**inputs, return_dict=True)
        # That call of `generate` of transformers 5.23 which knows where a model gives back its cache.
        self._inputs = model._update_model_kwargs_for_generation(outputs, self._inputs)
        return outputs.logits[:, -1].float()

    def keep(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)

    def _begun(self, asked: Asked) -> dict[str, Any]:
        model = asked.forward
        found: dict[str, Any] = {"use_cache": True} | _last_logits(asked)
        if "position_ids" in asked.accepts:
            found["position_ids"] = torch.arange(len(self.rows[0].ids), device=model.device)[None]
        if model._supports_default_dynamic_cache():
            name = "cache_params" if "mamba" in type(model).__name__.lower() else "past_key_values"
            found[name] = DynamicCache(config=model.config.get_text_config(decoder=True))
        return found


def _last_logits(asked: Asked) -> dict[str, Any]:
    return {"logits_to_keep": 1} if "logits_to_keep" in asked.accepts else {}
