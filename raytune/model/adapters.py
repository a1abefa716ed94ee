"""From the adapter section to PEFT: which layers get an update, how it starts, and its dtype."""

import re
import warnings
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from raytune.config.adapter import LoraAdapter, QloraAdapter
from raytune.errors import ModelError
from raytune.model.attention import keeps_state
from raytune.model.experts import bare_parameters, expert_parameters, linear_routers, names_of_experts
from raytune.model.kernels import bypassed_layers
from raytune.model.quantize import quantized_modules
from raytune.plan.adapter_size import GROUPS_WITH_EXPERTS, check_is_seen, has_name, is_left_out, is_within_saved

ATTENTION = re.compile(r"attn|attention")
MLP = re.compile(r"mlp|ffn|feed_forward|moe|expert")
INITIALISATIONS: dict[str, bool | str] = {
    "default": True,
    "gaussian": "gaussian",
    "pissa": "pissa",
    "olora": "olora",
    "orthogonal": "orthogonal",
    "eva": "eva",
}
CHANGES_BASE = ("pissa", "olora")
"""Starts that take their share out of the base weights, so that the adapter fits the original base only after conversion."""


def add_adapter(model: PreTrainedModel, adapter: LoraAdapter, *, revision: str | None, seed: int) -> PeftModel:
    """Freeze a model and add a LoRA adapter, as plain PEFT does after `torch.manual_seed(seed)`.

    The adapter has the dtype of the base; an engine that keeps fp32 masters casts what is trained itself.

    Raises:
        ModelError: if a name matches nothing, or the start does not suit the base.
    """
    config = lora_config(model, adapter, revision=revision)
    _check_initialisation(adapter)
    _check_saved_modules(model, adapter)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        # PEFT 0.21 looks among layers only, and says so of patterns of parameters, which it obeys; `lora_config` looked at both.
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
        torch.manual_seed(seed)
        # ZeRO-3 needs trained and frozen weights in one dtype (https://github.com/huggingface/trl/issues/6089).
        peft_model = get_peft_model(model, config, autocast_adapter_dtype=False, revision=revision)
    if adapter.init in CHANGES_BASE:
        # Both factors as they start, which export needs to make an adapter of the original base.
        start = {name: value.detach().to("cpu", copy=True) for name, value in peft_model.named_parameters() if ".lora_" in name}
        peft_model.initial_adapter = start  # pyright: ignore[reportArgumentType]
    return peft_model


def lora_config(model: PreTrainedModel, adapter: LoraAdapter, *, revision: str | None) -> LoraConfig:
    """PEFT's configuration of an adapter on this model, with every group and pattern resolved against its layers."""
    layers = _target_layers(model)
    parameters = _target_parameters(model, adapter)
    targets = _targets(model, layers, adapter.target_modules, or_nothing=bool(parameters))
    for setting, names in (("exclude_modules", adapter.exclude_modules), ("modules_to_save", adapter.modules_to_save)):
        everything = [name for name, _ in model.named_modules() if name]
        everything += [*expert_parameters(model)] if setting == "exclude_modules" else []
        for name in names:
            _check_matches(f"adapter.{setting}", name, [full for full in everything if has_name(full, [name])], everything)
    for setting, patterns in (("rank_pattern", adapter.rank_pattern), ("alpha_pattern", adapter.alpha_pattern)):
        for pattern in patterns:
            matching = _matching(f"adapter.{setting}", pattern, [*layers, *parameters], rf"(.*\.)?({pattern})")
            _check_matches(f"adapter.{setting}", pattern, matching, [*layers, *parameters])
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        # PEFT writes this into adapter_config.json, where readers such as vLLM expect a whole number.
        lora_alpha=int(adapter.alpha) if adapter.alpha.is_integer() else adapter.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=adapter.dropout,
        target_modules=targets,
        target_parameters=_shortest_suffixes(parameters, [name for name, _ in model.named_parameters()], num_parts=2) or None,
        exclude_modules=adapter.exclude_modules or None,
        modules_to_save=adapter.modules_to_save or None,
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


def _target_layers(model: PreTrainedModel) -> list[str]:
    """Names of the layers that an update can be added to; the output head is not among them."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head  # bitsandbytes' layers are subclasses of nn.Linear
    ]


def _target_parameters(model: PreTrainedModel, adapter: LoraAdapter) -> list[str]:
    """Names of the parameters outside layers that get an update: what is named, and with a group of linear layers the experts."""
    bare, experts = [*bare_parameters(model)], [*expert_parameters(model)]
    named = []
    for name in adapter.target_parameters:
        matching = [full for full in bare if has_name(full, [name])]
        _check_matches("adapter.target_parameters", name, matching, bare)
        named += matching
    takes_experts = isinstance(adapter.target_modules, str) and adapter.target_modules in GROUPS_WITH_EXPERTS
    in_group = [full for full in experts if takes_experts and not is_left_out(full, adapter)]
    return sorted({*named, *in_group})


def frozen_experts(model: PreTrainedModel, adapter: LoraAdapter) -> list[str]:
    """Names of the parameters of fused experts that nothing of an adapter changes.

    Raises:
        ModelError: if a name of the adapter matches nothing.
    """
    updated = {*_target_parameters(model, adapter)}
    return [name for name in expert_parameters(model) if name not in updated and not is_within_saved(name, adapter)]


def _targets(model: PreTrainedModel, layers: list[str], asked: str | list[str], *, or_nothing: bool) -> list[str] | str:
    """PEFT's `target_modules`.

    Args:
        or_nothing: whether a group may be empty, because it has fused experts instead.
    """
    of_experts = names_of_experts(model.config.model_type)
    bypassed = {*bypassed_layers(model)} if keeps_state(type(model), model.config) else set()
    left_out = {*linear_routers(model)} | bypassed | {name for name in layers if name.rpartition(".")[2] in of_experts}
    groups: dict[str, Callable[[str], bool]] = {
        "all-linear": lambda name: name not in left_out,
        "attention": lambda name: ATTENTION.search(name) is not None and name not in left_out,
        "mlp": lambda name: (
            MLP.search(name) is not None and ATTENTION.search(name.rpartition(".")[0]) is None and name not in left_out
        ),
    }
    if isinstance(asked, str) and asked in groups:
        chosen = [name for name in layers if groups[asked](name)]
        if not or_nothing:
            _check_matches("adapter.target_modules", asked, chosen, layers)
        return _shortest_suffixes(chosen, [name for name, _ in model.named_modules()])
    everything = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D | nn.Embedding)]
    if isinstance(asked, str):
        matching = _matching("adapter.target_modules", asked, everything, asked)
        _check_matches("adapter.target_modules", asked, matching, layers)
        _check_are_seen(matching, bypassed, of_experts)
        # For such a model PEFT would keep the last parts of the names that match, and so take other layers in as well.
        return _shortest_suffixes(matching, [name for name, _ in model.named_modules()]) if of_experts else asked
    for name in asked:
        matching = [full for full in everything if has_name(full, [name])]
        _check_matches("adapter.target_modules", name, matching, layers)
        _check_are_seen(matching, bypassed, of_experts)
    return list(asked)


def _check_are_seen(matching: list[str], bypassed: set[str], of_experts: tuple[str, ...]) -> None:
    for name in matching:
        check_is_seen(name, of_experts, is_bypassed=name in bypassed)


def _matching(setting: str, pattern: str, names: list[str], whole: str) -> list[str]:
    try:
        return [name for name in names if re.fullmatch(whole, name)]
    except re.error as error:
        raise ModelError(f"{setting}: {pattern!r} is not a regular expression: {error}.") from error


def _shortest_suffixes(chosen: list[str], everything: list[str], num_parts: int = 1) -> list[str]:
    """Names that PEFT's rule resolves to exactly `chosen`: `q_proj`, or `attn.c_proj` where `c_proj` alone would take more.

    Args:
        num_parts: of a name, at least.
    """
    wanted, suffixes = set(chosen), set()
    for name in chosen:
        parts = name.split(".")
        for start in range(len(parts) - num_parts, -1, -1):
            suffix = ".".join(parts[start:])
            if suffix in suffixes or all(full in wanted for full in everything if has_name(full, [suffix])):
                suffixes.add(suffix)
                break
    return sorted(suffixes)


def _check_matches(setting: str, asked: str, matching: list[str], names: list[str]) -> None:
    if matching:
        return
    last_parts = sorted({name.rpartition(".")[2] for name in names} - {"0"})
    near = get_close_matches(asked.rpartition(".")[2], last_parts, n=3, cutoff=0.5)
    hint = f"Near names: {', '.join(near)}. " if near else ""
    shown = ", ".join(last_parts[:20]) + (", ..." if len(last_parts) > 20 else "")
    raise ModelError(f"{setting}: {asked!r} matches no layer of the model. {hint}It has {shown}.")


def _check_initialisation(adapter: LoraAdapter) -> None:
    if isinstance(adapter, QloraAdapter) and adapter.init in CHANGES_BASE:
        raise ModelError(
            f"adapter.init: {adapter.init} takes its share out of the base weights, which a quantised base cannot give exactly. "
            f"Use adapter.method: lora, or adapter.init: default, gaussian or eva."
        )
    ranks = {adapter.rank, *adapter.rank_pattern.values()}
    if adapter.init == "orthogonal" and any(rank % 2 for rank in ranks):
        raise ModelError(f"adapter.init: orthogonal needs even ranks, but adapter.rank and rank_pattern have {sorted(ranks)}.")
    if isinstance(adapter, QloraAdapter) and adapter.init == "orthogonal" and adapter.quant_storage == "uint8":
        raise ModelError(
            "adapter.init: orthogonal takes its dtype from the base weights, which adapter.quant_storage: uint8 makes integers. "
            "Set adapter.quant_storage to auto."
        )


def _check_saved_modules(model: PreTrainedModel, adapter: LoraAdapter) -> None:
    quantized = [name for name in quantized_modules(model) if has_name(name, adapter.modules_to_save)]
    if quantized:
        raise ModelError(
            f"adapter.modules_to_save names quantised layers ({', '.join(quantized[:3])}), which cannot be trained in full. With "
            f"adapter.method: {adapter.method}, only embeddings, norms and the output head can."
        )


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
