"""Trainable tokens on a model: PEFT's configuration of them."""

import warnings

from peft import PeftModel, TrainableTokensConfig
from transformers import PreTrainedModel

from raytune.config.adapter import TrainableTokensAdapter
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


ADAPTING = Adapting(
    add=_add,
    frozen_experts=lambda model, adapter: unchanged_experts(model, NO_TARGETS),
    leaves_base_alone=lambda adapter, is_quantised: False,  # the next one may train rows of other tokens
    peft_type="TRAINABLE_TOKENS",
    merges=True,
    mend=compute_rows_alone,
)
