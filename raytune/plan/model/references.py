"""Shapes of models that people fine-tune, by hub id, so that a plan needs no download. From their config.json on the hub."""

from pathlib import Path
from typing import Any

from raytune.config.sections.model import ModelSection
from raytune.errors import ModelError
from raytune.hub.cache import default_hub_cache, is_offline
from raytune.plan.model.architectures import model_shape
from raytune.plan.model.base_model import find_config, read_model_shape
from raytune.plan.model.shapes import ModelShape


def _decoder(
    model_type: str,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    positions: int,
    **more: Any,
) -> dict[str, Any]:
    """A config.json as Llama and its relatives write it."""
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
    } | more


def _llama_3(*sizes: int, factor: float = 8.0, **more: Any) -> dict[str, Any]:
    """Llama 3.1 and later: 8,192 positions at first, scaled to 131,072."""
    scaling = {"rope_type": "llama3", "factor": factor, "original_max_position_embeddings": 8192}
    bounds = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    hidden, intermediate, layers, heads, kv_heads = sizes
    return _decoder(
        "llama", hidden, intermediate, layers, heads, kv_heads, 128_256, 131_072, rope_scaling=scaling | bounds, **more
    )


_LLAMA_3_1_8B = _llama_3(4096, 14336, 32, 32, 8)
_LLAMA_3_1_70B = _llama_3(8192, 28672, 80, 64, 8)
_QWEN_2_5 = {
    "0.5B": _decoder("qwen2", 896, 4864, 24, 14, 2, 151_936, 32_768, tie_word_embeddings=True),
    "1.5B": _decoder("qwen2", 1536, 8960, 28, 12, 2, 151_936, 32_768, tie_word_embeddings=True),
    "7B": _decoder("qwen2", 3584, 18944, 28, 28, 4, 152_064, 32_768),
    "14B": _decoder("qwen2", 5120, 13824, 48, 40, 8, 152_064, 32_768),
    "32B": _decoder("qwen2", 5120, 27648, 64, 40, 8, 152_064, 32_768),
    "72B": _decoder("qwen2", 8192, 29568, 80, 64, 8, 152_064, 32_768),
}
_GEMMA_2_9B = _decoder("gemma2", 3584, 14336, 42, 16, 8, 256_000, 8192, head_dim=256)
_GEMMA_2_27B = _decoder("gemma2", 4608, 36864, 46, 32, 16, 256_000, 8192, head_dim=128)
_MIXTRAL_8X7B = _decoder("mixtral", 4096, 14336, 32, 32, 8, 32_000, 32_768, num_local_experts=8, num_experts_per_tok=2)

REFERENCES: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-2-7b-hf": _decoder("llama", 4096, 11008, 32, 32, 32, 32_000, 4096),
    "meta-llama/Llama-2-13b-hf": _decoder("llama", 5120, 13824, 40, 40, 40, 32_000, 4096),
    "meta-llama/Llama-2-70b-hf": _decoder("llama", 8192, 28672, 80, 64, 8, 32_000, 4096),
    "meta-llama/Meta-Llama-3-8B": _decoder("llama", 4096, 14336, 32, 32, 8, 128_256, 8192),
    "meta-llama/Meta-Llama-3-70B": _decoder("llama", 8192, 28672, 80, 64, 8, 128_256, 8192),
    "meta-llama/Llama-3.1-8B": _LLAMA_3_1_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_3_1_8B,
    "meta-llama/Llama-3.1-70B": _LLAMA_3_1_70B,
    "meta-llama/Llama-3.1-70B-Instruct": _LLAMA_3_1_70B,
    "meta-llama/Llama-3.2-1B": _llama_3(2048, 8192, 16, 32, 8, factor=32.0, head_dim=64, tie_word_embeddings=True),
    "meta-llama/Llama-3.2-3B": _llama_3(3072, 8192, 28, 24, 8, factor=32.0, head_dim=128, tie_word_embeddings=True),
    "meta-llama/Llama-3.3-70B-Instruct": _LLAMA_3_1_70B,
    "codellama/CodeLlama-34b-hf": _decoder("llama", 8192, 22016, 48, 64, 8, 32_000, 16_384),
    "mistralai/Mistral-7B-v0.1": _decoder("mistral", 4096, 14336, 32, 32, 8, 32_000, 32_768),
    "mistralai/Mistral-7B-v0.3": _decoder("mistral", 4096, 14336, 32, 32, 8, 32_768, 32_768),
    "mistralai/Mistral-7B-Instruct-v0.3": _decoder("mistral", 4096, 14336, 32, 32, 8, 32_768, 32_768),
    "mistralai/Mixtral-8x7B-v0.1": _MIXTRAL_8X7B,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": _MIXTRAL_8X7B,
    **{f"Qwen/Qwen2.5-{size}": config for size, config in _QWEN_2_5.items()},
    **{f"Qwen/Qwen2.5-{size}-Instruct": config for size, config in _QWEN_2_5.items()},
    "Qwen/Qwen3-8B": _decoder("qwen3", 4096, 12288, 36, 32, 8, 151_936, 40_960, head_dim=128),
    "Qwen/Qwen3-14B": _decoder("qwen3", 5120, 17408, 40, 40, 8, 151_936, 40_960, head_dim=128),
    "Qwen/Qwen3-32B": _decoder("qwen3", 5120, 25600, 64, 64, 8, 151_936, 40_960, head_dim=128),
    "Qwen/Qwen3-30B-A3B": _decoder(
        "qwen3_moe",
        2048,
        6144,
        48,
        32,
        4,
        151_936,
        40_960,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
    ),
    "google/gemma-2-9b": _GEMMA_2_9B,
    "google/gemma-2-9b-it": _GEMMA_2_9B,
    "google/gemma-2-27b": _GEMMA_2_27B,
    "google/gemma-2-27b-it": _GEMMA_2_27B,
    "microsoft/phi-4": _decoder("phi3", 5120, 17920, 40, 40, 10, 100_352, 16_384),
    "EleutherAI/gpt-neox-20b": _decoder("gpt_neox", 6144, 24576, 44, 64, 64, 50_432, 2048),
}
"""By hub id."""


def is_known(base: str, revision: str | None = None, hub_cache: Path | None = None) -> bool:
    """Whether a plan can be made of a model without asking anybody."""
    try:
        find_config(base, revision, hub_cache or default_hub_cache())
    except ModelError:
        return base in REFERENCES or Path(base).expanduser().exists()
    return True


def planned_shape(
    base: str, revision: str | None = None, hub_cache: Path | None = None, *, trust_remote_code: bool = False
) -> ModelShape:
    """The shape of `model.base` for a plan that loads nothing: from its config.json, or from the table where that is not here.

    Raises:
        ModelError: if neither is, or there is no plan for such a model.
    """
    try:
        find_config(base, revision, hub_cache or default_hub_cache())
    except ModelError as error:
        if base in REFERENCES and not Path(base).exists():
            return model_shape(REFERENCES[base], f"raytune's table of {base}")
        raise ModelError(f"{error} A plan alone also knows: {', '.join(REFERENCES)}.") from error
    return read_model_shape(base, revision, hub_cache, trust_remote_code=trust_remote_code)


def describe_base(model: ModelSection) -> None:
    """Download the config of a model that a plan would not know otherwise; without a network, the plan says which it knows.

    Raises:
        ModelError: if there is no such model, or it may not be seen from here.
        ClusterError: if the hub cannot be reached.
    """
    if is_known(model.base, model.revision) or is_offline():
        return
    from raytune.hub.snapshot import described

    described(model.base, model.revision, with_code=model.trust_remote_code)
