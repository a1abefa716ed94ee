"""Rows of tokens that are trained in embedding and head, by PEFT's layer for them: which, and without a copy of the matrix.

PEFT 0.21 puts the trained rows into a copy of the whole matrix in each pass, and has a gradient of that size for it; where the
loss is chunked, for each chunk of logits. Here only what the rows give is computed and put in place, which are the same numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn
from transformers import PreTrainedModel

from raytune.data.templates.tokenizers import token_numbers
from raytune.model.parts.new_tokens import added_rows, added_texts
from raytune.plan.model.module_names import is_saved

# Shapes: T tokens, D width, V vocabulary, R trained rows.


def trained_rows(model: PreTrainedModel, adapter: Any) -> dict[str, list[int]]:
    """Rows that a section trains, by the names of the modules that have them; PEFT itself ties those of a tied head.

    Raises:
        ModelError: if a token is none of the vocabulary.
    """
    named = adapter.trainable_tokens
    others = [] if named == "auto" else [token for token in named if token not in added_texts(model)]
    rows = [] if named == [] else [*added_rows(model)]
    if others:
        rows += token_numbers(model.base_tokenizer(), others)  # pyright: ignore[reportCallIssue]  of load_base
    if not rows:
        return {}
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    modules = [embedding] if head.weight is embedding.weight else [embedding, head]
    names = [next(name for name, module in model.named_modules() if module is one) for one in modules]
    return {name: sorted(rows) for name in names if not is_saved(name, getattr(adapter, "modules_to_save", []))}


class RowsAlone(TrainableTokensLayer):
    """PEFT's layer, which computes what its rows give beside what the frozen matrix does."""

    def forward_adapters(self, x: Tensor, active_adapters: Any, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or not active_adapters or self.merged:
            return super().forward_adapters(x, active_adapters, *args, **kwargs)
        given = self.base_layer(x)
        for name in active_adapters:
            rows_RD = self.trainable_tokens_delta[name]
            numbers_R = getattr(self, f"numbers_of_{name}")
            given = (
                self._with_ids(x, given, numbers_R, rows_RD)
                if _is_embedding(self.base_layer)
                else _with_logits(x, given, numbers_R, rows_RD)
            )
        return given

    def _with_ids(self, ids_T: Tensor, given_TD: Tensor, numbers_R: Tensor, rows_RD: Tensor) -> Tensor:
        scale = self._get_embed_scale()
        is_row_TR = ids_T[..., None] == numbers_R
        place_T = is_row_TR.int().argmax(-1)
        own_TD = F.embedding(place_T, rows_RD.to(given_TD.dtype))
        own_TD = own_TD if scale is None else own_TD * scale.to(own_TD.dtype)
        return torch.where(is_row_TR.any(-1)[..., None], own_TD, given_TD)


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding)


def _with_logits(hidden_TD: Tensor, logits_TV: Tensor, numbers_R: Tensor, rows_RD: Tensor) -> Tensor:
    own_TR = F.linear(hidden_TD, rows_RD.to(hidden_TD.dtype))
    return logits_TV.index_copy(-1, numbers_R, own_TR.to(logits_TV.dtype))


def compute_rows_alone(model: nn.Module) -> None:
    """Have the layers that PEFT made for rows of tokens compute these alone."""
    for module in model.modules():
        if type(module) is TrainableTokensLayer:
            module.__class__ = RowsAlone
            for name, rows_RD in module.trainable_tokens_delta.items():
                # On the device for good: a list that becomes a tensor in each pass is a copy that waits for the device.
                numbers_R = torch.as_tensor(module.token_indices[name], device=rows_RD.device)
                module.register_buffer(f"numbers_of_{name}", numbers_R, persistent=False)


@contextmanager
def rows_of_shards() -> Iterator[None]:
    """Context in which PEFT takes rows out of a matrix that ZeRO-3 divided, on any device.

    In the words of PEFT 0.21, which asks for a GPU.
    """

    def collect(self: Any, weight: Any, rows: Any, embed_dim: int) -> Tensor:
        with gather_params_ctx([weight], modifier_rank=None):
            return weight[rows].detach().clone()

    theirs = TrainableTokensLayer._collect_token_weights
    TrainableTokensLayer._collect_token_weights = collect
    try:
        yield
    finally:
        TrainableTokensLayer._collect_token_weights = theirs
