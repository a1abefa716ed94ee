"""Tuning of norms on a model: PEFT's configuration of it, by names that it reads as meant."""

from peft import LNTuningConfig, PeftModel
from transformers import PreTrainedModel

from raytune.config.sections.adapter import LayerNormAdapter
from raytune.model.adapters.adapting import Adapting, added, whole_targets
from raytune.model.adapters.targets import check_matches, check_named, shortest_suffixes, unchanged_experts
from raytune.model.attention.attention import keeps_state
from raytune.model.parts.kernels import bypassed_norms
from raytune.model.parts.norms import is_norm
from raytune.plan.methods.layernorm import is_tuned


def _add(model: PreTrainedModel, adapter: LayerNormAdapter, revision: str | None, seed: int) -> PeftModel:
    check_named(model, adapter)
    left_out = {*bypassed_norms(model)} if keeps_state(type(model), model.config) else set()
    norms = [name for name, module in model.named_modules() if is_norm(module) and name not in left_out]
    tuned = [name for name in norms if is_tuned(name, adapter)]
    check_matches("adapter.target_modules", str(adapter.target_modules), tuned, norms)
    config = LNTuningConfig(
        task_type="CAUSAL_LM",
        target_modules=shortest_suffixes(tuned, [name for name, _ in model.named_modules()]),
        modules_to_save=adapter.modules_to_save or None,
        revision=revision,
    )
    with whole_targets("LN_TUNING"):
        return added(model, config, adapter, seed=seed)


ADAPTING = Adapting(
    add=_add,
    frozen_experts=unchanged_experts,
    leaves_base_alone=lambda adapter, is_quantised: not adapter.modules_to_save,
    peft_type="LN_TUNING",
    merges=True,
    needs_whole_targets=lambda adapter: True,
)
