"""The methods of PEFT that tests train, each as a section of ours and as the configuration that a user of plain PEFT writes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft.tuners.boft.layer as boft_layer
import pytest
import torch
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from torch import Tensor

from tests.plain_bottlenecks import load_bottlenecks, with_bottlenecks

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, kw_only=True)
class PeftMethod:
    section: dict[str, Any]
    config: Callable[[], PeftConfig] | None = None
    """Plain PEFT's, for the tiny Llama."""
    plain: Callable[[Any], Any] | None = None
    """Adapts a model in plain torch, where PEFT has no such method."""
    reloaded: Callable[[Any, Path], Any] = lambda base, folder: PeftModel.from_pretrained(base, str(folder))
    """A base with what a folder holds."""
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
    penalty: Callable[[Any], Tensor | float] = lambda model: 0.0
    """What is added to the loss of a step."""
    after_step: Callable[[Any, int], None] = lambda model, step: None
    """What a user of PEFT calls after this many steps, before the gradients go."""
    why_unmerged: str | None = None
    """What `merge` says, where it merges no such adapter."""

    def adapted(self, model: Any) -> Any:
        """A model as a user adapts it without raytune."""
        if self.plain is not None:
            return self.plain(model)
        assert self.config is not None
        return get_peft_model(model, self.config())


def orthogonality(model: Any) -> Tensor:
    """Half the mean of |P P' - 1| over A and B, which PEFT adds where a model is given labels."""
    matrices = [
        one if ".lora_A." in name else one.T for name, one in model.named_parameters() if ".lora_A." in name or ".lora_B." in name
    ]
    return 0.5 * torch.stack([torch.dist(one @ one.T, torch.eye(len(one))) for one in matrices]).mean()


@contextmanager
def own_blocks() -> Iterator[None]:
    """Context in which PEFT makes layers of BOFT that lay out their blocks as PEFT does itself where it has no CUDA extension."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boft_layer, "get_fbd_cuda", lambda: None)
        yield


def with_boft(model: Any) -> Any:
    with own_blocks():
        return get_peft_model(model, BOFTConfig(boft_block_size=4, target_modules=PROJECTIONS, task_type="CAUSAL_LM"))


def load_boft(base: Any, folder: Path) -> Any:
    with own_blocks():
        return PeftModel.from_pretrained(base, str(folder))


METHODS: dict[str, PeftMethod] = {
    "ia3": PeftMethod(
        section={"method": "ia3"},
        config=lambda: IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        ),
        rate=2e-2,
        variants=(
            {},
            {"target_modules": "all-linear"},
            {"target_modules": "attention"},
            {"target_modules": r".*\.1\..*(proj|dense|c_attn|c_proj)"},
        ),
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
    "boft": PeftMethod(
        section={"method": "boft", "block_size": 4},
        plain=with_boft,
        reloaded=load_boft,
        rate=2e-2,
        variants=(
            {},
            {"block_size": 8, "target_modules": "attention"},
            {"block_size": 2, "num_butterfly_factors": 2},
        ),
        takes_conv1d=False,
    ),
    "bottleneck": PeftMethod(
        section={"method": "bottleneck", "reduction": 8},
        plain=lambda model: with_bottlenecks(model, 4),
        reloaded=load_bottlenecks,
        rate=2e-2,
        excluded="o_proj",
        variants=(
            {},
            {"target_modules": "mlp", "reduction": 4},
            {"target_modules": "attention", "width": 5},
            {"target_modules": r".*\.1\..*(o_proj|dense|c_proj|mlp)"},
        ),
        why_unmerged="merges into nothing: bottlenecks are not linear",
    ),
    "adalora": PeftMethod(
        section={"method": "adalora", "rank": 2, "initial_rank": 4, "alpha": 8}
        | {"tinit_fraction": 0.25, "tfinal_fraction": 0.25, "delta_t": 1},
        config=lambda: AdaLoraConfig(
            init_r=4,
            target_r=2,
            lora_alpha=8,
            tinit=1,
            tfinal=1,
            deltaT=1,
            total_step=4,
            target_modules=PROJECTIONS,
            task_type="CAUSAL_LM",
        ),
        rate=5e-2,
        penalty=orthogonality,
        after_step=lambda model, step: model.base_model.update_and_allocate(step),
    ),
}


def _in_front(section: dict[str, Any], config: Callable[[], PeftConfig], rate: float, **others: Any) -> PeftMethod:
    return PeftMethod(section=section | {"num_virtual_tokens": 5}, config=config, rate=rate, **others)


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
