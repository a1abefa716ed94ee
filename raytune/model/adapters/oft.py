"""OFT on a model: PEFT's configuration of it."""

from peft import OFTConfig, PeftModel
from transformers import PreTrainedModel

from raytune.config.sections.adapter import OftAdapter
from raytune.model.adapters.adapting import Adapting, added
from raytune.model.adapters.targets import peft_names, unchanged_experts


def _add(model: PreTrainedModel, adapter: OftAdapter, revision: str | None, seed: int) -> PeftModel:
    config = OFTConfig(
        task_type="CAUSAL_LM",
        r=0,  # as many blocks as there are
        oft_block_size=adapter.block_size,
        block_share=adapter.block_share,
        module_dropout=adapter.dropout,
        num_cayley_neumann_terms=adapter.num_cayley_neumann_terms,
        revision=revision,
        **peft_names(model, adapter),
    )
    return added(model, config, adapter, seed=seed)


ADAPTING = Adapting(
    add=_add,
    frozen_experts=unchanged_experts,
    leaves_base_alone=lambda adapter, is_quantised: not (adapter.modules_to_save or is_quantised),
    peft_type="OFT",
    merges=True,
)
