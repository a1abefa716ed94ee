"""Methods of training on a model: a file for each with its row, and the table. `plan/methods` has what is planned of them.

A row says what PEFT makes of a section, how that starts, and how it is saved. Imports: peft, and what of `raytune.plan` is pure.
"""

from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from raytune.config.sections.adapter import Adapter
from raytune.model.adapters import (
    adalora,
    boft,
    bottleneck,
    full,
    ia3,
    layernorm,
    loha,
    lokr,
    lora,
    oft,
    p_tuning,
    prefix_tuning,
    prompt_tuning,
    trainable_tokens,
    vera,
)
from raytune.model.adapters.adapting import Adapting

ADAPTERS: dict[str, Adapting] = {
    "full": full.ADAPTING,
    "lora": lora.ADAPTING,
    "ia3": ia3.ADAPTING,
    "layernorm": layernorm.ADAPTING,
    "lokr": lokr.ADAPTING,
    "loha": loha.ADAPTING,
    "vera": vera.ADAPTING,
    "oft": oft.ADAPTING,
    "boft": boft.ADAPTING,
    "bottleneck": bottleneck.ADAPTING,
    "adalora": adalora.ADAPTING,
    "trainable_tokens": trainable_tokens.ADAPTING,
    "prompt_tuning": prompt_tuning.ADAPTING,
    "prefix_tuning": prefix_tuning.ADAPTING,
    "p_tuning": p_tuning.ADAPTING,
}


def adapting(adapter: Adapter) -> Adapting:
    """The row of an adapter section."""
    return ADAPTERS[adapter.method]


def adapting_with(config: PeftConfig) -> Adapting | None:
    """The row of the method that made an adapter of PEFT's; None: it is none of ours."""
    return next((row for row in ADAPTERS.values() if row.peft_type == config.peft_type), None)


def add_adapter(model: PreTrainedModel, adapter: Adapter, *, revision: str | None, seed: int) -> PreTrainedModel | PeftModel:
    """Freeze a model but for what an adapter trains of it, and add what it adds.

    Args:
        revision: of the base on a hub, which PEFT writes beside the adapter.
        seed: of the start; the same as plain PEFT's after `torch.manual_seed(seed)`.

    Raises:
        ModelError: if a name matches nothing, or the start does not suit the base.
    """
    return adapting(adapter).add(model, adapter, revision, seed)
