"""Models that are asked in turn: each computes what it does alone, whatever lay over its base before."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from raytune.config.sections.model import Quantization
from raytune.errors import ModelError
from raytune.model.files.saved_adapter import refuse_unfit_adapter
from raytune.model.inference import MOST_ADAPTERS, HeldModels
from raytune.plan.saved.asked_model import AskedModel, plain_model
from tests.tiny import save_tiny_model, tiny_model

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8, 9]])
LORA = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}
ADAPTERS: dict[str, Any] = {
    "lora": LoraConfig(r=2, **LORA),
    "another": LoraConfig(r=4, lora_alpha=64, **{**LORA, "target_modules": ["v_proj"]}),
    "pissa": LoraConfig(r=2, init_lora_weights="pissa", **LORA),
    "biases": LoraConfig(r=2, bias="all", **LORA),
    "head": LoraConfig(r=2, modules_to_save=["lm_head"], **LORA),
    "ia3": IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}
SHAPE = {"attention_bias": True, "tied": False}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_tiny_model(folder / "base", **SHAPE)
    save_tiny_model(folder / "wider", hidden_size=64)
    for number, (name, config) in enumerate(ADAPTERS.items()):
        torch.manual_seed(number)
        model = get_peft_model(tiny_model(**SHAPE), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.5)
        model.save_pretrained(folder / name)
    return folder


def asked(saved: Path, name: str, base: str = "base") -> AskedModel:
    model = plain_model(str(saved / base), "fp32")
    return AskedModel(name=name, model=model, adapter=None if name == "base" else str(saved / name))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits[:, -IDS.shape[1] :]


@cache
def alone(saved: Path, name: str) -> Tensor:
    base = AutoModelForCausalLM.from_pretrained(saved / "base").eval()
    return logits(base if name == "base" else PeftModel.from_pretrained(base, str(saved / name)).eval())


@pytest.mark.parametrize(
    ("names", "num_bases"),
    [
        (("base", "lora", "another", "base", "lora"), 1),
        (("lora", "base", "prompt", "base", "ia3", "base"), 3),
        (("base", "biases", "base", "lora"), 2),
        (("base", "pissa", "base", "lora"), 2),
        (("head", "base", "lora", "head"), 3),
    ],
)
def test_each_model_computes_to_the_last_bit_what_it_does_alone(saved: Path, names: tuple[str, ...], num_bases: int) -> None:
    with HeldModels(CPU) as models:
        for name in names:
            with models.asked(asked(saved, name)) as loaded:
                assert logits(loaded.model).equal(alone(saved, name)), name
        assert models.num_loaded == num_bases
    assert not alone(saved, names[0]).equal(alone(saved, names[1]))


def test_the_adapter_that_was_asked_longest_ago_makes_room(saved: Path, tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(MOST_ADAPTERS + 2)]
    for folder in folders:
        folder.symlink_to(saved / "lora")
    with HeldModels(CPU) as models:
        for folder in (*folders, folders[0]):
            one = asked(saved, "lora").model_copy(update={"adapter": str(folder)})
            with models.asked(one) as loaded:
                assert logits(loaded.model).equal(alone(saved, "lora"))
                assert len(loaded.model.peft_config) <= MOST_ADAPTERS
        assert models.num_loaded == 1


def test_an_adapter_with_tokens_that_its_base_does_not_have_is_refused(saved: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=2, trainable_token_indices=[290], **LORA)
    get_peft_model(tiny_model(vocab_size=300, **SHAPE), config).save_pretrained(tmp_path / "tokens", save_embedding_layers=False)
    one = asked(saved, "base").model_copy(update={"adapter": str(tmp_path / "tokens")})
    with pytest.raises(ModelError, match="of an adapter with new tokens, which no base has, name the run"):
        refuse_unfit_adapter(one)


STARTS: dict[str, tuple[dict[str, Any], bool]] = {
    "corda": ({"corda_config": {"corda_method": "ipm"}}, False),
    "loftq": ({"loftq_config": {"loftq_bits": 4}}, False),
    "lora_ga": ({}, False),
    "made_up": ({}, False),
    "pissa": ({}, True),
}
"""With what else PEFT wants beside them, and whether it is the base's form that they are refused for."""


@pytest.mark.parametrize("start", STARTS)
def test_a_start_that_cannot_be_made_again_is_refused(saved: Path, tmp_path: Path, start: str) -> None:
    more, is_quantized = STARTS[start]
    shutil.copytree(saved / "lora", tmp_path / start)
    file = tmp_path / start / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": start} | more))
    model = plain_model(str(saved / "base"), "fp32")
    held = model.model_copy(update={"quantization": Quantization(format="nf4")}) if is_quantized else model
    with pytest.raises(ModelError, match=f"adapter_config.json .*{start}.* path_initial_model_for_weight_conversion"):
        refuse_unfit_adapter(AskedModel(name=start, model=held, adapter=str(tmp_path / start)))


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_of_another_base_is_refused_before_weights_are_read(saved: Path, name: str) -> None:
    refuse_unfit_adapter(asked(saved, name))
    with pytest.raises(ModelError, match=r"cannot be put on .*wider: .*--base"):
        refuse_unfit_adapter(asked(saved, name, "wider"))


@pytest.mark.parametrize(
    ("name", "beside", "num_bases"),
    [("lora", (), 1), ("another", ("lora", "base"), 1), ("prompt", ("base",), 1), ("ia3", (), 2), ("head", ("base",), 2)],
)
def test_an_adapter_that_is_released_is_read_anew(
    saved: Path, tmp_path: Path, name: str, beside: tuple[str, ...], num_bases: int
) -> None:
    moving = tmp_path / "moving"
    shutil.copytree(saved / name, moving)
    one = asked(saved, "base").model_copy(update={"adapter": str(moving)})
    with HeldModels(CPU) as models:
        with models.asked(one) as loaded:
            assert logits(loaded.model).equal(alone(saved, name))
        for other in beside:
            with models.asked(asked(saved, other)) as loaded:
                assert logits(loaded.model).equal(alone(saved, other))
        models.release(one)
        for other in beside:
            with models.asked(asked(saved, other)) as loaded:
                assert logits(loaded.model).equal(alone(saved, other))
            if other != "base":
                models.release(asked(saved, other))
        with models.asked(asked(saved, "base")) as loaded:
            assert logits(loaded.model).equal(alone(saved, "base"))
        shutil.rmtree(moving)
        shutil.copytree(saved / "lora", moving)
        with models.asked(one) as loaded:
            assert logits(loaded.model).equal(alone(saved, "lora"))
            assert len(loaded.model.peft_config) == 1
        assert models.num_loaded == num_bases


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("base", "lora", "another"), ""),
        (("base", "prompt"), ""),
        (("base", "ia3"), ""),
        (("lora", "ia3"), "only LoRA in layers share a base"),
        (("prompt", "lora"), "only LoRA in layers share a base"),
        (("base", "biases"), "changes the base itself"),
        (("biases",), ""),
    ],
)
def test_models_that_share_a_base_are_told_apart_from_those_that_do_not(saved: Path, names: tuple[str, ...], words: str) -> None:
    with HeldModels(CPU) as models:
        ones = [asked(saved, name) for name in names]
        why = models.why_apart(ones[-1], ones[:-1])
        assert words in why
        assert bool(words) == bool(why)
        assert "another base" in models.why_apart(asked(saved, "base", "wider"), ones)
