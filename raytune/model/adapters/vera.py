"""VeRA on a model: PEFT's configuration of it, and the shared matrices, which are no parameters."""

from typing import Any

from peft import PeftModel, VeraConfig
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from raytune.config.sections.adapter import VeraAdapter
from raytune.model.adapters.adapting import Adapting, added
from raytune.model.adapters.targets import check_named, shortest_suffixes, target_names, unchanged_experts
from raytune.plan.model.module_names import has_name


def _add(model: PreTrainedModel, adapter: VeraAdapter, revision: str | None, seed: int) -> PeftModel:
    check_named(model, adapter)
    names = target_names(model, adapter.target_modules)
    names = [name for name in names if not has_name(name, adapter.exclude_modules)]  # for which PEFT's VeRA has no setting
    config = VeraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        vera_dropout=adapter.dropout,
        d_initial=adapter.d_initial,
        projection_prng_key=adapter.projection_prng_key,
        save_projection=adapter.save_projection,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        target_modules=shortest_suffixes(names, [name for name, _ in model.named_modules()]),
        modules_to_save=adapter.modules_to_save or None,
        revision=revision,
    )
    adapted = added(model, config, adapter, seed=seed)
    _cast_shared(adapted)
    return adapted


def _cast_shared(model: PeftModel) -> None:
    """Give the shared matrices the dtype of the base's whole weights: over packed bytes PEFT 0.21 leaves them in fp32, which no
    product with activations in 16 bits takes."""
    whole: Any = model.get_input_embeddings()
    tuner: Any = model.base_model
    for matrices in (tuner.vera_A, tuner.vera_B):
        matrices["default"] = matrices["default"].to(whole.weight.dtype)


def _with_shared(model: PeftModel, state: dict[str, Tensor], config: VeraConfig) -> tuple[dict[str, Tensor], VeraConfig]:
    """The factors, and the matrices that they belong to, which no engine knows."""
    if not config.save_projection:
        return state, config
    tuner: Any = model.base_model
    shared = {"base_model.vera_A.default": tuner.vera_A["default"], "base_model.vera_B.default": tuner.vera_B["default"]}
    return state | {name: matrix.detach().cpu() for name, matrix in shared.items()}, config


ADAPTING = Adapting(
    add=_add,
    frozen_experts=unchanged_experts,
    # PEFT takes updates off a base in 4 or 8 bits, but not back to what it was before in all of its versions.
    leaves_base_alone=lambda adapter, is_quantised: not (adapter.modules_to_save or is_quantised),
    peft_type="VERA",
    merges=True,
    mend=_cast_shared,
    for_original_base=_with_shared,
)
