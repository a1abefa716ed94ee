"""Model shapes against the models that transformers builds on the meta device."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig

from raytune.errors import ModelError
from raytune.model.demo import demo_config
from raytune.plan.model.architectures import model_shape
from raytune.plan.model.base_model import find_config, read_model_shape

SMALL: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": transformers.LlamaConfig(**SMALL),
    "llama with biases": transformers.LlamaConfig(**SMALL, head_dim=8, attention_bias=True, mlp_bias=True),
    "llama tied": transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**SMALL),
    "qwen2": transformers.Qwen2Config(**SMALL),
    "qwen2 tied": transformers.Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SMALL),
    "gemma": transformers.GemmaConfig(**SMALL),
    "gemma untied": transformers.GemmaConfig(**SMALL, tie_word_embeddings=False),
    "gemma2": transformers.Gemma2Config(**SMALL),
    "gemma3": transformers.Gemma3TextConfig(**SMALL),
    "mixtral": transformers.MixtralConfig(**SMALL),
    "qwen2_moe": transformers.Qwen2MoeConfig(
        **SMALL, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=20
    ),
    "qwen3_moe": transformers.Qwen3MoeConfig(**SMALL, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=16),
    "phi3": transformers.Phi3Config(**SMALL, pad_token_id=0),
    "gpt2": transformers.GPT2Config(vocab_size=101, n_positions=64, n_embd=24, n_layer=3, n_head=4),
    "gpt2 with n_inner": transformers.GPT2Config(vocab_size=101, n_positions=64, n_embd=24, n_layer=3, n_head=4, n_inner=50),
    "gpt_neox": transformers.GPTNeoXConfig(
        vocab_size=101, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4
    ),
    "gpt_neox without attention bias": transformers.GPTNeoXConfig(
        vocab_size=101, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, attention_bias=False
    ),
}


def meta_model(config: PretrainedConfig) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_module_has_the_name_and_the_parameters_that_transformers_gives_it(name: str) -> None:
    config = CONFIGS[name]
    modules = dict(meta_model(config).named_modules())
    shape = model_shape(config.to_dict(), "config.json")
    own = {module.name: module.num_parameters for module in shape.modules()}
    theirs = {
        path: sum(parameter.numel() for parameter in module.parameters(recurse=False))
        for path, module in modules.items()
        if any(True for _ in module.parameters(recurse=False))
    }
    assert own == theirs


@pytest.mark.parametrize("name", CONFIGS)
def test_the_number_of_parameters_is_exact(name: str) -> None:
    config = CONFIGS[name]
    model = meta_model(config)
    shape = model_shape(config.to_dict(), "config.json")
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.num_biases == sum(value.numel() for key, value in model.named_parameters() if key.endswith(".bias"))
    assert shape.max_positions == config.max_position_embeddings


def test_a_token_passes_through_its_experts_only() -> None:
    shape = model_shape(CONFIGS["qwen2_moe"].to_dict(), "x")
    attention = 24 * 24 * 2 + 24 * 12 * 2
    assert shape.num_product_weights == 3 * (attention + 24 * 5 + 2 * 3 * 24 * 16 + 3 * 24 * 20 + 24)
    assert shape.intermediate == 2 * 16 + 20
    assert shape.num_quantizable == 3 * (attention + 3 * 24 * 20 + 24), "bitsandbytes leaves experts and the router as they are"


def test_layers_that_differ_are_refused() -> None:
    config = CONFIGS["qwen3_moe"].to_dict() | {"mlp_only_layers": [0]}
    with pytest.raises(ModelError, match="only if every layer has them"):
        model_shape(config, "x")


@pytest.mark.parametrize(
    ("config_class", "millions"),
    [
        ("LlamaConfig", 6738),
        ("MistralConfig", 7242),
        ("GemmaConfig", 8538),
        ("Phi3Config", 3821),
        ("MixtralConfig", 46703),
        ("Qwen2MoeConfig", 14316),
        ("GPT2Config", 124),
    ],
)
def test_what_a_hub_config_leaves_out_is_filled_in_as_transformers_does(config_class: str, millions: int) -> None:
    """Hub files hold only what differs from the class's defaults; here nothing differs."""
    config = getattr(transformers, config_class)()
    written = {key: value for key, value in config.to_dict().items() if key != "tie_word_embeddings"}
    assert round(model_shape(written, "config.json").num_parameters / 1e6) == millions
    assert model_shape(written, "x").num_parameters == sum(p.numel() for p in meta_model(config).parameters())


def test_the_demo_is_known_without_its_weights() -> None:
    shape = read_model_shape("demo")
    assert shape.num_parameters == sum(p.numel() for p in meta_model(demo_config()).parameters())


def test_kinds_of_modules_add_up() -> None:
    shape = model_shape(CONFIGS["qwen3"].to_dict(), "x")
    counts = shape.parameters_by_kind
    assert sum(counts.values()) == shape.num_parameters
    assert counts["embedding"] == counts["head"] == 101 * 24
    assert counts["mlp"] == 3 * 3 * 24 * 40


def test_a_missing_number_is_named() -> None:
    with pytest.raises(ModelError, match=r"config\.json: hidden_size must be a positive whole number, got None"):
        model_shape({"model_type": "llama"}, "config.json")


def test_a_hub_model_is_found_in_the_cache_by_branch_and_by_commit(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (snapshot / "config.json").write_text(json.dumps(CONFIGS["llama"].to_dict()))
    assert find_config("org/name", None, tmp_path) == find_config("org/name", commit, tmp_path) == snapshot / "config.json"
    assert read_model_shape("org/name", "main", tmp_path).hidden == 24
    with pytest.raises(ModelError, match=r"at revision 'v2' is neither a folder nor in the Hugging Face cache"):
        find_config("org/name", "v2", tmp_path)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        read_model_shape(str(tmp_path))
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ModelError, match="does not hold a JSON object"):
        read_model_shape(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        read_model_shape(str(tmp_path))
