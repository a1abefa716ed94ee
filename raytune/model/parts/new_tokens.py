"""Rows of embedding and head for the tokens that a run adds: made, and started from what the base knows.

HuggingFace's resize_token_embeddings draws the new rows from a distribution; here they are exact means, the same on every rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft.utils.integrations import gather_params_ctx
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raytune.data.templates.tokenizers import backend_of, load_tokenizer, token_numbers, vocabulary_of, with_tokens
from raytune.errors import ModelError
from raytune.plan.run_plan import ModelPlan


def add_new_tokens(model: PreTrainedModel, plan: ModelPlan) -> None:
    """Give a base, as its author published it, the rows that the new tokens of a plan need, and start these.

    Raises:
        ModelError: if the base has other rows than the plan counted, or cannot be given more.
    """
    if not plan.new_tokens:
        return
    tokenizer = load_tokenizer(plan.path, plan.revision, plan.trust_remote_code)
    num_old, num_rows = num_embeddings(model), plan.num_embeddings
    assert num_rows is not None, "the plan counted them"
    num_known = min(num_old, vocabulary_of(tokenizer).next_number)
    sources = [_pieces(tokenizer, one.description, num_known) for one in plan.new_tokens]
    with_tokens(tokenizer, plan.new_tokens)
    numbers = token_numbers(tokenizer, [one.token for one in plan.new_tokens])
    if max(numbers) >= num_rows:
        raise ModelError(
            f"The new tokens of this run have numbers up to {max(numbers)} in the tokenizer of {plan.path}, but it was planned "
            f"with {num_rows} rows of embeddings. Put the same tokenizer on every node."
        )
    resize(model, num_rows)
    starts: dict[int, Sequence[int] | None] = dict.fromkeys(range(num_old, num_rows))
    _start_rows(model, starts | dict(zip(numbers, sources, strict=True)), num_known)
    added = dict(zip([one.token for one in plan.new_tokens], numbers, strict=True))
    model.added_tokens = added, sorted({*starts, *numbers})  # pyright: ignore[reportArgumentType]


def added_texts(model: PreTrainedModel) -> dict[str, int]:
    """Tokens that `add_new_tokens` gave a model, with their numbers."""
    return _added(model)[0]


def added_rows(model: PreTrainedModel) -> list[int]:
    """Rows of these tokens, and those that the base's files do not have."""
    return _added(model)[1]


def _added(model: PreTrainedModel) -> tuple[dict[str, int], list[int]]:
    return getattr(model, "added_tokens", ({}, []))


def num_embeddings(model: PreTrainedModel) -> int:
    """Rows of the embedding of tokens, which may be sharded."""
    embedding: Any = model.get_input_embeddings()
    return embedding.num_embeddings


def resize(model: PreTrainedModel, num_rows: int) -> None:
    """Give embedding and head more rows, without starting these.

    Raises:
        ModelError: if transformers cannot do that for this model.
    """
    if num_rows <= num_embeddings(model):
        return
    try:
        model.resize_token_embeddings(num_rows, mean_resizing=False)
    except torch.OutOfMemoryError:  # which is a RuntimeError, and says nothing of the model
        raise
    except (TypeError, NotImplementedError, AttributeError, RuntimeError) as error:
        raise ModelError(
            f"model.new_tokens needs {num_rows} rows of embeddings, and transformers cannot give them to a "
            f"{type(model).__name__}: {error}."
        ) from error
    head: Any = model.get_output_embeddings()
    head.out_features = num_rows


def _pieces(tokenizer: PreTrainedTokenizerBase, description: str | None, num_known: int) -> list[int] | None:
    """Tokens of a description that have rows; None: there is no description."""
    if description is None:
        return None
    return [number for number in backend_of(tokenizer).encode(description, add_special_tokens=False).ids if number < num_known]


@torch.no_grad()
def _start_rows(model: PreTrainedModel, starts: dict[int, Sequence[int] | None], num_known: int) -> None:
    """Set rows to the mean of others, or of all that tokens of the base have.

    Args:
        starts: rows to set -> rows whose mean they get; None: all.
        num_known: rows of tokens that the base's tokenizer has.
    """
    modules: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = {id(weight): weight for module in modules for weight in _by_row(module)}  # a tied head has the embedding's
    for weight in weights.values():
        with gather_params_ctx([weight], modifier_rank=0):
            if weight.numel():  # gathered, where ZeRO-3 had divided it
                of_all = weight[:num_known].mean(0, dtype=torch.float32)
                for row, sources in starts.items():
                    weight[row] = weight[list(sources)].mean(0, dtype=torch.float32) if sources else of_all


def _by_row(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters())
