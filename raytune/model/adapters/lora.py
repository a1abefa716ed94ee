"""LoRA on a model: PEFT's configuration of it, how it starts, and what of it belongs to the original base."""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, PeftModel, initialize_lora_eva_weights
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from raytune.config.sections.adapter import LoraAdapter
from raytune.errors import ModelError
from raytune.model.adapters.adapting import Adapting, added, whole_targets
from raytune.model.adapters.fused_updates import fuse_updates
from raytune.model.adapters.input_casts import leave_out_casts
from raytune.model.adapters.targets import (
    check_matches,
    check_named,
    shortest_suffixes,
    target_layers,
    targets,
    unchanged_experts,
)
from raytune.model.adapters.token_rows import compute_rows_alone, trained_rows
from raytune.model.parts.experts import bare_parameters, expert_parameters
from raytune.plan.methods.experts import takes_experts
from raytune.plan.methods.lora_limits import FROM_BASE
from raytune.plan.methods.targets import is_left_out
from raytune.plan.model.module_names import has_name, matches_end

INITIALISATIONS: dict[str, bool | str] = {
    "default": True,
    "gaussian": "gaussian",
    "pissa": "pissa",
    "olora": "olora",
    "orthogonal": "orthogonal",
    "eva": "eva",
}


def _add(model: PreTrainedModel, adapter: LoraAdapter, revision: str | None, seed: int) -> PeftModel:
    """Add a LoRA adapter, and keep what export needs of its start."""
    with whole_targets("LORA") if _looks_at_weights(adapter) else nullcontext():
        peft_model = added(model, lora_config(model, adapter, revision=revision), adapter, seed=seed)
    _mend(peft_model)
    if adapter.init in FROM_BASE:
        # Both factors as they start, which export needs to make an adapter of the original base.
        start = {name: value.detach().to("cpu", copy=True) for name, value in peft_model.named_parameters() if ".lora_" in name}
        peft_model.initial_adapter = start  # pyright: ignore[reportArgumentType]
    return peft_model


def _looks_at_weights(adapter: LoraAdapter) -> bool:
    """Whether an update starts from norms of the weights that it changes."""
    return adapter.use_dora


def _mend(model: PeftModel) -> None:
    compute_rows_alone(model)
    leave_out_casts(model)
    fuse_updates(model)


def lora_config(model: PreTrainedModel, adapter: LoraAdapter, *, revision: str | None) -> LoraConfig:
    """PEFT's configuration of an adapter on this model, with every group and pattern resolved against its layers."""
    layers = target_layers(model)
    parameters = _target_parameters(model, adapter)
    asked = targets(model, adapter.target_modules, or_nothing=bool(parameters))
    check_named(model, adapter)
    for setting, patterns in (("rank_pattern", adapter.rank_pattern), ("alpha_pattern", adapter.alpha_pattern)):
        for pattern in patterns:
            matching = [name for name in (*layers, *parameters) if matches_end(pattern, name, f"adapter.{setting}")]
            check_matches(f"adapter.{setting}", pattern, matching, [*layers, *parameters])
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        # PEFT writes this into adapter_config.json, where readers such as vLLM expect a whole number.
        lora_alpha=int(adapter.alpha) if adapter.alpha.is_integer() else adapter.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=adapter.dropout,
        target_modules=asked,
        target_parameters=shortest_suffixes(parameters, [name for name, _ in model.named_parameters()], num_parts=2) or None,
        exclude_modules=adapter.exclude_modules or None,
        modules_to_save=adapter.modules_to_save or None,
        trainable_token_indices=trained_rows(model, adapter) or None,
        bias=adapter.bias,
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        init_lora_weights=INITIALISATIONS[adapter.init],  # pyright: ignore[reportArgumentType]
        rank_pattern=dict(adapter.rank_pattern),
        alpha_pattern=dict(adapter.alpha_pattern),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        # Without redistribution of ranks between layers, which would be decided by data and could not be planned.
        eva_config=EvaConfig(rho=1.0) if adapter.init == "eva" else None,
        revision=revision,
    )


def _target_parameters(model: PreTrainedModel, adapter: LoraAdapter) -> list[str]:
    """Names of the parameters outside layers that get an update: what is named, and with a group of linear layers the experts."""
    bare, experts = [*bare_parameters(model)], [*expert_parameters(model)]
    named = []
    for name in adapter.target_parameters:
        matching = [full for full in bare if has_name(full, [name])]
        check_matches("adapter.target_parameters", name, matching, bare)
        named += matching
    in_group = [full for full in experts if takes_experts(adapter.target_modules) and not is_left_out(full, adapter)]
    return sorted({*named, *in_group})


def _frozen_experts(model: PreTrainedModel, adapter: LoraAdapter) -> list[str]:
    return unchanged_experts(model, adapter, _target_parameters(model, adapter))


def _leaves_base_alone(adapter: LoraAdapter, is_quantised: bool) -> bool:
    """Not one that trains biases or whole modules, or that takes its start out of the base's weights. Nor one that
    trains rows of tokens."""
    trains_others = adapter.bias != "none" or adapter.modules_to_save or adapter.trainable_tokens not in ("auto", [])
    return adapter.init not in FROM_BASE and not trains_others


def _for_original_base(model: PeftModel, state: dict[str, Tensor], config: LoraConfig) -> tuple[dict[str, Tensor], LoraConfig]:
    """Turn an adapter whose start was taken out of the base (PiSSA, OLoRA) into one of the original base.

    The base was W - s B0 A0 and is W again, so the update s B A becomes s (B A - B0 A0): twice the rank, the same scale.
    """
    initial: dict[str, Tensor] | None = getattr(model, "initial_adapter", None)
    if initial is None:
        return state, config
    converted = dict(state)
    for name, start in initial.items():
        if ".lora_A." in name:
            converted[name] = torch.cat([state[name].float(), start.float()], dim=0).to(state[name].dtype)
        elif ".lora_B." in name:
            converted[name] = torch.cat([state[name].float(), -start.float()], dim=1).to(state[name].dtype)
    scale = 2**0.5 if config.use_rslora else 2
    config.init_lora_weights = True
    config.r *= 2
    config.lora_alpha *= scale  # pyright: ignore[reportAttributeAccessIssue]
    config.rank_pattern = {pattern: 2 * rank for pattern, rank in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {pattern: scale * alpha for pattern, alpha in (config.alpha_pattern or {}).items()}
    return converted, config


def initialise_eva(model: PeftModel, inputs: Iterable[dict[str, Any]]) -> None:
    """Start an adapter from the main directions of its layers' inputs (EVA, Paischer et al. 2024).

    Args:
        model: with an adapter of `init: eva`, before an engine shards it.
        inputs: what to pass to the model's forward, for the first batches of training; the same on every rank.

    Raises:
        ModelError: if there are too few tokens for as many directions as the adapter has ranks, or the model is sharded.
    """
    batches = list(inputs)
    if not batches:
        raise ModelError("adapter.init: eva needs at least one batch of training data.")
    rank, most_tokens = model.peft_config["default"].r, max(batch["input_ids"].numel() for batch in batches)  # pyright: ignore[reportAttributeAccessIssue]
    if most_tokens < rank:
        # PEFT leaves out a batch with fewer tokens than ranks, and goes through the batches until one is left in: for ever.
        raise ModelError(
            f"adapter.init: eva finds {rank} directions (adapter.rank) in {rank} tokens or more at a time, but the first "
            f"micro-batches of training have at most {most_tokens}. Lower adapter.rank, or raise "
            f"training.per_device_train_batch_size."
        )
    if any(parameter.numel() == 0 for parameter in model.parameters()):
        raise ModelError(
            "adapter.init: eva runs the whole model before training, but ZeRO-3 has sharded it. Set training.zero.stage to 2."
        )
    initialize_lora_eva_weights(
        model,
        batches,
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=_all_positions,
        gather_distributed_inputs=False,
        show_progress_bar=False,
    )


def _all_positions(layer_input: Any, _model_input: Any, _name: str) -> Tensor:
    """Packed rows have no padding: every position counts."""
    tensor = layer_input[0] if isinstance(layer_input, tuple) else layer_input
    return tensor.reshape(-1, tensor.shape[-1]).float()


ADAPTING = Adapting(
    add=_add,
    frozen_experts=_frozen_experts,
    leaves_base_alone=_leaves_base_alone,
    peft_type="LORA",
    merges=True,
    mend=_mend,
    for_original_base=_for_original_base,
    needs_whole_targets=_looks_at_weights,
    starts_from_data=lambda adapter: adapter.init == "eva",
    start_from_data=initialise_eva,
)
