"""LoKr on a model: PEFT's configuration of it."""

from peft import LoKrConfig, PeftModel
from transformers import PreTrainedModel

from raytune.config.sections.adapter import LokrAdapter
from raytune.model.adapters.adapting import Adapting, added
from raytune.model.adapters.targets import peft_names, unchanged_experts


def _add(model: PreTrainedModel, adapter: LokrAdapter, revision: str | None, seed: int) -> PeftModel:
    config = LoKrConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        alpha=adapter.alpha,  # pyright: ignore[reportArgumentType]  PEFT divides it only
        rank_dropout=adapter.rank_dropout,
        decompose_both=adapter.decompose_both,
        decompose_factor=-1 if adapter.decompose_factor == "auto" else adapter.decompose_factor,
        revision=revision,
        **peft_names(model, adapter),
    )
    return added(model, config, adapter, seed=seed)


ADAPTING = Adapting(
    add=_add,
    frozen_experts=unchanged_experts,
    leaves_base_alone=lambda adapter, is_quantised: not adapter.modules_to_save,
    peft_type="LOKR",
    merges=True,
)
