"""Packed documents compute exactly what each of them computes alone, for every architecture and kind of attention."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig

from raytune.data.batches.batches import Batch
from raytune.errors import ModelError
from raytune.model.attention.attention import available_attention, check_attention, implementation_name, model_inputs

LENGTHS = [7, 1, 20, 12, 1]
SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "LlamaConfig": {},
    "MistralConfig": {"sliding_window": 4},
    "Qwen2Config": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "Qwen3Config": {},
    "Qwen2MoeConfig": {
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "MixtralConfig": {"num_local_experts": 4},
    "GemmaConfig": {},
    "Gemma2Config": {"sliding_window": 4, "attn_logit_softcapping": 2.0},
    "Gemma3TextConfig": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "Phi3Config": {"sliding_window": 4, "original_max_position_embeddings": 64},
    "PhimoeConfig": {"sliding_window": 4, "num_local_experts": 4},
    "Olmo2Config": {},
    "GPT2Config": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    },
    "GPTNeoXConfig": {},
    "DeepseekV3Config": {
        "num_key_value_heads": 4,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
    },
    "GptOssConfig": {"sliding_window": 4, "num_local_experts": 4, "layer_types": ["sliding_attention", "full_attention"]},
}


def small_config(name: str) -> PretrainedConfig:
    fields = SMALL | CONFIGS[name]
    if name == "GPT2Config":
        shared = {"vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"}
        fields = {key: value for key, value in fields.items() if key in CONFIGS[name] or key in shared}
    return getattr(transformers, name)(**fields)


def small_model(name: str, attention: str) -> Any:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_config(small_config(name), attn_implementation=attention, dtype=torch.float32)
    for parameter in model.parameters():  # biases and sinks that start at zero would hide a fault
        if parameter.dim() < 2:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model


def packed_batch(lengths: list[int] = LENGTHS, vocabulary: int = 61) -> Batch:
    """A batch as data/batches/batches.py makes it; the loss fields play no part here."""
    generator = torch.Generator().manual_seed(1)
    nothing = torch.zeros(0, dtype=torch.long)
    return Batch(
        input_ids=torch.randint(3, vocabulary, (1, sum(lengths)), generator=generator),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        cumulative_lengths=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        max_document_length=max(lengths),
        target_positions=nothing,
        target_ids=nothing,
        num_targets_in_step=0,
        rows=(),
    )


def alone(model: Any, batch: Any) -> torch.Tensor:
    """Logits of each document by itself, through transformers' eager attention."""
    model.set_attn_implementation("eager")
    bounds = batch.cumulative_lengths.tolist()
    return torch.cat([model(batch.input_ids[:, start:end], use_cache=False).logits for start, end in pairwise(bounds)], dim=1)


@pytest.mark.parametrize("attention", ["varlen", "sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_equal_each_alone(name: str, attention: Any) -> None:
    model = small_model(name, "eager").eval()
    check_attention(type(model), model.config, attention)
    batch = packed_batch()
    expected = alone(model, batch)
    model.set_attn_implementation(implementation_name(attention))
    # Kernels sum in orders of their own.
    torch.testing.assert_close(model(**model_inputs(batch, attention)).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["LlamaConfig", "MistralConfig", "Gemma2Config", "GptOssConfig"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradients_under_checkpointing_equal_those_of_documents_alone(name: str, use_reentrant: bool) -> None:
    model = small_model(name, "eager").train()
    batch = packed_batch()
    alone(model, batch).pow(2).sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.set_attn_implementation(implementation_name("varlen"))
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    model(**model_inputs(batch, "varlen")).logits.pow(2).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)  # sums in another order


@pytest.mark.parametrize("attention", ["varlen", "sdpa", "eager"])
@pytest.mark.parametrize("name", ["LlamaConfig", "MistralConfig", "Gemma2Config", "GptOssConfig"])
def test_generation_from_padded_prompts_is_that_of_transformers(name: str, attention: Any) -> None:
    model = small_model(name, "eager").eval()
    model.generation_config.eos_token_id = None
    prompts = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(2))
    is_token = torch.ones_like(prompts)
    is_token[0, :4] = 0
    arguments: dict[str, Any] = {"attention_mask": is_token, "max_new_tokens": 8, "do_sample": False, "use_cache": True}
    expected = model.generate(prompts, **arguments)
    model.set_attn_implementation(implementation_name(attention))
    assert model.generate(prompts, **arguments).tolist() == expected.tolist()


def test_autocast_with_fp32_norms_of_queries_and_keys() -> None:
    model = small_model("Qwen3Config", implementation_name("varlen"))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**model_inputs(packed_batch(), "varlen")).logits
    assert logits.isfinite().all()


def test_a_document_sees_nothing_of_its_neighbours() -> None:
    model = small_model("LlamaConfig", implementation_name("varlen")).eval()
    batch = packed_batch([5, 6, 4])
    before = model(**model_inputs(batch, "varlen")).logits
    batch.input_ids[0, 5:11] = 3
    after = model(**model_inputs(batch, "varlen")).logits
    assert torch.equal(before[:, :5], after[:, :5])
    assert torch.equal(before[:, 11:], after[:, 11:])
    assert not torch.equal(before[:, 5:11], after[:, 5:11])


@pytest.mark.parametrize("name", ["MambaConfig", "JambaConfig", "Qwen3NextConfig", "BloomConfig"])
def test_a_model_that_cannot_keep_documents_apart_is_refused(name: str) -> None:
    config = getattr(transformers, name)()
    known: Any = transformers.AutoModelForCausalLM._model_mapping
    model_class = known[type(config)]
    with pytest.raises(ModelError, match="packed row"):
        check_attention(model_class, config, "varlen")


def test_a_kind_that_the_model_lacks_is_refused_with_those_it_has() -> None:
    config = small_config("MistralConfig")
    with pytest.raises(ModelError, match=r"flex_attention.*Set model.attention to varlen or"):
        check_attention(transformers.MistralForCausalLM, config, "flex_attention")


def test_this_machine_offers_varlen_first_and_says_what_the_others_lack() -> None:
    options = available_attention(torch.device("cpu"), torch.bfloat16)
    assert options[0].name == "varlen"
    assert {option.name for option in options if not option.available} == {
        "flash_attention_2",
        "flash_attention_3",
        "flex_attention",
    }
    assert all(option.reason for option in options)
