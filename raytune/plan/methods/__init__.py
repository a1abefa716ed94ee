"""Methods of training: a file for each with its row, and the table. `config/sections/adapter.py` has their sections,
`model/adapters` what PEFT makes of them.

A plan asks a row what is trained (`plan.model.trained`), what cannot be done, and for the words; nobody else asks of which class
a section is. Imports: config, and the plan's shapes and quantisation.
"""

from dataclasses import replace

from raytune.config.sections.adapter import Adapter
from raytune.config.sections.model import Quantization
from raytune.plan.methods import (
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
from raytune.plan.methods.method import Method
from raytune.plan.methods.targets import expert_parameters
from raytune.plan.model.shapes import ModelShape
from raytune.plan.model.trained import Trained

METHODS: dict[str, Method] = {
    "full": full.METHOD,
    "lora": lora.METHOD,
    "ia3": ia3.METHOD,
    "layernorm": layernorm.METHOD,
    "lokr": lokr.METHOD,
    "loha": loha.METHOD,
    "vera": vera.METHOD,
    "oft": oft.METHOD,
    "boft": boft.METHOD,
    "bottleneck": bottleneck.METHOD,
    "adalora": adalora.METHOD,
    "trainable_tokens": trainable_tokens.METHOD,
    "prompt_tuning": prompt_tuning.METHOD,
    "prefix_tuning": prefix_tuning.METHOD,
    "p_tuning": p_tuning.METHOD,
    # The preset, as a config says it; in a plan it is `lora` and `model.quantization`.
    "qlora": replace(lora.METHOD, when="as lora, where the base does not fit otherwise: a quarter of its bytes, slower steps"),
}


def method_of(adapter: Adapter) -> Method:
    """The row of an adapter section."""
    return METHODS[adapter.method]


def expert_notes(adapter: Adapter, shape: ModelShape, trained: Trained, quantization: Quantization | None) -> list[str]:
    """What happens to the fused experts of a model, in sentences; none if it has none."""
    return method_of(adapter).expert_notes(adapter, shape, trained, quantization) if expert_parameters(shape) else []


def trained_by(adapter: Adapter, shape: ModelShape, quantization: Quantization | None = None) -> Trained:
    """What a method trains of a model.

    Args:
        quantization: of the base; None: it is held as it is.

    Raises:
        ModelError: if a name matches nothing, or a pattern is no regular expression.
    """
    return method_of(adapter).trained(adapter, shape, quantization)
