"""Prompt tuning on a model: PEFT's configuration of it, and its start from a text."""

import math
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel, PromptTuningConfig
from peft.utils.integrations import gather_params_ctx
from torch import Tensor
from transformers import PreTrainedModel

from raytune.config.sections.adapter import PromptTuningAdapter
from raytune.data.batches.in_front import with_tokens_in_front
from raytune.errors import ModelError
from raytune.model.adapters.adapting import Adapting
from raytune.model.adapters.in_front import ENCODER, NAME, added_in_front, loaded_in_front, sees_tokens, taken_off
from raytune.model.parts.experts import expert_parameters

STARTS = {"vocabulary": "SAMPLE_VOCAB", "random": "RANDOM"}


def _add(model: PreTrainedModel, adapter: PromptTuningAdapter, revision: str | None, seed: int) -> PeftModel:
    config = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=adapter.num_virtual_tokens,
        prompt_tuning_init="RANDOM" if adapter.prompt_init_text else STARTS[adapter.prompt_init],
        revision=revision,
    )
    adapted = added_in_front(model, config, seed=seed)
    sees_tokens(adapted)
    return adapted


def _start_from_text(model: PeftModel, adapter: PromptTuningAdapter, tokens_of: Callable[[str], list[int]]) -> None:
    """As PEFT does it with `prompt_tuning_init="TEXT"`, but by the run's tokenizer, wherever that lies."""
    if adapter.prompt_init_text is None:
        return
    tokens = tokens_of(adapter.prompt_init_text)
    if not tokens:
        raise ModelError(
            f"adapter.prompt_init_text {adapter.prompt_init_text!r} has no token, so that nothing can start from it."
        )
    repeated = (tokens * math.ceil(adapter.num_virtual_tokens / len(tokens)))[: adapter.num_virtual_tokens]
    base: Any = model.get_base_model()
    embeddings, encoder = base.get_input_embeddings(), model.prompt_encoder[NAME]
    with torch.no_grad(), gather_params_ctx(embeddings.parameters()):
        start = embeddings(torch.tensor(repeated, device=embeddings.weight.device)).detach().clone()
    weight: Any = encoder.embedding.weight  # pyright: ignore[reportAttributeAccessIssue]
    weight.data = start.to(weight.dtype)
    config: Any = model.active_peft_config
    config.prompt_tuning_init, config.prompt_tuning_init_text = "TEXT", adapter.prompt_init_text
    config.tokenizer_name_or_path = base.name_or_path


def _saved(model: PeftModel, state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    return {"prompt_embeddings": state[f"{ENCODER}embedding.weight"]}


ADAPTING = Adapting(
    add=_add,
    frozen_experts=lambda model, adapter: [*expert_parameters(model)],
    leaves_base_alone=lambda adapter, is_quantised: True,
    peft_type="PROMPT_TUNING",
    mend=sees_tokens,
    saved_tensors=_saved,
    load=loaded_in_front,
    taken_off=taken_off,
    can_pad=False,
    in_front=lambda adapter, batch: with_tokens_in_front(batch, adapter.num_virtual_tokens),
    start_from_text=_start_from_text,
)
