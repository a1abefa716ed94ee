"""The methods of PEFT that tests train, each as a section of ours and as the configuration that a user of plain PEFT writes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft import IA3Config, LNTuningConfig, PeftConfig

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, kw_only=True)
class PeftMethod:
    section: dict[str, Any]
    config: Callable[[], PeftConfig]
    """Plain PEFT's, for the tiny Llama."""
    rate: float
    """At which six steps teach something."""
    same_weights: float = 2e-6
    """How far weights may be from those of another division; sums of the same numbers in another order."""
    excluded: str = "k_proj"
    """A module that it would take in."""
    variants: tuple[dict[str, Any], ...] = ({}, {"target_modules": "all-linear"}, {"target_modules": "attention"})
    """Changes of the section; all of them suit every family."""
    takes_nf4: bool = True
    merges: bool = True


METHODS: dict[str, PeftMethod] = {
    "ia3": PeftMethod(
        section={"method": "ia3"},
        config=lambda: IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        ),
        rate=2e-2,
        merges=False,
    ),
    "layernorm": PeftMethod(
        section={"method": "layernorm"},
        config=lambda: LNTuningConfig(
            target_modules=["input_layernorm", "post_attention_layernorm", "model.norm"], task_type="CAUSAL_LM"
        ),
        rate=2e-2,
        excluded="input_layernorm",
        variants=({}, {"target_modules": r".*\.1\..*(norm|ln_.)"}),
    ),
}
