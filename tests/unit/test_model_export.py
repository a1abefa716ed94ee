"""What is written is what was trained: plain transformers and PEFT, in a process without raytune, compute the same."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from raytune.config.sections.adapter import Adapter, FullAdapter, Ia3Adapter, LoraAdapter, QloraAdapter
from raytune.errors import ModelError
from raytune.model.files.base_content import base_content, save_content
from raytune.model.files.export import save_adapter, save_model
from raytune.model.load import load_model
from raytune.model.merging.merge import merge_adapter
from tests.tiny import save_tiny_model, tiny_plan, tiny_tokenizer
from tests.variants import variants

CPU = torch.device("cpu")
IDS = torch.randint(3, 60, (2, 25), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    gpt2.save_pretrained(root / "gpt2")
    tiny_tokenizer().save_pretrained(root / "gpt2")
    # Biases of a fresh model are zero, which would hide what becomes of them.
    biased = save_tiny_model(root / "biased", tied=False, attention_bias=True)
    model = AutoModelForCausalLM.from_pretrained(biased)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(biased)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    mixtral = root / "mixtral"  # its files have other names and shapes than the model
    MixtralForCausalLM(
        MixtralConfig(vocab_size=259, num_hidden_layers=2, num_local_experts=4, initializer_range=0.1, **sizes)
    ).save_pretrained(mixtral)
    tiny_tokenizer().save_pretrained(mixtral)
    return {
        "tied": save_tiny_model(root / "tied"),
        "untied": save_tiny_model(root / "untied", tied=False),
        "biased": biased,
        "gpt2": root / "gpt2",
        "mixtral": mixtral,
    }


def trained(base: Path, adapter: Adapter, *, dtype: str = "fp32", num_steps: int = 3) -> Any:
    """A model after a few steps, so that every trained weight has moved."""
    plan = tiny_plan(model={"path": str(base), "dtype": dtype, "compute_dtype": dtype}, adapter=adapter.model_dump())
    model: Any = load_model(plan.model, plan.adapter, device=CPU, seed=0)
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.02)
    for _ in range(num_steps):
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.float()


def logits_without_raytune(base: Path, adapter: Path, merged: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of an adapter on its base and of a merged model, from a process that cannot import raytune."""
    results = merged.parent / "logits.pt"
    code = f"""
import sys, torch
sys.modules["raytune"] = None
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
ids = torch.tensor({IDS.tolist()})
adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({str(base)!r}), {str(adapter)!r})
merged = AutoModelForCausalLM.from_pretrained({str(merged)!r})
with torch.inference_mode():
    torch.save([model.eval()(input_ids=ids).logits for model in (adapted, merged)], {str(results)!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=300, cwd=merged.parent)
    adapted_logits, merged_logits = torch.load(results)
    return adapted_logits, merged_logits


CASES: dict[str, tuple[str, Adapter]] = {
    "lora": ("tied", LoraAdapter(rank=4, alpha=8.0)),
    "rslora-patterns": (
        "tied",
        LoraAdapter(rank=4, use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3.0}),
    ),
    "dora": ("tied", LoraAdapter(rank=4, use_dora=True)),
    "bias": ("biased", LoraAdapter(rank=4, target_modules="attention", bias="all")),
    "lora-bias": ("biased", LoraAdapter(rank=4, target_modules=["q_proj"], bias="lora_only")),
    "head-saved": ("untied", LoraAdapter(rank=4, modules_to_save=["lm_head", "norm"])),
    "tied-head-saved": ("tied", LoraAdapter(rank=4, modules_to_save=["lm_head"])),
    "tied-embedding-saved": ("tied", LoraAdapter(rank=4, modules_to_save=["embed_tokens"])),
    "tied-embedding-lora": ("tied", LoraAdapter(rank=4, target_modules=["embed_tokens", "q_proj"])),
    "gpt2": ("gpt2", LoraAdapter(rank=4, target_modules="all-linear")),
    "gpt2-dora": ("gpt2", LoraAdapter(rank=4, target_modules="attention", use_dora=True)),
    "ia3, whose factors multiply biases": ("biased", Ia3Adapter(method="ia3")),
    "ia3-gpt2": ("gpt2", Ia3Adapter(method="ia3")),
    "ia3-head-saved": ("untied", Ia3Adapter(method="ia3", target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "pissa": ("tied", LoraAdapter(rank=4, init="pissa")),
    "pissa-rslora-patterns": (
        "tied",
        LoraAdapter(rank=4, init="pissa", use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3.0}),
    ),
    "pissa-gpt2": ("gpt2", LoraAdapter(rank=4, init="pissa")),
    "pissa-dora": ("tied", LoraAdapter(rank=4, init="pissa", use_dora=True)),
    "olora": ("tied", LoraAdapter(rank=4, init="olora")),
    "orthogonal": ("tied", LoraAdapter(rank=4, init="orthogonal")),
    "router-saved": ("mixtral", LoraAdapter(rank=4, target_modules=["q_proj"], modules_to_save=["mlp.gate"])),
    "experts-saved": ("mixtral", LoraAdapter(rank=4, target_modules=["q_proj"], modules_to_save=["mlp.experts"])),
}

SELDOM = [
    *("lora-bias", "tied-embedding-saved", "gpt2-dora", "ia3-gpt2", "ia3-head-saved"),
    *("rslora-patterns", "pissa-gpt2", "pissa-dora", "orthogonal"),
]
"""Cases whose parts are those of others."""


@pytest.mark.parametrize("case", variants([case for case in CASES if case not in SELDOM], SELDOM))
def test_adapters_load_in_plain_peft_and_merge_to_the_same_model(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    name, adapter = CASES[case]
    model = trained(bases[name], adapter)
    expected = logits(model)
    save_adapter(model, state(model), tmp_path / "adapter")

    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases[name]), str(tmp_path / "adapter")).eval()
    # fp32 sums in another order; the base of PiSSA and OLoRA is put together again from its parts.
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=2e-4)

    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(plain), rtol=1e-4, atol=2e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == tiny_tokenizer().chat_template
    if "tied" in case:
        # PEFT's own merge cannot say that a tied model no longer is one.
        assert not merged.config.tie_word_embeddings
    else:
        assert merged.config.tie_word_embeddings == (name not in ("untied", "biased", "mixtral"))
        torch.testing.assert_close(logits(plain.merge_and_unload()), logits(merged), rtol=1e-4, atol=2e-4)


@pytest.mark.slow  # often by the code of cards in test_model_card, and in numerics/test_exports
def test_what_is_written_needs_no_raytune(bases: dict[str, Path], tmp_path: Path) -> None:
    model = trained(bases["tied"], LoraAdapter(rank=4, init="pissa"))
    save_adapter(model, state(model), tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    for computed in logits_without_raytune(bases["tied"], tmp_path / "adapter", tmp_path / "merged"):
        torch.testing.assert_close(computed, logits(model), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_an_adapter_of_a_quantised_base_merges_to_what_was_trained(
    quantization: Any, bases: dict[str, Path], tmp_path: Path
) -> None:
    model = trained(bases["untied"], QloraAdapter(method="qlora", rank=4, quantization=quantization))
    # In training mode, because bitsandbytes repacks 4-bit weights for CPU inference.
    expected = logits(model.train())
    save_adapter(model, state(model), tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "exact")
    merge_adapter(tmp_path / "adapter", tmp_path / "original", dequantise=False)
    exact = (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "exact")) - expected).abs().max()
    original = (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "original")) - expected).abs().max()
    # int8 also rounds activations, which no weight can hold.
    assert exact < (0.3 * original if quantization == "int8" else 2e-4)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases["untied"]), str(tmp_path / "adapter"))
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "original")),
        logits(plain.merge_and_unload()),
        rtol=1e-4,
        atol=2e-4,
    )


def test_a_quantised_gpt2_merges_to_what_was_trained(bases: dict[str, Path], tmp_path: Path) -> None:
    model = trained(bases["gpt2"], QloraAdapter(method="qlora", rank=4)).train()
    for module in model.modules():  # in training mode without dropout
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for block in model.base_model.model.transformer.h:
        block.attn.config.attn_pdrop = block.attn.attn_dropout.p = 0.0
    expected = logits(model)
    save_adapter(model, state(model), tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=2e-4)


def test_an_adapter_names_its_base_and_holds_nothing_else(bases: dict[str, Path], tmp_path: Path) -> None:
    model = trained(bases["tied"], LoraAdapter(rank=4))
    save_adapter(model, state(model), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(bases["tied"])
    assert config["inference_mode"] is True
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert all(".lora_A.weight" in name or ".lora_B.weight" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


def test_a_merged_model_is_sharded_and_has_the_dtype_asked_for(bases: dict[str, Path], tmp_path: Path) -> None:
    model = trained(bases["untied"], LoraAdapter(rank=4))
    save_adapter(model, state(model), tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", dtype="bf16", max_shard_bytes=20_000)
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 25_000 for file in files)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
    torch.testing.assert_close(logits(merged), logits(model), rtol=0.1, atol=0.1)  # weights rounded to 8 bits


def test_a_damaged_missing_or_foreign_adapter_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no adapter_config\.json"):
        merge_adapter(tmp_path, tmp_path / "out")
    model = trained(bases["untied"], LoraAdapter(rank=4))
    save_adapter(model, state(model), tmp_path / "adapter")
    with pytest.raises(ModelError, match="cannot be put on this base"):
        merge_adapter(tmp_path / "adapter", tmp_path / "out", base=str(bases["gpt2"]))
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="damaged"):
        merge_adapter(tmp_path / "adapter", tmp_path / "out")
    weights.unlink()
    with pytest.raises(ModelError, match=r"holds no adapter_model\.safetensors"):
        merge_adapter(tmp_path / "adapter", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_a_damaged_base_leaves_no_half_merged_model(bases: dict[str, Path], tmp_path: Path) -> None:
    model = trained(bases["untied"], LoraAdapter(rank=4))
    save_adapter(model, state(model), tmp_path / "adapter")
    shutil.copytree(bases["untied"], tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"model\.safetensors .*cut off"):
        merge_adapter(tmp_path / "adapter", tmp_path / "out", base=str(tmp_path / "base"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_base_that_lacks_a_tensor_is_not_merged_into(bases: dict[str, Path], tmp_path: Path) -> None:
    model = trained(bases["untied"], LoraAdapter(rank=4))
    save_adapter(model, state(model), tmp_path / "adapter")
    shutil.copytree(bases["untied"], tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    del tensors["model.layers.0.input_layernorm.weight"]  # which no adapter changes
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lack model\.layers\.0\.input_layernorm\.weight"):
        merge_adapter(tmp_path / "adapter", tmp_path / "out", base=str(tmp_path / "base"))


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_tokens_are_merged_where_a_base_calls_its_head_by_another_name(tied: bool, tmp_path: Path) -> None:
    """GPT-NeoX's files call `lm_head` `embed_out`; its rows were left out in silence."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    model: Any = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=300, tie_word_embeddings=tied, **sizes))
    base, adapter, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    model.save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    rows: Any = {"embed_in": [3, 7]} if tied else {"embed_in": [3, 7], "lm_head": [3, 7]}
    adapted = get_peft_model(model, LoraConfig(target_modules=["dense"], trainable_token_indices=rows, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "trainable_tokens" in name:
                parameter.add_(1.0)
    adapted.save_pretrained(str(adapter))
    merge_adapter(adapter, merged, base=str(base))
    whole, ids = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval(), torch.tensor([[3, 5, 7]])
    with torch.no_grad():
        torch.testing.assert_close(whole(ids).logits, adapted.eval()(ids).logits, rtol=0, atol=1e-5)


def test_an_adapter_is_not_merged_into_another_base_than_it_was_trained_on(bases: dict[str, Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(bases["untied"], tmp_path / "base"))
    model = trained(base, LoraAdapter(rank=4))
    save_adapter(model, state(model), tmp_path / "adapter")
    save_content(base_content(str(base), None), tmp_path / "adapter")
    moved = base.rename(tmp_path / "moved")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=str(moved))
    save_tiny_model(base, seed=1, tied=False)
    with pytest.raises(ModelError, match=r"(?s)another base than .*  model\.safetensors: [0-9a-f]+ -> .*--any-base"):
        merge_adapter(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge_adapter(tmp_path / "adapter", tmp_path / "out", any_base=True)


def test_a_full_output_folder_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="already holds files"):
        merge_adapter(tmp_path, tmp_path)


@pytest.mark.parametrize("name", ["tied", "untied", "gpt2"])
def test_a_whole_model_loads_as_it_was_trained(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    model = trained(bases[name], FullAdapter(method="full"))
    save_model(model, iter(state(model).items()), tmp_path, max_shard_bytes=20_000)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.use_cache
    assert loaded.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    assert (tmp_path / "generation_config.json").is_file()


def test_fused_experts_are_written_as_their_author_published_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(vocab_size=259, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
                           num_key_value_heads=2, num_local_experts=4)  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    model = trained(tmp_path / "base", FullAdapter(method="full"))
    save_model(model, iter(state(model).items()), tmp_path / "out")
    published = load_file(tmp_path / "base" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items()} == {
        name: tensor.shape for name, tensor in published.items()
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # Equal weights; experts run one after the other, or together.
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)
