"""A base whose files do not hold the model of its config is refused before anything is trained, with what is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from raytune.config.load import config_from
from raytune.config.sections.adapter import Adapter, FullAdapter, LoraAdapter, QloraAdapter
from raytune.errors import DataError, ModelError, UserError
from raytune.launch.cluster.host import this_machine
from raytune.launch.data.prepare import prepare
from raytune.model.adapters import add_adapter
from raytune.model.files.base_check import check_base
from raytune.model.files.files import resolve_model_path
from raytune.model.files.stopping import saved_config
from raytune.model.load import load_model
from raytune.plan.model.base_model import read_model_shape
from tests.tiny import save_tiny_model, tiny_model, tiny_plan, tiny_tokenizer

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
UP = "model.layers.1.mlp.up_proj.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("bases")
    models: dict[str, PreTrainedModel] = {
        "sharded": tiny_model(),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
        "mixtral": MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4)),
    }
    for name, model in models.items():
        model.save_pretrained(root / name, max_shard_size="80KB" if name == "sharded" else "5GB")
    return {name: root / name for name in models} | {
        "tied": save_tiny_model(root / "tied"),
        "untied": save_tiny_model(root / "untied", tied=False),
    }


def changed(base: Path, folder: Path, change: Change) -> Path:
    """A copy of a base, each of its weight files changed."""
    shutil.copytree(base, folder)
    for path in folder.glob("*.safetensors"):
        save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path, {"format": "pt"})
    return folder


def with_config(base: Path, folder: Path, **values: Any) -> Path:
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    return folder


def without(name: str) -> Change:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if name not in key}


def check(folder: Path) -> None:
    check_base(resolve_model_path(str(folder), None), None, False)


REFUSED = {
    "a layer": ("tied", without(UP), f"lack {UP}"),
    "the embedding": ("untied", without("embed_tokens"), r"lack model\.embed_tokens\.weight"),
    "a head that is not tied": ("untied", without("lm_head"), r"lack lm_head\.weight"),
    "embedding and tied head": ("tied", without("embed_tokens"), r"lack .*model\.embed_tokens\.weight"),
    "the last norm": ("tied", without("model.norm"), r"lack model\.norm\.weight"),
    "what its index promises": ("sharded", without(UP), rf"lack {UP}.*index\.json says that {UP} is in model-0000"),
    "an expert's matrix": (
        "mixtral",
        without("layers.1.block_sparse_moe.experts.2.w1"),
        r"layers\.1.*experts\.2\.w1\.weight is not",
    ),
    "an expert": ("mixtral", without("layers.1.block_sparse_moe.experts.2."), r"layers\.1.*experts\.2\.w1\.weight, .* are not"),
    "all experts": ("mixtral", without("layers.1.block_sparse_moe.experts"), r"lack model\.layers\.1\.mlp\.experts\.down_proj"),
    "rows of a matrix": (
        "tied",
        lambda tensors: tensors | {UP: tensors[UP][:60]},
        rf"{UP} \(in model\.safetensors\) is \[60, 32\] there and \[64, 32\]",
    ),
    "rows of an expert's matrix": (
        "mixtral",
        lambda tensors: {
            name: tensor[:5] if "layers.1" in name and "2.w2" in name else tensor for name, tensor in tensors.items()
        },
        r"layers\.1.*experts\.2\.w2\.weight \(in model\.safetensors\) is \[5, 48\], not \[32, 48\]",
    ),
    "an adapter that was not merged": (
        "tied",
        lambda tensors: {name.replace("q_proj", "q_proj.base_layer"): tensor for name, tensor in tensors.items()},
        r"lack model\.layers\.0\.self_attn\.q_proj\.weight",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_base_without_all_of_its_tensors_is_refused_with_their_names(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base, change, message = REFUSED[case]
    with pytest.raises(ModelError, match=rf"(?s){message}") as caught:
        check(changed(bases[base], tmp_path / "base", change))
    assert caught.value.exit_code == 2


EXTRA = {
    "more layers than the config says": (lambda base, to: with_config(base, to, num_hidden_layers=1), "tied", r"layers\.1\."),
    "biases of another architecture": (lambda base, to: with_config(base, to, model_type="llama"), "qwen2", r"k_proj\.bias"),
    "norms of another architecture": (
        lambda base, to: changed(base, to, lambda tensors: tensors | {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}),
        "tied",
        r"layers\.0\.self_attn\.q_norm\.weight",
    ),
    "scales of numbers in 8 bits": (
        lambda base, to: changed(base, to, lambda tensors: tensors | {UP.replace("weight", "weight_scale_inv"): torch.ones(1)}),
        "tied",
        r"up_proj\.weight_scale_inv",
    ),
    "a bias of the head": (
        lambda base, to: changed(base, to, lambda tensors: tensors | {"lm_head.bias": torch.ones(259)}),
        "untied",
        r"lm_head\.bias",
    ),
}


@pytest.mark.parametrize("case", EXTRA)
def test_a_base_with_tensors_that_its_model_would_compute_without_is_refused(
    case: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    make, base, name = EXTRA[case]
    with pytest.raises(ModelError, match=rf"hold .*{name}.*no place"):
        check(make(bases[base], tmp_path / "base"))


def test_tensors_that_are_none_of_the_language_models_or_that_it_computes_itself_are_no_fault(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    others = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "vision_tower.blocks.0.weight": torch.ones(4),
        "v_head.summary.weight": torch.ones(4),
        "score.weight": torch.ones(2, 32),
    }
    check(changed(bases["tied"], tmp_path / "base", lambda tensors: tensors | others))
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4))
    gpt2.save_pretrained(tmp_path / "gpt2")

    def as_published(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        buffers = {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.0.attn.masked_bias": torch.ones(1)}
        return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()} | buffers

    check(changed(tmp_path / "gpt2", tmp_path / "published", as_published))


INTACT: dict[str, Callable[[], PreTrainedModel]] = {
    "a decoder without head, whose head is tied": lambda: LlamaModel(tiny_model().config),
    "a classifier": lambda: LlamaForSequenceClassification(tiny_model().config),
    "fused projections": lambda: Phi3ForCausalLM(Phi3Config(**SHAPE, pad_token_id=0)),
    "experts": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, num_experts=4, moe_intermediate_size=16)),
    "fused experts": lambda: GptOssForCausalLM(GptOssConfig(**SHAPE, num_local_experts=4, head_dim=8)),
    "a layer for the token after next": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **SHAPE,
            n_routed_experts=4,
            n_group=2,
            topk_group=1,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
            first_k_dense_replace=1,
        )
    ),
}


@pytest.mark.parametrize("case", INTACT)
def test_intact_bases_of_any_architecture_are_taken(case: str, tmp_path: Path) -> None:
    INTACT[case]().save_pretrained(tmp_path / "base")
    if "next" in case:
        changed(tmp_path / "base", tmp_path / "more", lambda tensors: tensors | {"model.layers.2.eh_proj.weight": torch.ones(4)})
        check(tmp_path / "more")
    check(tmp_path / "base")


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut off": (cut_off, r"cut off or was appended to"),
    "cut off in its header": (lambda path: path.write_bytes(path.read_bytes()[:200]), r"cut off"),
    "appended to": (lambda path: path.write_bytes(path.read_bytes() + b"00"), r"appended to"),
    "empty": (lambda path: path.write_bytes(b""), r"\(0 bytes\).*is empty"),
    "a pointer": (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), r"Git LFS"),
    "not safetensors": (lambda path: path.write_bytes(b"\x80\x02" + bytes(500)), r"not in the format safetensors"),
    "gone": (lambda path: path.unlink(), r"index\.json says that weights are in model-00002-of-00002"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_is_named_once(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(bases["sharded"], tmp_path / "base")
    damage, message = DAMAGE[case]
    file = tmp_path / "base" / "model-00002-of-00002.safetensors"
    damage(file)
    with pytest.raises(ModelError, match=message) as caught:
        resolve_model_path(str(tmp_path / "base"), None)
    assert str(caught.value).count(file.name) == 1


def test_a_folder_whose_weights_have_another_name_is_refused_with_what_it_holds(bases: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(bases["tied"], tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "base" / "consolidated.safetensors")
    with pytest.raises(ModelError, match=r"as model\.safetensors or .*found only consolidated\.safetensors"):
        resolve_model_path(str(tmp_path / "base"), None)


def test_a_run_on_such_a_base_is_refused_before_its_data_is_looked_at(bases: dict[str, Path], tmp_path: Path) -> None:
    base = changed(bases["tied"], tmp_path / "base", without(UP))
    sections = {
        "name": "run",
        "storage": str(tmp_path / "runs"),
        "model": {"base": str(base)},
        "data": {"train": {"path": "demo:train", "max_rows": 20}},
    }
    config = config_from(sections)
    with pytest.raises(ModelError, match=f"lack {UP}"):
        prepare(config, this_machine(config.cluster), map)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "adapter",
    [FullAdapter(method="full"), LoraAdapter(), QloraAdapter(method="qlora"), QloraAdapter(method="qlora", quantization="int8")],
    ids=["full", "lora", "nf4", "int8"],
)
def test_no_way_to_load_a_base_takes_numbers_that_are_none(adapter: Adapter, bases: dict[str, Path], tmp_path: Path) -> None:
    def poisoned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[UP][3, 5] = float("nan")
        return tensors

    base = changed(bases["untied"], tmp_path / "base", poisoned)
    plan = tiny_plan(model={"path": str(base)}, adapter=adapter.model_dump())
    with pytest.raises(ModelError, match=r"not finite .*layers\.1\.mlp\.up_proj\.weight"):
        load_model(plan.model, plan.adapter, device=CPU, seed=0)
    load_model(plan.model.model_copy(update={"path": str(bases["untied"])}), plan.adapter, device=CPU, seed=0)


INT8, TWO_HEADS = (
    r"up_proj\.weight \(in model\.safetensors\) as I8, .*no quantization_config",
    r"lm_head\.weight and model\.embed_",
)


def with_integers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {UP: tensors[UP].to(torch.int8)}


def test_integers_are_no_weights(bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=INT8):
        check(changed(bases["tied"], tmp_path / "base", with_integers))


def test_a_tied_head_that_is_another_matrix_is_refused_and_an_equal_one_is_not(bases: dict[str, Path], tmp_path: Path) -> None:
    base = with_config(bases["untied"], tmp_path / "two", tie_word_embeddings=True)
    with pytest.raises(ModelError, match=TWO_HEADS):
        check(base)
    as_advised = without("lm_head")
    check(changed(base, tmp_path / "without head", as_advised))
    check(with_config(base, tmp_path / "untied", tie_word_embeddings=False))
    check(changed(base, tmp_path / "equal", lambda all_: all_ | {"lm_head.weight": all_["model.embed_tokens.weight"].clone()}))


def test_a_tensor_in_two_files_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(bases["sharded"], tmp_path / "base")
    first, second = sorted((tmp_path / "base").glob("*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor + 1}, second, {"format": "pt"})
    with pytest.raises(ModelError, match=rf"{name} is in .*{first.name} and in {second.name}"):
        resolve_model_path(str(tmp_path / "base"), None)


def test_weights_behind_a_link_that_leads_nowhere_are_named(bases: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(bases["tied"], tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    weights.unlink()
    weights.symlink_to("../../blobs/0123")
    with pytest.raises(ModelError, match=r"model\.safetensors is a link to \.\./\.\./blobs/0123, which is not there"):
        resolve_model_path(str(tmp_path / "base"), None)


def test_a_model_beside_an_adapter_is_refused_because_transformers_would_load_another(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(bases["tied"], tmp_path / "base")
    add_adapter(tiny_model(), LoraAdapter(rank=2), revision=None, seed=0).save_pretrained(str(tmp_path / "base"))
    with pytest.raises(ModelError, match=r"holds a model and an adapter"):
        check(tmp_path / "base")


ODD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "an activation": ({"hidden_act": "foo"}, r"config\.json describes no LlamaForCausalLM .*KeyError: 'foo'"),
    "a padding token": ({"pad_token_id": 9999}, r"config\.json describes no LlamaForCausalLM .*Padding_idx"),
    "fewer tokens than padding needs": ({"vocab_size": 100}, r"config\.json describes no LlamaForCausalLM .*Padding_idx"),
    "a dtype": ({"dtype": "bogus"}, r"config\.json of model .*bogus"),
    "a type": ({"rms_norm_eps": "x"}, r"config\.json of model .*rms_norm_eps"),
}


@pytest.mark.parametrize("case", ODD_CONFIGS)
def test_a_config_of_which_no_model_can_be_built_is_refused_with_its_value(
    case: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    values, message = ODD_CONFIGS[case]
    with pytest.raises(ModelError, match=rf"(?s){message}"):
        check(with_config(bases["tied"], tmp_path / "base", **values))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "does not hold a JSON object"),
        ('{"eos_token_id": "</s>"}', "eos_token_id must be the number of a token"),
        ('{"eos_token_id": [258, true]}', "eos_token_id must be the number of a token"),
        ('{"eos_token_id": [[258]]}', "eos_token_id must be the number of a token"),
    ],
)
def test_settings_of_generation_that_could_not_be_saved_again_are_refused_before_training(
    text: str, message: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(bases["tied"], tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text(text)
    with pytest.raises(ModelError, match=rf"generation_config\.json.* {message}"):
        check(tmp_path / "base")
    with pytest.raises(ModelError, match=message):
        saved_config(tmp_path / "base")  # as merging reads those of an adapter


@pytest.mark.parametrize("used_in", ["training", "validation", "questions"])
def test_rows_with_tokens_that_the_model_has_no_embedding_for_are_refused(
    used_in: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = Path(shutil.copytree(bases["tied"], tmp_path / "base"))
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(base)
    row = {"messages": [{"role": "user", "content": "a <new> one"}, {"role": "assistant", "content": "yes"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    rows, usual = str(tmp_path / "rows.jsonl"), {"path": "demo:train", "max_rows": 4}
    sections: dict[str, Any] = {
        "training": {"data": {"train": rows, "max_length": 512}},
        "validation": {"data": {"train": usual, "validation": rows, "max_length": 512}},
        "questions": {"data": {"train": usual, "max_length": 512}, "evaluation": {"generation": {"rows": rows}}},
    }
    fine = {"name": "run", "storage": str(tmp_path / "runs"), "model": {"base": str(base)}, "training": {"max_steps": 1}}
    config = config_from(fine | sections[used_in])
    with pytest.raises(DataError, match=r"'<new>' in .* is number 259 .* embeddings for 259 tokens"):
        prepare(config, this_machine(config.cluster), map)
    unused = config_from(fine | {"data": {"train": usual, "max_length": 512}})
    prepare(unused, this_machine(unused.cluster), map)


def _with(**values: Callable[[Tensor], Tensor]) -> Change:
    """A change of those tensors whose names contain a word."""

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for word, new in values.items():
            tensors |= {name: new(tensor) for name, tensor in tensors.items() if word in name and tensor.ndim > 1}
        return tensors

    return change


UNFILLED = {
    "a matrix of zeros": ("tied", _with(o_proj=torch.zeros_like), r"same number everywhere in .*o_proj\.weight \(in .*, 0:"),
    "a matrix of ones": ("tied", _with(down_proj=torch.ones_like), r"same number everywhere in .*down_proj.* 1:"),
    "the embedding": ("untied", _with(embed_tokens=torch.zeros_like), r"same number everywhere in model\.embed_tokens"),
    "the head": ("untied", _with(lm_head=torch.zeros_like), r"same number everywhere in lm_head"),
    "an expert": ("mixtral", _with(**{"experts.2.w1": torch.zeros_like}), r"same number everywhere in .*experts\.2\.w1"),
    "everything": ("tied", _with(weight=torch.zeros_like), r"same number everywhere in .* and \d+ more"),
    "a first row of NaN": (
        "tied",
        _with(up_proj=lambda old: torch.cat([old[:1] * float("nan"), old[1:]])),
        r"not finite .*up_proj",
    ),
    "a last row of infinity": (
        "tied",
        _with(q_proj=lambda old: torch.cat([old[:-1], old[-1:] * float("inf")])),
        r"not finite .*q_proj",
    ),
    "8-bit floats": (
        "tied",
        _with(k_proj=lambda old: old.to(torch.float8_e4m3fn)),
        r"k_proj.* as F8_E4M3, .*no quantization_config",
    ),
    "8-bit floats of an expert": (
        "mixtral",
        _with(**{"experts.1.w3": lambda old: old.to(torch.float8_e5m2)}),
        r"experts\.1\.w3.* as F8_E5M2",
    ),
}


@pytest.mark.parametrize("case", UNFILLED)
def test_numbers_that_say_nothing_are_refused_before_they_are_loaded(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base, change, message = UNFILLED[case]
    with pytest.raises(ModelError, match=rf"(?s){message}"):
        check(changed(bases[base], tmp_path / "base", change))


def test_8_bit_floats_are_refused_for_what_they_are_beside_their_scales(bases: dict[str, Path], tmp_path: Path) -> None:
    def as_deepseek_stores_them(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        scales = {f"{name}_scale_inv": torch.ones(1, 1) for name in tensors if "q_proj" in name}
        return _with(q_proj=lambda old: old.to(torch.float8_e4m3fn))(tensors) | scales

    with pytest.raises(ModelError, match=r"q_proj\.weight .*as F8_E4M3"):
        check(changed(bases["tied"], tmp_path / "base", as_deepseek_stores_them))


def test_rows_of_zeros_are_no_fault(bases: dict[str, Path], tmp_path: Path) -> None:
    """As of tokens that pad a vocabulary: at its ends, and wherever the check looks."""

    def padded(old: Tensor) -> Tensor:
        new = old.clone()
        new[[0, len(old) // 2, -1]] = 0
        return new

    check(changed(bases["untied"], tmp_path / "base", _with(embed_tokens=padded, lm_head=padded)))


def test_norms_and_biases_may_hold_one_number(bases: dict[str, Path]) -> None:
    """They do in every fresh model: ones and zeros."""
    tensors = load_file(bases["qwen2"] / "model.safetensors")
    assert all(
        (tensors[name] == tensors[name][0]).all() for name in ("model.norm.weight", "model.layers.0.self_attn.q_proj.bias")
    )
    check(bases["qwen2"])


@pytest.mark.parametrize(
    ("key", "value"),
    [("attention_dropout", 2.0), ("attention_dropout", -0.1), ("attention_dropout", 1.0), ("attention_dropout", "0.1")],
)
def test_rates_of_dropout_that_are_none_are_refused_by_the_plan(
    key: str, value: Any, bases: dict[str, Path], tmp_path: Path
) -> None:
    folder = with_config(bases["tied"], tmp_path / "base", **{key: value})
    with pytest.raises(ModelError, match=rf"config\.json: {key} must be a share of at least 0 and below 1, got "):
        read_model_shape(str(folder))


def test_every_architectures_name_for_dropout_is_known_and_other_settings_are_left_alone(tmp_path: Path) -> None:
    for name in ("resid_pdrop", "embd_pdrop", "hidden_dropout", "hidden_dropout_prob", "dropout", "layerdrop", "drop_path_rate"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SHAPE, "text_config": {name: 1.5}}))
        with pytest.raises(ModelError, match=rf"{name} must be a share"):
            read_model_shape(str(tmp_path))
    fine = {"use_dropout": True, "attention_dropout": 0.0, "classifier_dropout": None, "resid_pdrop": 0}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SHAPE, **fine}))
    assert read_model_shape(str(tmp_path)).num_layers == 2


def test_an_instance_type_that_nobody_knows_is_named_without_gpus_as_well(tmp_path: Path) -> None:
    config = config_from({"storage": str(tmp_path), "cluster": {"instance": "p5.48xlargee"}})
    with pytest.raises(UserError, match=r"p5\.48xlargee.*p5\.48xlarge"):
        prepare(config, this_machine(config.cluster), map)
    assert not list(tmp_path.iterdir())
