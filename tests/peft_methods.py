"""The methods of PEFT that tests train, each as a section of ours and as the configuration that a user of plain PEFT writes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft import (
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    OFTConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
)

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
    takes_conv1d: bool = True


METHODS: dict[str, PeftMethod] = {
    "ia3": PeftMethod(
        section={"method": "ia3"},
        config=lambda: IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        ),
        rate=2e-2,
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
    "lokr": PeftMethod(
        section={"method": "lokr", "rank": 2, "alpha": 4},
        config=lambda: LoKrConfig(r=2, alpha=4, target_modules=PROJECTIONS, task_type="CAUSAL_LM"),
        rate=2e-2,
        variants=(
            {},
            {"decompose_factor": 4},
            {"decompose_factor": 5, "target_modules": "attention"},
            {"decompose_both": True, "rank": 1},
            {"rank": 64},
        ),
        takes_nf4=False,
        takes_conv1d=False,
    ),
    "loha": PeftMethod(
        section={"method": "loha", "rank": 2, "alpha": 4},
        config=lambda: LoHaConfig(r=2, alpha=4, target_modules=PROJECTIONS, task_type="CAUSAL_LM"),
        rate=2e-2,
        takes_nf4=False,
        takes_conv1d=False,
    ),
    "vera": PeftMethod(
        section={"method": "vera", "rank": 8},
        config=lambda: VeraConfig(r=8, target_modules=PROJECTIONS, task_type="CAUSAL_LM"),
        rate=2e-2,
    ),
    "oft": PeftMethod(
        section={"method": "oft", "block_size": 4},
        config=lambda: OFTConfig(r=0, oft_block_size=4, target_modules=PROJECTIONS, task_type="CAUSAL_LM"),
        rate=2e-2,
        variants=({}, {"block_size": 8, "target_modules": "attention"}, {"block_share": True}),
        takes_conv1d=False,
    ),
}


def _in_front(section: dict[str, Any], config: Callable[[], PeftConfig], rate: float, **others: Any) -> PeftMethod:
    return PeftMethod(section=section | {"num_virtual_tokens": 5}, config=config, rate=rate, merges=False, **others)


IN_FRONT: dict[str, PeftMethod] = {
    "prompt_tuning": _in_front(
        {"method": "prompt_tuning"},
        lambda: PromptTuningConfig(num_virtual_tokens=5, prompt_tuning_init="SAMPLE_VOCAB", task_type="CAUSAL_LM"),
        rate=2e-2,
    ),
    "prefix_tuning": _in_front(
        {"method": "prefix_tuning", "prefix_init": "random"},
        lambda: PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
        rate=0.3,
    ),
    "projected prefix_tuning": _in_front(
        {"method": "prefix_tuning", "projection": True, "encoder_hidden_size": 24, "prefix_init": "random"},
        lambda: PrefixTuningConfig(num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=24, task_type="CAUSAL_LM"),
        rate=2e-2,
    ),
    "p_tuning": _in_front(
        {"method": "p_tuning", "encoder_hidden_size": 24},
        lambda: PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=24, task_type="CAUSAL_LM"),
        rate=2e-2,
    ),
}
"""Those that lay virtual tokens in front of each document."""
EVERY = METHODS | IN_FRONT
