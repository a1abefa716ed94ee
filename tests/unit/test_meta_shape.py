"""Shapes of architectures without a reader, read off the model that transformers builds without storage."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig

from raytune.config.sections.adapter import LoraAdapter
from raytune.errors import ModelError
from raytune.model.adapters import add_adapter
from raytune.model.meta_shape import UNBOUNDED_POSITIONS, meta_model, shape_of
from raytune.plan.methods import trained_by
from raytune.plan.methods.lora_updates import updated_layers, updated_parameters
from raytune.plan.model.architectures import model_shape
from raytune.plan.model.base_model import read_model_shape
from raytune.plan.model.shapes import ModelShape
from tests.unit.test_plan_shapes import CONFIGS, SMALL
from tests.unit.test_plan_shapes import meta_model as model_of

MOE: dict[str, Any] = {"num_experts_per_tok": 2, "num_local_experts": 4}
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OTHERS: dict[str, PretrainedConfig] = {
    "opt": transformers.OPTConfig(
        vocab_size=101, hidden_size=24, ffn_dim=40, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=24
    ),
    "gptj": transformers.GPTJConfig(vocab_size=101, n_embd=24, n_layer=3, n_head=4, rotary_dim=2),
    "falcon": transformers.FalconConfig(vocab_size=101, hidden_size=24, num_hidden_layers=3, num_attention_heads=4),
    "falcon with groups": transformers.FalconConfig(
        vocab_size=101, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, new_decoder_architecture=True, num_kv_heads=2
    ),
    "bloom": transformers.BloomConfig(vocab_size=101, hidden_size=24, n_layer=3, n_head=4),
    "mpt": transformers.MptConfig(vocab_size=101, d_model=24, n_layers=3, n_heads=4),
    "phi": transformers.PhiConfig(**SMALL),
    "stablelm": transformers.StableLmConfig(**SMALL),
    "olmo2": transformers.Olmo2Config(**SMALL),
    "cohere": transformers.CohereConfig(**SMALL),
    "granite": transformers.GraniteConfig(**SMALL),
    "granitemoe": transformers.GraniteMoeConfig(**SMALL, **MOE),
    "glm": transformers.GlmConfig(**SMALL, head_dim=6, pad_token_id=0),
    "smollm3": transformers.SmolLM3Config(**SMALL, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    "starcoder2": transformers.Starcoder2Config(**SMALL),
    "gpt_oss": transformers.GptOssConfig(**SMALL, **MOE, head_dim=8),
    "olmoe": transformers.OlmoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, **SPECIAL),
    "phimoe, whose router is a linear layer": transformers.PhimoeConfig(**SMALL, **MOE, **SPECIAL),
    "llama4, whose experts are the other way round": transformers.Llama4TextConfig(
        **SMALL, num_local_experts=4, intermediate_size_mlp=16, head_dim=6, pad_token_id=0
    ),
    "hunyuan with a shared expert": transformers.HunYuanMoEV1Config(
        **SMALL, num_experts=4, moe_topk=2, head_dim=6, pad_token_id=0
    ),
    "glm4 with a shared expert": transformers.Glm4MoeConfig(
        **SMALL,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        first_k_dense_replace=0,
        head_dim=6,
        n_group=1,
        topk_group=1,
        pad_token_id=0,
    ),
    "granite with a shared expert": transformers.GraniteMoeSharedConfig(
        **SMALL, **MOE, shared_intermediate_size=32, pad_token_id=0
    ),
}


def shape_by_building(config: PretrainedConfig) -> ModelShape:
    model = model_of(config)
    assert isinstance(model, transformers.PreTrainedModel)
    return shape_of(model)


@pytest.mark.parametrize("name", CONFIGS)
def test_building_and_reading_agree(name: str) -> None:
    """The readers are the oracle, in every field that is not a matter of the order of modules."""
    built, read = shape_by_building(CONFIGS[name]), model_shape(CONFIGS[name].to_dict(), "config.json")
    for field in ("num_layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocab", "max_positions"):
        assert getattr(built, field) == getattr(read, field), field
    assert (built.has_gate, built.is_tied) == (read.has_gate, read.is_tied)
    assert {*built.dropouts} == {*read.dropouts}
    assert {*built.modules()} == {*read.modules()}


@pytest.mark.parametrize("name", OTHERS)
def test_every_parameter_is_counted(name: str) -> None:
    config = OTHERS[name]
    model = model_of(config)
    shape = shape_by_building(config)
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (shape.num_layers, shape.hidden, shape.heads) == (3, 24, 4)
    assert shape.layers_name in dict(model.named_modules())
    modules = dict(model.named_modules())
    for module in shape.modules():
        held = sum(parameter.numel() for parameter in modules[module.name].parameters(recurse=False))
        assert module.num_parameters == held, module.name


@pytest.mark.parametrize("name", OTHERS)
def test_an_adapter_has_the_size_that_peft_gives_it(name: str) -> None:
    adapter = LoraAdapter(method="lora", rank=4, target_modules="all-linear")
    config = OTHERS[name]
    model = AutoModelForCausalLM.from_config(config)
    adapted = add_adapter(model, adapter, revision=None, seed=0)
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert trained_by(adapter, shape_by_building(config)).num_trainable == trained


@pytest.mark.parametrize("name", ["phimoe, whose router is a linear layer", "hunyuan with a shared expert", "gpt_oss", "olmoe"])
def test_a_router_is_trained_only_if_it_is_named(name: str) -> None:
    config = OTHERS[name]
    shape = shape_by_building(config)
    router = next(module for module in shape.layer if module.kind == "router")
    group = LoraAdapter(method="lora", rank=4)
    trained = [module.name for module in (*updated_layers(group, shape), *updated_parameters(group, shape))]
    assert f"{shape.layers_name}.0.{router.name}" not in trained
    assert any("experts" in name for name in trained)
    named = {"target_modules": [router.name]} if router.is_linear_layer else {"target_parameters": [f"{router.name}.weight"]}
    asked = LoraAdapter(method="lora", rank=4, **({"target_modules": ["q_proj"]} | named))
    adapted = add_adapter(AutoModelForCausalLM.from_config(config), asked, revision=None, seed=0)
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert any(f"{router.name}.lora_A" in name for name in names)
    assert trained_by(asked, shape).num_trainable == sum(
        parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad
    )


@pytest.mark.parametrize("asked", [["q_proj", "up_proj"], r".*shared_mlp\.up_proj"])
def test_a_name_that_peft_takes_for_an_expert_is_refused(asked: str | list[str]) -> None:
    """PEFT 0.21 would train the fused experts of such a model instead of its shared expert."""
    config = OTHERS["hunyuan with a shared expert"]
    adapter = LoraAdapter(method="lora", target_modules=asked)
    with pytest.raises(ModelError, match=r"takes in .*shared_mlp\.up_proj, whose name PEFT takes for that of a fused expert"):
        trained_by(adapter, shape_by_building(config))
    with pytest.raises(ModelError, match=r"takes in .*shared_mlp\.up_proj, whose name PEFT takes for that of a fused expert"):
        add_adapter(AutoModelForCausalLM.from_config(config), adapter, revision=None, seed=0)


def test_keys_and_values_are_counted_where_one_matrix_holds_them() -> None:
    assert shape_by_building(OTHERS["falcon"]).kv_heads == 1
    assert shape_by_building(OTHERS["falcon with groups"]).kv_heads == 2
    assert shape_by_building(OTHERS["glm"]).kv_heads == 2


def test_the_width_of_an_mlp_is_what_a_token_passes_through() -> None:
    widths = {name: (shape.intermediate, shape.has_gate) for name in OTHERS if (shape := shape_by_building(OTHERS[name]))}
    assert widths["opt"] == (40, False)
    assert widths["glm"] == (40, True), "one matrix for both branches"
    assert widths["gpt_oss"] == (2 * 40, True), "two of four experts"


def test_a_model_without_a_bound_on_positions_has_a_wide_one() -> None:
    assert shape_by_building(OTHERS["bloom"]).max_positions == UNBOUNDED_POSITIONS
    assert shape_by_building(OTHERS["mpt"]).max_positions == 2048


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.Zamba2Config(**SMALL, layers_block_type=["mamba", "hybrid", "hybrid"]), "its layers share weights"),
        (
            transformers.DeepseekV3Config(
                vocab_size=101, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, first_k_dense_replace=1
            ),
            r"model\.layers\.1 and model\.layers\.0 differ in mlp\.",
        ),
        (transformers.BartConfig(vocab_size=101, d_model=24, decoder_layers=2, decoder_attention_heads=4), "its attention is"),
        (
            transformers.OPTConfig(
                vocab_size=101, hidden_size=24, ffn_dim=40, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=12
            ),
            r"outside its layers it has model\.decoder\.project_out, model\.decoder\.project_in",
        ),
    ],
    ids=["zamba2", "deepseek_v3", "bart", "opt with projections"],
)
def test_what_the_formulas_do_not_cover_is_refused(config: PretrainedConfig, reason: str) -> None:
    with pytest.raises(ModelError, match=f"cannot plan this {config.model_type} model: .*{reason}"):
        shape_by_building(config)


@pytest.mark.slow  # often by code beside the weights, below
def test_a_folder_is_built_in_a_process_of_its_own(tmp_path: Path) -> None:
    OTHERS["olmo2"].save_pretrained(tmp_path)
    assert read_model_shape(str(tmp_path)) == shape_by_building(OTHERS["olmo2"])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_type": "t5"}, "of type t5, which is not a causal language model"),
        ({"model_type": "no_such"}, "no_such"),
        ({"model_type": "phi", "hidden_size": 24, "num_attention_heads": 0}, "cannot build a phi model"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}, "raytune does not run such code by default"),
    ],
    ids=["no decoder", "unknown", "not buildable", "own code"],
)
def test_what_cannot_be_built_is_said(values: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match=said):
        meta_model(str(tmp_path))


@pytest.mark.slow
def test_why_a_model_is_not_planned_comes_back_from_the_process(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 24}')
    with pytest.raises(ModelError, match="names no model_type"):
        read_model_shape(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bart"}')
    with pytest.raises(ModelError, match=r"^raytune cannot plan this bart model: its attention is"):
        read_model_shape(str(tmp_path))


@pytest.mark.slow  # often where such a model trains: numerics/test_own_code
def test_code_beside_the_weights_that_is_trusted_makes_the_model(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "print('code of a model may print')\n"
        "class Config(LlamaConfig):\n    model_type = 'own'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    own = {"auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"].to_dict() | own | {"model_type": "own"}))
    built = read_model_shape(str(tmp_path), trust_remote_code=True)
    assert built.num_parameters == model_shape(CONFIGS["llama"].to_dict(), "x").num_parameters
