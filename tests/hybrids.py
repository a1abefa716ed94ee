"""Tiny models whose forward pass may hold one document only, of every kind of layer that transformers has for it."""

from collections.abc import Callable
from typing import Any

import transformers
from transformers import PretrainedConfig

_SMALL: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
_MLP: dict[str, Any] = {"intermediate_size": 48}
_DELTA: dict[str, Any] = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_SCAN: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}

HYBRIDS: dict[str, Callable[[], PretrainedConfig]] = {
    "lfm2": lambda: transformers.Lfm2Config(
        **_SMALL, **_HEADS, **_MLP, layer_types=["conv", "conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False
    ),
    "lfm2_moe": lambda: transformers.Lfm2MoeConfig(
        **_SMALL, **_HEADS, **_MLP, **_EXPERTS, layer_types=["conv", "conv", "full_attention", "conv"], num_dense_layers=1
    ),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(
        **_SMALL, **_HEADS, **_MLP, **_DELTA, **_EXPERTS, shared_expert_intermediate_size=16
    ),
    "qwen3_5": lambda: transformers.Qwen3_5TextConfig(**_SMALL, **_HEADS, **_MLP, **_DELTA),
    "qwen3_5_moe": lambda: transformers.Qwen3_5MoeTextConfig(
        **_SMALL, **_HEADS, **_DELTA, **_EXPERTS, shared_expert_intermediate_size=16
    ),
    "jamba": lambda: transformers.JambaConfig(
        **_SMALL,
        **_HEADS,
        **_MLP,
        num_experts=4,
        num_experts_per_tok=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "nemotron_h": lambda: transformers.NemotronHConfig(
        **{key: value for key, value in _SMALL.items() if key != "num_hidden_layers"},
        **_HEADS,
        **_MLP,
        layers_block_type=["mamba", "moe", "attention", "mlp"],
        head_dim=8,
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=2,
        chunk_size=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
        n_group=1,
        topk_group=1,
    ),
    "mamba": lambda: transformers.MambaConfig(**_SMALL, state_size=8, expand=2, time_step_rank=4),
    "mamba2": lambda: transformers.Mamba2Config(
        **_SMALL, state_size=8, expand=2, num_heads=8, head_dim=8, n_groups=2, chunk_size=8
    ),
    "bamba": lambda: transformers.BambaConfig(**_SMALL, **_HEADS, **_MLP, **_SCAN, attn_layer_indices=[1]),
    "falcon_h1": lambda: transformers.FalconH1Config(**_SMALL, **_HEADS, **_MLP, **_SCAN, head_dim=8, mamba_d_ssm=64),
    "granitemoehybrid": lambda: transformers.GraniteMoeHybridConfig(
        **_SMALL,
        **_HEADS,
        **_MLP,
        **_SCAN,
        layer_types=["mamba", "attention", "mamba", "mamba"],
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=32,
    ),
    "recurrent_gemma": lambda: transformers.RecurrentGemmaConfig(**_SMALL, **_HEADS, **_MLP, head_dim=8, lru_width=32),
    "olmo_hybrid": lambda: transformers.OlmoHybridConfig(**_SMALL, **_HEADS, **_MLP),
    "falcon, whose attention asks for distances": lambda: transformers.FalconConfig(
        vocab_size=259, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True
    ),
}
