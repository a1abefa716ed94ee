"""Which layers an adapter takes, how it starts, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from raytune.config.sections.adapter import LoraAdapter
from raytune.errors import ModelError
from raytune.model.adapters import add_adapter
from raytune.model.adapters.lora import initialise_eva
from tests.tiny import save_tiny_model, tiny_model


def adapted(model: PreTrainedModel | None = None, **fields: Any) -> Any:
    torch.set_num_threads(1)
    return add_adapter(model or tiny_model(), LoraAdapter(**fields), revision=None, seed=0)


def layers(model: Any) -> set[str]:
    """Last names of the layers with an update, and of what they lie in."""
    return {".".join(name.split(".lora_A")[0].split(".")[-2:]) for name, _ in model.named_parameters() if ".lora_A" in name}


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def test_groups_are_the_layers_of_attention_and_mlp_without_the_head() -> None:
    attention = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
    mlp = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    for tied in (True, False):
        assert layers(adapted(tiny_model(tied=tied), target_modules="attention")) == attention
        assert layers(adapted(tiny_model(tied=tied), target_modules="mlp")) == mlp
        assert layers(adapted(tiny_model(tied=tied), target_modules="all-linear")) == attention | mlp


def test_groups_are_told_apart_where_layers_share_a_name() -> None:
    assert layers(adapted(gpt2(), target_modules="attention")) == {"attn.c_attn", "attn.c_proj"}
    assert layers(adapted(gpt2(), target_modules="mlp")) == {"mlp.c_fc", "mlp.c_proj"}


def test_names_regular_expressions_and_exclusions() -> None:
    assert layers(adapted(target_modules=["q_proj", "v_proj"])) == {"self_attn.q_proj", "self_attn.v_proj"}
    model = adapted(target_modules=r"model\.layers\.1\..*_proj", exclude_modules=["down_proj"])
    names = {name for name, _ in model.named_parameters() if ".lora_A" in name}
    assert len(names) == 6
    assert all(".layers.1." in name for name in names)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["q_porj"]}, r"'q_porj' matches no layer.*Near names: q_proj"),
        ({"target_modules": r"layers\.9\..*"}, "matches no layer"),
        ({"target_modules": "q_proj("}, "not a regular expression"),
        ({"exclude_modules": ["nothing"]}, r"adapter\.exclude_modules"),
        ({"modules_to_save": ["lm_haed"]}, r"adapter\.modules_to_save.*lm_head"),
        ({"rank_pattern": {"x_proj": 4}}, r"adapter\.rank_pattern"),
        ({"alpha_pattern": {"x_proj": 4.0}}, r"adapter\.alpha_pattern"),
    ],
)
def test_what_matches_nothing_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        adapted(**fields)


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {}),
        ({"init": "gaussian", "use_rslora": True}, {"init_lora_weights": "gaussian", "use_rslora": True}),
        ({"init": "orthogonal"}, {"init_lora_weights": "orthogonal"}),
        ({"init": "pissa"}, {"init_lora_weights": "pissa"}),
        ({"init": "olora"}, {"init_lora_weights": "olora"}),
        ({"use_dora": True, "bias": "all"}, {"use_dora": True, "bias": "all"}),
        ({"modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head"]}),
        ({"rank_pattern": {"q_proj": 2}}, {"rank_pattern": {"q_proj": 2}}),
        ({"alpha_pattern": {"v_proj": 3.0}}, {"alpha_pattern": {"v_proj": 3.0}}),
    ],
)
def test_the_start_is_that_of_plain_peft_under_the_same_seed(fields: dict[str, Any], options: dict[str, Any]) -> None:
    ours = adapted(tiny_model(tied=False), target_modules="attention", **fields)
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    base = tiny_model(tied=False)
    torch.manual_seed(0)
    theirs = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=names, **options))
    expected = dict(theirs.named_parameters())
    assert {name for name, _ in ours.named_parameters()} == set(expected)
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, expected[name]), name
        assert parameter.requires_grad == expected[name].requires_grad, name


def test_adding_an_adapter_leaves_the_random_numbers_of_the_process_alone() -> None:
    model = tiny_model()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    adapted(model)
    assert torch.equal(torch.rand(1), expected)


def test_eva_starts_as_in_plain_peft() -> None:
    batch = {"input_ids": torch.randint(0, 250, (1, 200), generator=torch.Generator().manual_seed(0))}
    ours = adapted(init="eva", rank=4, target_modules=["q_proj", "down_proj"])
    initialise_eva(ours, [batch])
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=32,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=1.0),
    )
    theirs = get_peft_model(tiny_model(), config)
    initialize_lora_eva_weights(theirs, [batch | {"attention_mask": torch.ones(1, 200)}], show_progress_bar=False)
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=1e-4)  # singular vectors in fp32
        assert ".lora_B." not in name or not parameter.any()


def test_eva_without_data_is_refused() -> None:
    with pytest.raises(ModelError, match="at least one batch"):
        initialise_eva(adapted(init="eva"), [])


def test_quantised_modules_cannot_be_trained_in_full(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(
        save_tiny_model(tmp_path), quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    with pytest.raises(ModelError, match="quantised layers"):
        add_adapter(base, LoraAdapter(modules_to_save=["down_proj"]), revision=None, seed=0)
