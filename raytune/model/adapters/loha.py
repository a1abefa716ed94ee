"""LoHa on a model: PEFT's configuration of it."""

from peft import LoHaConfig, PeftModel
from transformers import PreTrainedModel

from raytune.config.sections.adapter import LohaAdapter
from raytune.model.adapters.adapting import Adapting, added, whole_targets
from raytune.model.adapters.targets import peft_names, unchanged_experts


def _add(model: PreTrainedModel, adapter: LohaAdapter, revision: str | None, seed: int) -> PeftModel:
    config = LoHaConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        alpha=adapter.alpha,  # pyright: ignore[reportArgumentType]  PEFT divides it only
        rank_dropout=adapter.rank_dropout,
        revision=revision,
        **peft_names(model, adapter),
    )
    with whole_targets("LOHA"):
        return added(model, config, adapter, seed=seed)


ADAPTING = Adapting(
    add=_add,
    frozen_experts=unchanged_experts,
    leaves_base_alone=lambda adapter, is_quantised: not adapter.modules_to_save,
    peft_type="LOHA",
    merges=True,
    needs_whole_targets=lambda adapter: True,
)
