"""Adapters that cannot be started, trained, saved or loaded are refused in the plan; each refusal is held against the fact."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from raytune.config.sections.adapter import LoraAdapter, QloraAdapter
from raytune.errors import ModelError, UserError
from raytune.model.adapters import add_adapter
from raytune.model.adapters.lora import initialise_eva
from raytune.model.files.export import save_adapter
from raytune.model.load import load_model
from raytune.plan.choosing.setting import settle
from raytune.plan.model.base_model import read_model_shape
from tests.tiny import save_tiny_model, tiny_model, tiny_plan, tiny_tokenizer
from tests.unit.plan_cases import CPU, config, gpus, planned
from tests.variants import variants

IDS = torch.randint(3, 60, (4, 60), generator=torch.Generator().manual_seed(3))
MIXED = ["q_proj", "embed_tokens"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Wide enough for bitsandbytes, whose blocks have 64 weights. Keys have half the outputs of queries."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("bases")
    wide: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2}
    GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=64, n_layer=1, n_head=4, n_positions=64)).save_pretrained(root / "gpt2")
    tiny_tokenizer().save_pretrained(root / "gpt2")
    return {
        "untied": save_tiny_model(root / "untied", tied=False, **wide),
        "tied": save_tiny_model(root / "tied", **wide),
        "biased": save_tiny_model(root / "biased", tied=False, attention_bias=True, **wide),
        "gpt2": root / "gpt2",
    }


def works(base: Path, adapter: dict[str, Any], folder: Path) -> bool:
    """Whether an adapter trains, is saved, and computes the same when plain PEFT has loaded it (not asked of quantised bases)."""
    section = QloraAdapter(**adapter) if adapter.get("method") == "qlora" else LoraAdapter(**adapter)
    try:
        plan = tiny_plan(model={"path": str(base)}, adapter=section.model_dump())
        model: Any = load_model(plan.model, plan.adapter, device=torch.device("cpu"), seed=0)
        if section.init == "eva":
            initialise_eva(model, [{"input_ids": IDS}])
        optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=0.02)
        for _ in range(2):  # bitsandbytes' int8 weights lose their scales after the first pass
            model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
            optimizer.step()
        model.eval()
        save_adapter(
            model, {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}, folder
        )
        if isinstance(section, QloraAdapter):
            return True
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)).eval()
        with torch.inference_mode():
            return torch.allclose(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits, atol=1e-4)
    except (AttributeError, RuntimeError, ValueError, ModelError):
        return False


def refusal(base: Path, adapter: dict[str, Any]) -> str:
    """What the plan says against an adapter; nothing if it takes it."""
    asked = config(adapter={"method": "lora"} | adapter, model={"base": str(base)})
    try:
        settle(asked, read_model_shape(str(base)), CPU)
    except UserError as error:
        return str(error)
    return ""


FAILING: dict[str, tuple[str, dict[str, Any], str]] = {
    "pissa, rank above the outputs of keys": ("untied", {"init": "pissa", "rank": 33}, r"at most 32 directions in .*k_proj"),
    "olora, rank above the outputs of keys": ("untied", {"init": "olora", "rank": 33}, "Lower adapter.rank to 32"),
    "pissa, pattern above the width": ("untied", {"init": "pissa", "rank": 8, "rank_pattern": {"q_proj": 65}}, "its rank is 65"),
    "pissa, rank above the width of gpt2": ("gpt2", {"init": "pissa", "rank": 65}, "at most 64 directions in .*c_attn"),
    "pissa of an embedding": (
        "untied",
        {"init": "pissa", "rank": 4, "target_modules": MIXED},
        "the embedding model.embed_tokens",
    ),
    "olora of an embedding": ("tied", {"init": "olora", "rank": 4, "target_modules": ["embed_tokens"]}, "could not be loaded"),
    "pissa of a tied head": ("tied", {"init": "pissa", "rank": 4, "target_modules": ["q_proj", "lm_head"]}, "embedding's too"),
    "olora of a tied head": ("tied", {"init": "olora", "rank": 4, "target_modules": ["lm_head"]}, "embedding's too"),
    "olora of transposed layers": ("gpt2", {"init": "olora", "rank": 4}, "transposed layers"),
    "eva, rank above the width": ("untied", {"init": "eva", "rank": 65}, "adapter.rank is 65. Lower it to 64"),
    "odd orthogonal ranks": ("untied", {"init": "orthogonal", "rank": 3}, "needs even ranks"),
    "dora in int8": ("untied", {"method": "qlora", "quantization": "int8", "use_dora": True}, "does not give in int8"),
    "orthogonal in int8": ("untied", {"method": "qlora", "quantization": "int8", "init": "orthogonal"}, "quantization to nf4"),
    "orthogonal in uint8": (
        "untied",
        {"method": "qlora", "quantization": "nf4", "quant_storage": "uint8", "init": "orthogonal"},
        "quant_storage to auto",
    ),
    "pissa in 4 bits": ("untied", {"method": "qlora", "init": "pissa"}, "a quantised base cannot give exactly"),
    "misspelt exclusion": ("untied", {"exclude_modules": ["k_porj"]}, "exclude_modules names 'k_porj'"),
    "misspelt pattern": ("untied", {"rank_pattern": {"k_porj": 4}}, "rank_pattern: 'k_porj' matches no module"),
    "pattern that is no expression": ("untied", {"alpha_pattern": {"k_proj(": 4.0}}, "not a regular expression"),
}

WORKING: dict[str, tuple[str, dict[str, Any]]] = {
    "pissa, rank of the narrowest layer": ("untied", {"init": "pissa", "rank": 32}),
    "olora, rank of the narrowest layer": ("untied", {"init": "olora", "rank": 32}),
    "pissa, high rank where it fits": ("untied", {"init": "pissa", "rank": 64, "rank_pattern": {"k_proj|v_proj": 32}}),
    "pissa, high rank of queries alone": ("untied", {"init": "pissa", "rank": 64, "target_modules": ["q_proj"]}),
    "pissa of an untied head": ("untied", {"init": "pissa", "rank": 4, "target_modules": ["q_proj", "lm_head"]}),
    "pissa with dora": ("untied", {"init": "pissa", "rank": 4, "use_dora": True}),
    "pissa of transposed layers": ("gpt2", {"init": "pissa", "rank": 4}),
    "default of an embedding above its width": ("tied", {"rank": 65, "target_modules": MIXED}),
    "default of a tied head": ("tied", {"rank": 4, "target_modules": ["q_proj", "lm_head"]}),
    "eva at the width": ("untied", {"init": "eva", "rank": 64}),
    "eva with an embedding": ("untied", {"init": "eva", "rank": 4, "target_modules": MIXED}),
    "eva with a pattern that changes nothing": ("untied", {"init": "eva", "rank": 4, "rank_pattern": {"q_proj": 4}}),
    "eva of transposed layers": ("gpt2", {"init": "eva", "rank": 4}),
    "orthogonal of transposed layers": ("gpt2", {"init": "orthogonal", "rank": 4}),
    "dora in 4 bits": ("untied", {"method": "qlora", "use_dora": True}),
    "orthogonal in 4 bits": ("untied", {"method": "qlora", "init": "orthogonal"}),
    "eva in int8": ("untied", {"method": "qlora", "quantization": "int8", "init": "eva", "rank": 4}),
    "dora of an embedding beside int8": (
        "untied",
        {"method": "qlora", "quantization": "int8", "use_dora": True, "target_modules": ["embed_tokens"]},
    ),
    "orthogonal of a head beside int8": (
        "untied",
        {"method": "qlora", "quantization": "int8", "init": "orthogonal", "target_modules": ["lm_head"]},
    ),
    "trained biases": ("biased", {"rank": 4, "bias": "all"}),
    "trained biases of targets": ("biased", {"rank": 4, "bias": "lora_only", "target_modules": "attention"}),
    "an excluded head": ("untied", {"rank": 4, "exclude_modules": ["lm_head", "self_attn"]}),
}


@pytest.mark.parametrize("case", FAILING)
def test_what_fails_is_refused_in_the_plan(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base, adapter, message = FAILING[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not works(bases[base], adapter, tmp_path)
    refused = refusal(bases[base], adapter)
    assert re.search(message, refused), refused
    assert "adapter." in refused


@pytest.mark.parametrize("case", variants([*WORKING][::2], [*WORKING][1::2]))
def test_what_works_is_not_refused(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base, adapter = WORKING[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert works(bases[base], adapter, tmp_path)
    assert refusal(bases[base], adapter) == ""


def test_eva_does_not_keep_to_a_rank_pattern(bases: dict[str, Path]) -> None:
    adapter = {"init": "eva", "rank": 8, "rank_pattern": {"k_proj": 4}}
    model: Any = add_adapter(AutoModelForCausalLM.from_pretrained(bases["untied"]), LoraAdapter(**adapter), revision=None, seed=0)
    initialise_eva(model, [{"input_ids": IDS}])
    ranks = {name: value.shape[0] for name, value in model.named_parameters() if ".lora_A." in name}
    assert ranks != {name: 4 if "k_proj" in name else 8 for name in ranks}
    assert "hands out the ranks of all layers anew" in refusal(bases["untied"], adapter)


def test_eva_with_fewer_tokens_than_ranks_stops(bases: dict[str, Path]) -> None:
    model: Any = add_adapter(tiny_model(), LoraAdapter(init="eva", rank=16), revision=None, seed=0)
    with pytest.raises(ModelError, match=r"16 directions .*at most 10\. Lower adapter\.rank"):
        initialise_eva(model, [{"input_ids": IDS[:1, :10]}, {"input_ids": IDS[:1, :4]}])


@pytest.mark.parametrize(
    ("base", "adapter", "message"),
    [
        ("untied", {"bias": "all"}, "adapter.bias is all, but this llama model has no biases.*Set adapter.bias to none"),
        ("untied", {"bias": "lora_only"}, "has no biases"),
        ("biased", {"bias": "lora_only", "target_modules": "mlp"}, "none of the layers with an update has a bias.* or to all"),
        ("untied", {"init": "eva", "target_modules": ["embed_tokens"]}, "only embeddings get an update"),
    ],
)
def test_settings_without_any_effect_are_refused(
    base: str, adapter: dict[str, Any], message: str, bases: dict[str, Path]
) -> None:
    assert re.search(message, refusal(bases[base], adapter))


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 4}}, "adapter.rank_pattern 'v_proj' is not read"),
        ({"exclude_modules": ["lm_head", "k_proj"]}, "adapter.exclude_modules 'lm_head' is not read"),
        ({"lora_plus_ratio": 4.0, "lora_plus_embedding_rate": 1e-4}, "adapter.lora_plus_embedding_rate is not read"),
        ({"target_modules": ["embed_tokens"], "dropout": 0.1}, "updates of embeddings have no dropout"),
        ({"target_modules": MIXED, "init": "eva"}, "adapter.init is eva, but model.embed_tokens starts as by default"),
    ],
)
def test_settings_that_the_targets_do_not_read_are_said(adapter: dict[str, Any], words: str) -> None:
    assert any(words in reason for reason in planned(adapter={"method": "lora"} | adapter).reasons)


def test_dora_of_quantised_weights_stays_below_stage_3() -> None:
    dora = {"method": "qlora", "use_dora": True}
    stage_3 = {"zero": {"stage": 3}}
    with pytest.raises(UserError, match=r"stage is 3.*adapter\.use_dora is true.*at most stage 2"):
        planned(gpus(2), adapter=dora, training=stage_3)
    assert planned(gpus(2), adapter=dora | {"target_modules": ["embed_tokens"]}, training=stage_3).engine.zero_stage == 3
    assert planned(gpus(2), adapter={"method": "lora", "use_dora": True}, training=stage_3).engine.zero_stage == 3
    assert planned(gpus(2), adapter={"method": "qlora"}, training=stage_3).engine.zero_stage == 3
