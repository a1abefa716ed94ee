"""Trainable tokens on a model: PEFT's configuration of them."""

import warnings
from typing import Any

from peft import PeftModel, TrainableTokensConfig
from torch import Tensor
from transformers import PreTrainedModel

from raytune.config.sections.adapter import TrainableTokensAdapter
from raytune.model.adapters.adapting import Adapting, added
from raytune.model.adapters.targets import check_matches, unchanged_experts
from raytune.model.adapters.token_rows import compute_rows_alone, trained_rows
from raytune.plan.methods.targets import NO_TARGETS


def _add(model: PreTrainedModel, adapter: TrainableTokensAdapter, revision: str | None, seed: int) -> PeftModel:
    rows = trained_rows(model, adapter)
    check_matches("adapter.trainable_tokens", str(adapter.trainable_tokens), [*rows], [])
    config = TrainableTokensConfig(
        task_type="CAUSAL_LM",
        token_indices=next(iter(rows.values())),
        target_modules=[*rows],
        revision=revision,
    )
    with warnings.catch_warnings():
        # PEFT 0.21 says of whole modules that it does not tie them, and of rows of tokens, which it does.
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter")
        adapted = added(model, config, NO_TARGETS, seed=seed)
    compute_rows_alone(adapted)
    return adapted


def _with_tied(model: PeftModel, state: dict[str, Tensor], config: Any) -> tuple[dict[str, Tensor], Any]:
    """What is trained under each of its names: PEFT asks a file for a tied head's rows, which are the embedding's."""
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), name)
        if first in state and name not in state:
            state = state | {name: state[first]}
    return state, config


ADAPTING = Adapting(
    add=_add,
    frozen_experts=lambda model, adapter: unchanged_experts(model, NO_TARGETS),
    leaves_base_alone=lambda adapter, is_quantised: False,  # the next one may train rows of other tokens
    peft_type="TRAINABLE_TOKENS",
    merges=True,
    mend=compute_rows_alone,
    for_original_base=_with_tied,
)
