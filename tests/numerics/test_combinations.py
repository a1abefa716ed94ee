"""Several adapters made into one, or laid into their base: held against plain PEFT's `add_weighted_adapter`."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from raytune.config.sections.adapter import QloraAdapter
from raytune.errors import ModelError, UserError
from raytune.model.files.base_content import base_content, save_content
from raytune.model.files.export import save_adapter
from raytune.model.load import load_model
from raytune.model.merging.combine import merge_adapters
from raytune.model.merging.merge import merge_adapter
from raytune.plan.saved.combination import Combination, asked_combination
from tests.tiny import save_tiny_model, tiny_plan, tiny_tokenizer

ONE_ULP_OF_SUMS = 1e-6
"""Sums of a few products of fp32, in another order."""


def saved_adapter(base: Path, folder: Path, seed: int, **config: Any) -> Path:
    """By plain PEFT, with factors that are not zero."""
    torch.manual_seed(seed)
    peft_model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **config))
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    peft_model.save_pretrained(str(folder), save_embedding_layers="embed_tokens" in config["target_modules"])
    return folder


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("combinations")
    base = save_tiny_model(root / "base", tied=False)
    torch.manual_seed(0)
    gpt2 = root / "gpt2"  # whose layers hold their weights the other way round
    GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=64)).save_pretrained(gpt2)
    tiny_tokenizer().save_pretrained(gpt2)
    return {
        "base": base,
        "gpt2": gpt2,
        "one": saved_adapter(base, root / "one", 1, r=4, target_modules=["q_proj", "down_proj"]),
        "two": saved_adapter(base, root / "two", 2, r=4, lora_alpha=3, target_modules=["q_proj", "v_proj"]),
        "three": saved_adapter(base, root / "three", 3, r=2, target_modules=["up_proj", "q_proj"]),
        "rows": saved_adapter(base, root / "rows", 4, r=3, target_modules=["embed_tokens", "q_proj"]),
        "rslora": saved_adapter(base, root / "rslora", 5, r=4, use_rslora=True, target_modules=["q_proj"]),
        "first layer": saved_adapter(
            base, root / "first", 6, r=4, target_modules=["q_proj"], layers_to_transform=[0], rank_pattern={"q_proj": 2}
        ),
        "gpt2 one": saved_adapter(gpt2, root / "gpt2 one", 7, r=4, target_modules=["c_attn"], fan_in_fan_out=True),
        "gpt2 two": saved_adapter(gpt2, root / "gpt2 two", 8, r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
    }


def by_plain_peft(base: Path, adapters: list[Path], asked: Combination) -> dict[str, torch.Tensor]:
    model: Any = None
    for number, folder in enumerate(adapters):
        if model is None:
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder), adapter_name="0")
        else:
            model.load_adapter(str(folder), adapter_name=str(number))
    names = [str(number) for number in range(len(adapters))]
    torch.manual_seed(asked.seed or 0)
    model.add_weighted_adapter(
        names,
        [*asked.weights],
        "all",
        asked.kind,
        svd_rank=asked.rank,
        density=asked.density,
        majority_sign_method=asked.majority_sign,
    )
    model.set_adapter("all")
    return model.merge_and_unload().state_dict()


CASES: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "exact sum, of different ranks and targets": (
        "base",
        ["one", "two", "three"],
        {"kind": "cat", "weights": (0.7, 0.3, -0.4)},
    ),
    "rows of an embedding": ("base", ["rows", "one"], {"kind": "cat", "weights": (0.5, 1.0)}),
    "linear": ("base", ["one", "two"], {"kind": "linear", "weights": (0.7, -0.3)}),
    "svd": ("base", ["one", "three"], {"kind": "svd", "weights": (0.7, 0.3), "rank": 3}),
    "ties": ("base", ["one", "two"], {"kind": "ties", "weights": (0.7, 0.3), "density": 0.5}),
    "ties by most signs": (
        "base",
        ["one", "two"],
        {"kind": "ties", "weights": (1.0, 1.0), "density": 0.5, "majority_sign": "frequency"},
    ),
    "ties of updates": ("base", ["one", "two", "three"], {"kind": "ties_svd", "weights": (1.0, 1.0, 0.5), "density": 0.4}),
    "dare": ("base", ["one", "two"], {"kind": "dare_linear", "weights": (0.7, 0.3), "density": 0.5, "seed": 7}),
    "dare and ties": ("base", ["one", "two"], {"kind": "dare_ties", "weights": (0.7, 0.3), "density": 0.5, "seed": 8}),
    "dare of updates": ("base", ["one", "three"], {"kind": "dare_linear_svd", "weights": (1.0, 1.0), "density": 0.5, "seed": 9}),
    "pruned": ("base", ["one", "two"], {"kind": "magnitude_prune", "weights": (0.7, 0.3), "density": 0.3}),
    "GPT-2": ("gpt2", ["gpt2 one", "gpt2 two"], {"kind": "ties", "weights": (0.7, 0.3), "density": 0.5}),
    "GPT-2's updates": ("gpt2", ["gpt2 one", "gpt2 two"], {"kind": "svd", "weights": (0.7, 0.3)}),
}


@pytest.mark.parametrize("case", CASES)
def test_several_adapters_make_what_plain_peft_makes_of_them(case: str, material: dict[str, Path], tmp_path: Path) -> None:
    base, names, asked = CASES[case]
    adapters, combination = [material[name] for name in names], Combination(**asked)
    expected = by_plain_peft(material[base], adapters, combination)
    merge_adapters(adapters, tmp_path / "merged", combination)
    merge_adapters(adapters, tmp_path / "adapter", combination, as_adapter=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(material[base]), str(tmp_path / "adapter"))
    for found in (merged, alone.merge_and_unload().state_dict()):
        assert max((found[name] - value).abs().max().item() for name, value in expected.items()) <= ONE_ULP_OF_SUMS
    assert json.loads((tmp_path / "merged" / "combination.json").read_text())["kind"] == combination.kind
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == tiny_tokenizer().chat_template


def updates_of(base: Path, folder: Path, weight: float) -> dict[str, torch.Tensor]:
    """What an adapter alone adds to each weight, by plain PEFT, times a weight."""
    model = AutoModelForCausalLM.from_pretrained(base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    after = PeftModel.from_pretrained(model, str(folder)).merge_and_unload().state_dict()
    return {name: weight * (after[name] - value) for name, value in before.items()}


@pytest.mark.parametrize("names", [("rslora", "three"), ("first layer", "one"), ("one", "first layer")])
def test_cat_is_the_weighted_sum_of_updates_also_where_peft_alone_is_wrong(
    names: tuple[str, str], material: dict[str, Path], tmp_path: Path
) -> None:
    """PEFT 0.21 scales the result of rsLoRA again, and takes over in which layers the first adapter is."""
    base, adapters = material["base"], [material[name] for name in names]
    merge_adapters(adapters, tmp_path / "merged", Combination(weights=(0.7, 0.3)))
    parts = [updates_of(base, folder, weight) for folder, weight in zip(adapters, (0.7, 0.3), strict=True)]
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    for name, value in before.items():
        assert (after[name] - value - parts[0][name] - parts[1][name]).abs().max() <= ONE_ULP_OF_SUMS


def test_a_layer_with_a_smaller_rank_than_others_loads_in_plain_peft(material: dict[str, Path], tmp_path: Path) -> None:
    base = material["base"]
    adapters = [
        saved_adapter(base, tmp_path / str(seed), seed, r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2})
        for seed in (1, 2)
    ]
    asked = Combination(kind="linear", weights=(0.5, 0.5))
    expected = by_plain_peft(base, adapters, asked)
    merge_adapters(adapters, tmp_path / "adapter", asked, as_adapter=True)
    alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapter"))
    found = alone.merge_and_unload().state_dict()
    assert max((found[name] - value).abs().max().item() for name, value in expected.items()) <= ONE_ULP_OF_SUMS


@pytest.mark.slow
def test_what_is_combined_computes_in_a_process_without_raytune(material: dict[str, Path], tmp_path: Path) -> None:
    asked = Combination(kind="ties", weights=(0.7, 0.3), density=0.5)
    adapters = [material["one"], material["two"]]
    merge_adapters(adapters, tmp_path / "merged", asked)
    merge_adapters(adapters, tmp_path / "adapter", asked, as_adapter=True)
    code = f"""
import sys, torch
sys.modules["raytune"] = None
from peft import PeftModel
from transformers import AutoModelForCausalLM
ids = torch.arange(3, 40)[None]
merged = AutoModelForCausalLM.from_pretrained({str(tmp_path / "merged")!r})
alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({str(material["base"])!r}), {str(tmp_path / "adapter")!r})
with torch.inference_mode():
    print((merged(ids).logits - alone(ids).logits).abs().max().item())
"""
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert float(told.stdout) <= 1e-5, "sums in another order through two layers"


def test_adapters_over_a_quantised_base_are_laid_into_what_training_saw(material: dict[str, Path], tmp_path: Path) -> None:
    qlora = QloraAdapter(method="qlora", rank=4, target_modules=["q_proj"])
    plan = tiny_plan(model={"path": str(material["base"])}, adapter=qlora.model_dump())
    model: Any = load_model(plan.model, plan.adapter, device=torch.device("cpu"), seed=0)
    trained = {name: torch.randn_like(value) * 0.05 for name, value in model.named_parameters() if value.requires_grad}
    save_adapter(model, trained, tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    merge_adapter(tmp_path / "one", tmp_path / "alone")
    both = [tmp_path / "one", tmp_path / "two"]
    merge_adapters(both, tmp_path / "both", Combination(weights=(0.6, 0.4)))
    alone, together, base = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "alone", tmp_path / "both", material["base"])
    )
    name = "model.layers.0.mlp.up_proj.weight"  # has no update
    assert not alone[name].equal(base[name])
    assert max((together[name] - value).abs().max() for name, value in alone.items()) <= ONE_ULP_OF_SUMS
    merge_adapters([*both, material["one"]], tmp_path / "plain", Combination(weights=(1.0, 1.0, 0.0)), dequantise=False)
    assert load_file(tmp_path / "plain" / "model.safetensors")[name].equal(base[name])
    with pytest.raises(ModelError, match=r"quantised differently .*--original-base"):
        merge_adapters([*both, material["one"]], tmp_path / "no", Combination(weights=(1.0, 1.0, 1.0)))


def test_adapters_that_do_not_go_together_are_refused_in_words(material: dict[str, Path], tmp_path: Path) -> None:
    base, one = material["base"], material["one"]

    def refused(adapters: list[Path], match: str, asked: Combination = Combination(weights=(1.0, 1.0)), **how: Any) -> None:  # noqa: B008
        with pytest.raises(ModelError, match=match):
            merge_adapters(adapters, tmp_path / "out", asked, **how)
        assert not (tmp_path / "out").exists()
        assert not [*tmp_path.glob("out.*")]

    linear = Combination(kind="linear", weights=(1.0, 1.0))
    refused([one, material["three"]], "adds factors .* of one rank; that of .*q_proj is 4 in .*, 2 in .*Take cat", linear)
    refused([one, material["gpt2 one"]], "name different bases")
    refused([one, material["gpt2 one"]], "cannot be put on this base|does not fit", base=str(base))
    for name, config in {
        "DoRA": {"use_dora": True},
        "whole modules .lm_head": {"modules_to_save": ["lm_head"]},
        "biases": {"bias": "all"},
        "rows of tokens": {"trainable_token_indices": {"embed_tokens": [5]}},
    }.items():
        other = saved_adapter(base, tmp_path / name, 9, **({"r": 4, "target_modules": ["q_proj"]} | config))
        refused([one, other], f"{name}.*Merge .* alone, or leave it out")


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_whose_start_was_taken_out_of_the_base_is_not_laid_into_the_base_as_it_is(
    start: str, material: dict[str, Path], tmp_path: Path
) -> None:
    """PEFT takes it out again when it loads the adapter; laid over the whole base, it would compute something else."""
    config = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": start}
    other = saved_adapter(material["base"], tmp_path / start, 9, **config)
    for adapters in ([other], [material["one"], other]):
        with pytest.raises(ModelError, match=f"init_lora_weights: '{start}', a start that takes a part out of the base"):
            merge_adapters(adapters, tmp_path / "out", Combination(weights=(1.0,) * len(adapters)))


def test_adapters_that_start_from_data_are_merged_and_combined(material: dict[str, Path], tmp_path: Path) -> None:
    """EVA decides where factors start, and leaves the base alone."""
    config = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "eva", "eva_config": EvaConfig()}
    eva = saved_adapter(material["base"], tmp_path / "eva", 9, **config)
    asked = Combination(weights=(0.7, 0.3))
    merge_adapters([material["one"], eva], tmp_path / "both", asked)
    wanted, made = by_plain_peft(material["base"], [material["one"], eva], asked), load_file(tmp_path / "both/model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(made[name], wanted[name], atol=ONE_ULP_OF_SUMS, rtol=0)


def test_biases_of_an_adapters_own_are_refused_in_words(material: dict[str, Path], tmp_path: Path) -> None:
    other = shutil.copytree(material["one"], tmp_path / "biases")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"lora_bias": True}))
    with pytest.raises(ModelError, match=r"has biases of its own \(lora_bias\), which are not merged here"):
        merge_adapter(other, tmp_path / "out")


def test_adapters_of_bases_with_other_weights_are_refused_by_their_content(material: dict[str, Path], tmp_path: Path) -> None:
    bases = [save_tiny_model(tmp_path / f"base {seed}", seed=seed, tied=False) for seed in (0, 1)]
    adapters = [
        saved_adapter(base, tmp_path / f"adapter {number}", number, r=4, target_modules=["q_proj"])
        for number, base in enumerate(bases)
    ]
    for base, folder in zip(bases, adapters, strict=True):
        save_content(base_content(str(base), None), folder)
    with pytest.raises(ModelError, match=r"different bases:\n  model.safetensors: "):
        merge_adapters(adapters, tmp_path / "out", Combination(weights=(1.0, 1.0)))
    merge_adapters(adapters, tmp_path / "out", Combination(weights=(1.0, 1.0)), base=str(bases[0]), any_base=True)
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"kind": "slerp"}, "expected one of cat, linear"),
        ({"weights": [1.0]}, "--weights has 1 numbers for 2 adapters"),
        ({"weights": [float("nan"), 1.0]}, "must be finite"),
        ({"kind": "ties"}, "--density 0.5"),
        ({"density": 0.5}, "drops nothing"),
        ({"kind": "ties", "density": 1.5}, "at most 1"),
        ({"kind": "dare_ties", "density": 0.5}, "--seed 0"),
        ({"seed": 1}, "leaves nothing to chance"),
        ({"rank": 4}, "only the kinds that end in svd"),
        ({"majority_sign": "total"}, "for TIES only"),
    ],
)
def test_what_a_combination_lacks_or_does_not_take_is_said(asked: dict[str, Any], words: str) -> None:
    said: dict[str, Any] = {"kind": "cat"} | dict.fromkeys(("weights", "density", "seed", "rank", "majority_sign")) | asked
    with pytest.raises(UserError, match=words):
        asked_combination(2, **said)
