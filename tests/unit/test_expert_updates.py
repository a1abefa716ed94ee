"""Adapters of fused experts: what is saved loads in plain PEFT, merges, and leaves its base as it was."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PretrainedConfig

from raytune.config.sections.adapter import LoraAdapter
from raytune.model.adapters import add_adapter
from raytune.model.files.export import save_adapter
from raytune.model.kept_base import KeptBase
from raytune.model.load import load_model
from raytune.model.merging.merge import merge_adapter
from tests.tiny import tiny_plan, tiny_tokenizer
from tests.unit.test_model_export import CPU, logits, logits_without_raytune, state, trained
from tests.variants import variants

SMALL: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FUSED: dict[str, PretrainedConfig] = {
    "mixtral": transformers.MixtralConfig(**SMALL, num_local_experts=4),
    "qwen3_moe": transformers.Qwen3MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8),
    "qwen2_moe, with a shared expert": transformers.Qwen2MoeConfig(
        **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=20
    ),
    "gpt_oss, the other way round": transformers.GptOssConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, head_dim=8),
    "granitemoe": transformers.GraniteMoeConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    "phimoe": transformers.PhimoeConfig(**SMALL, num_local_experts=4),
}
ADAPTERS = {
    "group": LoraAdapter(rank=3, alpha=8.0),
    "router and one matrix": LoraAdapter(
        rank=3, target_modules=["q_proj"], target_parameters=["experts.down_proj", "gate.weight", "1.mlp.experts.gate_up_proj"]
    ),
    "ranks by pattern": LoraAdapter(
        rank=3, target_modules="mlp", use_rslora=True, rank_pattern={"experts.down_proj": 2}, alpha_pattern={"down_proj": 3.0}
    ),
}
CASES = variants(
    [("gpt_oss, the other way round", "group")],
    [
        ("qwen3_moe", "router and one matrix"),
        ("mixtral", "group"),
        ("qwen2_moe, with a shared expert", "group"),
        ("granitemoe", "group"),
        ("phimoe", "group"),
        ("qwen3_moe", "ranks by pattern"),
    ],
)


def saved_base(family: str, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FUSED[family]).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def logits_here(base: Path, adapter: Path, merged: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of an adapter on its base, and of a merged model, by PEFT and transformers alone."""
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    return logits(adapted.eval()), logits(AutoModelForCausalLM.from_pretrained(merged))


@pytest.mark.parametrize(("family", "name"), CASES)
def test_plain_peft_and_the_merged_model_compute_what_was_trained(
    family: str, name: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """With `--slow` in a process without raytune; often the code of cards runs in one, in test_model_card."""
    base = saved_base(family, tmp_path / "base")
    model = trained(base, ADAPTERS[name])
    save_adapter(model, state(model), tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=str(base))
    computed = logits_without_raytune if pytestconfig.getoption("--slow") else logits_here
    adapted, merged = computed(base, tmp_path / "adapter", tmp_path / "merged")
    plain = logits(AutoModelForCausalLM.from_pretrained(base))
    assert (logits(model) - plain).abs().max() > 0.1
    # fp32 roundings of an update beside the weights and in them; what it does is a thousand times as large.
    torch.testing.assert_close(adapted, logits(model), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged, logits(model), rtol=1e-4, atol=1e-4)
    files = [load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged")]
    assert files[0].keys() == files[1].keys()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss, the other way round"])
def test_merging_agrees_with_peft_weight_by_weight(family: str, tmp_path: Path) -> None:
    base = saved_base(family, tmp_path / "base")
    model = trained(base, LoraAdapter(rank=3))
    save_adapter(model, state(model), tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=str(base))
    theirs: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    theirs.merge_and_unload().save_pretrained(tmp_path / "theirs")
    ours, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "theirs"))
    assert ours.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-6, msg=key)  # fp32 products, summed over the rank


def test_an_adapter_starts_as_in_plain_peft(tmp_path: Path) -> None:
    base = saved_base("qwen3_moe", tmp_path)
    ours = add_adapter(AutoModelForCausalLM.from_pretrained(base), LoraAdapter(rank=3), revision=None, seed=5)
    torch.manual_seed(5)
    config: Any = {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    }
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=3, lora_alpha=32, **config))
    assert state(ours).keys() == state(theirs).keys()
    assert all(value.equal(state(theirs)[name]) for name, value in state(ours).items())


def test_a_base_is_kept_from_one_adapter_of_experts_to_the_next(tmp_path: Path) -> None:
    base = saved_base("qwen3_moe", tmp_path)
    plan = tiny_plan(model={"path": str(base)}).model
    before = logits(AutoModelForCausalLM.from_pretrained(base))
    kept = KeptBase()
    first: Any = load_model(plan, LoraAdapter(rank=3), device=CPU, seed=0, kept=kept)
    for name, value in first.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value)
    assert not torch.allclose(logits(first.eval()), before)
    second: Any = load_model(plan, LoraAdapter(rank=2), device=CPU, seed=0, kept=kept)
    assert second.get_input_embeddings() is first.get_input_embeddings()
    assert logits(second.eval()).equal(before), "the new update starts at nothing"
