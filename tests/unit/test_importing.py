"""Configs of Axolotl, LLaMA-Factory and TRL become configs of raytune that train the same, and no key is lost in silence."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import raytune
from raytune.cli import cli
from raytune.config.load import config_from, load_config
from raytune.config.problems import ConfigError
from raytune.config.reading.files import read_file
from raytune.config.reading.keys import keys
from raytune.config.yaml_nodes import write_yaml
from raytune.errors import UserError
from raytune.importing.facts import counterpart, facts, projects
from raytune.importing.imported import Imported
from raytune.training.steps.schedule import learning_rate
from tests.tiny import tiny_plan

FULL = """
base_model: Qwen/Qwen2.5-0.5B
datasets:
  - path: mhenrichsen/alpaca_2k_test
    type: alpaca
val_set_size: 0.05
output_dir: ./outputs/Full_Run
sequence_len: 2048
sample_packing: true
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 3
optimizer: adamw_torch_fused
lr_scheduler: cosine
learning_rate: 0.00002
warmup_steps: 10
bf16: auto
tf32: true
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.1
wandb_project:
deepspeed: deepspeed_configs/zero3_bf16.json
"""
LORA = """
base_model: NousResearch/Meta-Llama-3-8B
model_type: LlamaForCausalLM
load_in_8bit: true
strict: false
chat_template: llama3
datasets:
  - path: fozziethebeat/alpaca_messages_2k_test
    type: chat_template
    field_messages: conversation
    message_property_mappings: {role: from, content: value}
    roles_to_train: [assistant]
    split: train[:10%]
  - path: data/more.jsonl
    ds_type: json
    type: completion
    field: body
adapter: lora
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
sequence_len: 4096
micro_batch_size: 2
num_epochs: 1
learning_rate: 1e-4
train_on_inputs: true
special_tokens: {pad_token: <|end_of_text|>, eos_token: <|eot_id|>}
rope_sclaing: 2
"""
QLORA = """
base_model: meta-llama/Llama-3.2-1B
load_in_4bit: true
adapter: qlora
lora_r: 8
lora_alpha: 16
datasets: [{path: rows.jsonl, type: {field_instruction: q, field_output: a, format: "{instruction}"}}]
sequence_len: 512
micro_batch_size: 4
max_steps: 500
learning_rate: 0.0002
optimizer: paged_adamw_8bit
lr_scheduler: constant
plugins: [axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin, my.Own]
fsdp: [full_shard]
"""
MERGED = """
_base: &base
  path: rows.jsonl
  type: alpaca
base_model: x/y
datasets:
  - <<: *base
    split: train
  - <<: [{path: other.jsonl}, *base]
sequence_len: 128
micro_batch_size: 1
learning_rate: 1e-5
"""
FACTORY = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: q_proj,v_proj
dataset: identity,chats
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
report_to: none
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
val_size: 0.1
eval_strategy: steps
eval_steps: 500
deepspeed: ds.json
"""
INFO = {
    "identity": {"file_name": "identity.json"},
    "chats": {
        "hf_hub_url": "org/chats",
        "subset": "en",
        "formatting": "sharegpt",
        "columns": {"messages": "turns"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    },
    "pairs": {"file_name": "pairs.json", "ranking": True},
    "pictures": {"file_name": "p.json", "formatting": "sharegpt", "columns": {"messages": "m", "images": "i"}},
}
FACTORY_QLORA = FACTORY.replace("eval_steps: 500", "eval_steps: 500\nquantization_bit: 4\nmask_history: true\nneat_packing: true")
FACTORY_PLAIN = """
model_name_or_path: x/y
stage: pt
do_train: true
finetuning_type: full
dataset: identity
per_device_train_batch_size: 1
lr_scheduler_type: polynomial
learning_rate: 1.0e-4
"""
TRL = """
model_name_or_path: Qwen/Qwen2-0.5B
dataset_name: trl-lib/Capybara
dataset_config: en
eval_strategy: steps
eval_steps: 100
output_dir: Qwen2-0.5B-SFT
push_to_hub: true
env: {WANDB_MODE: offline}
"""
TRL_LORA = """
model_name_or_path: Qwen/Qwen2-0.5B
datasets:
  - {path: a/b, fraction: 0.75}
  - {path: c/d, split: train_sft, columns: [messages], fraction: 0.25}
use_peft: true
load_in_4bit: true
lora_r: 32
learning_rate: 2.0e-4
packing: true
assistant_only_loss: true
max_length: 2048
per_device_train_batch_size: 2
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr: 2.0e-5}
warmup_steps: 0.1
dtype: bfloat16
"""
FILES = {
    "axolotl": [FULL, LORA, QLORA, MERGED],
    "llamafactory": [FACTORY, FACTORY_QLORA, FACTORY_PLAIN],
    "trl": [TRL, TRL_LORA],
}
EVERY = [(project, text) for project, texts in FILES.items() for text in texts]


def made(tmp_path: Path, text: str, **options: Any) -> Imported:
    file = tmp_path / "theirs.yaml"
    file.write_text(text)
    (tmp_path / "dataset_info.json").write_text(json.dumps(INFO))
    return raytune.import_config(file, **options)


def account(found: Imported, key: str):
    return next(each for each in found.accounts if each.key == key)


def leaves(value: Any, path: str = "") -> list[str]:
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [leaf for name, child in below for leaf in leaves(child, f"{path}.{name}" if path else str(name))]
    return found or [path]


def assert_whole(found: Imported, tmp_path: Path) -> None:
    """Each leaf of the file lies under one account, and what is written loads to what was made."""
    tree, _ = read_file(found.file, 0, merges=True)
    assert tree is not None
    named = [each.key for each in found.accounts]
    for leaf in leaves(tree.plain) if tree.plain else []:
        assert [key for key in named if leaf == key or leaf.startswith(f"{key}.")] == [leaf_owner(leaf, named)]
    for each in found.accounts:
        assert bool(each.ours) == (each.fate == "converted")
        assert each.note or each.fate == "converted", each
    (tmp_path / "run.yaml").write_text(found.yaml)
    assert load_config([tmp_path / "run.yaml"]) == config_from(found.config)


def leaf_owner(leaf: str, named: list[str]) -> str:
    return next(key for key in named if leaf == key or leaf.startswith(f"{key}."))


@pytest.mark.parametrize(("project", "text"), EVERY)
def test_every_key_of_a_file_is_accounted_for_once_and_the_result_loads(project: str, text: str, tmp_path: Path) -> None:
    for gpus in (None, 8):
        found = made(tmp_path, text, gpus=gpus)
        assert found.project == project
        assert_whole(found, tmp_path)


@pytest.mark.parametrize(("project", "text"), EVERY)
def test_what_is_written_passes_a_fast_check(project: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = '{"instruction": "a", "output": "b", "q": "a", "a": "b", "body": "c"}\n'
    for name in ("rows.jsonl", "other.jsonl", "identity.json", "data/more.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(rows)
    found = made(tmp_path, text)
    (tmp_path / "run.yaml").write_text(found.yaml)
    done = CliRunner().invoke(cli, ["check", "run.yaml", "--fast"])
    assert done.exit_code == 0, done.output


def test_a_full_run_of_axolotl(tmp_path: Path) -> None:
    found = made(tmp_path, FULL, gpus=8)
    assert found.config == {
        "name": "full_run",
        "storage": "outputs",
        "model": {"base": "Qwen/Qwen2.5-0.5B"},
        "data": {
            "train": [{"path": "mhenrichsen/alpaca_2k_test", "format": "alpaca"}],
            "validation_fraction": 0.05,
            "template": "alpaca",
            "max_length": 2048,
            "too_long": "drop",
        },
        "adapter": {"method": "full"},
        "training": {
            "num_train_epochs": 3,
            "global_batch_size": 64,
            "learning_rate": 2e-5,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 10,
            "weight_decay": 0.1,
            "zero": {"stage": 3},
        },
        "evaluation": {"every_epochs": 0.25},
        "checkpoint": {"every_epochs": 1.0, "keep_best": 0},
    }
    assert account(found, "micro_batch_size").ours == (("training.global_batch_size", 64),)
    assert account(found, "sample_packing").fate == "same"
    assert account(found, "wandb_project").note == "says nothing"
    assert "# micro_batch_size 2 x gradient_accumulation_steps 4 x 8 GPUs" in found.yaml
    assert not found.left
    assert not found.open_questions


def test_chats_and_texts_of_axolotl_and_what_has_no_counterpart(tmp_path: Path) -> None:
    found = made(tmp_path, LORA)
    config = config_from(found.config)
    chats, texts = config.data.train
    assert (chats.format, chats.columns, chats.split) == ("sharegpt", {"conversations": "conversation"}, "train[:10%]")
    assert (texts.format, texts.columns) == ("text", {"text": "body"})
    assert (config.data.template, config.data.targets, config.data.packing) == ("llama-3", "all", "none")
    assert found.config["model"]["quantization"] == "int8"
    assert found.config["adapter"] == {"method": "lora", "rank": 32, "alpha": 16, "dropout": 0.05}
    assert found.config["training"]["warmup_ratio"] == 0.03
    assert {each.key for each in found.left} == {"special_tokens.eos_token", "rope_sclaing"}
    assert account(found, "special_tokens.pad_token").fate == "no_effect"
    assert any("how many GPUs" in question for question in found.open_questions)
    assert any("long documents" in question for question in found.open_questions)


def test_a_schedule_of_axolotl_without_warm_up_and_a_type_with_fields(tmp_path: Path) -> None:
    found = made(tmp_path, QLORA)
    training = found.config["training"]
    assert (training["lr_scheduler_type"], training["warmup_steps"], training["max_steps"]) == ("constant", 0, 500)
    assert training["optimizer"] == "paged_adamw_8bit"
    assert training["loss"] == "chunked"
    assert found.config["adapter"]["target_modules"] == ["q_proj", "v_proj"]
    assert found.config["model"]["quantization"] == "nf4"
    assert found.config["data"]["train"] == [
        {"path": "rows.jsonl", "format": "prompt_completion", "columns": {"prompt": "q", "completion": "a"}}
    ]
    assert [each.key for each in found.left] == ["plugins.1"]


def test_merge_keys_and_anchors_are_read(tmp_path: Path) -> None:
    found = made(tmp_path, MERGED)
    assert found.config["data"]["train"] == [
        {"path": "rows.jsonl", "format": "alpaca"},
        {"path": "other.jsonl", "format": "alpaca"},
    ]
    assert account(found, "_base").fate == "left"


def test_a_file_of_llamafactory_with_its_data_sets(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(
        json.dumps(
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}, "optimizer": {"params": {"lr": 1}}}
        )
    )
    found = made(tmp_path, FACTORY, gpus=4)
    config = config_from(found.config)
    assert [source.model_dump(exclude_unset=True) for source in config.data.train] == [
        {"path": str(tmp_path / "identity.json"), "name": "identity", "format": "alpaca", "max_rows": 1000},
        {"path": "org/chats:en", "name": "chats", "format": "messages", "columns": {"messages": "turns"}, "max_rows": 1000},
    ]
    assert found.config["adapter"] == {"method": "lora", "rank": 8, "alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    assert (config.training.zero.stage, config.training.zero.offload_optimizer) == (2, "cpu")
    assert (config.data.template, config.data.packing, config.data.too_long) == ("llama-3", "none", "truncate")
    assert (config.training.global_batch_size, config.training.weight_decay, config.training.precision) == (32, 0.0, "bf16")
    assert (config.evaluation.every_steps, config.checkpoint.every_steps, config.checkpoint.keep_best) == (500, 500, 0)
    assert not found.left
    assert len(found.open_questions) == 1  # DeepSpeed's own optimizer


def test_what_llamafactory_masks_packs_and_reads_as_plain_text(tmp_path: Path) -> None:
    packed = config_from(made(tmp_path, FACTORY_QLORA).config)
    assert (packed.data.targets, packed.data.packing, packed.data.too_long) == ("last", "best_fit", "drop")
    assert packed.model.quantization == "nf4"
    plain = config_from(made(tmp_path, FACTORY_PLAIN).config)
    assert (plain.data.train[0].format, plain.data.train[0].columns) == ("text", {"text": "instruction"})
    assert (plain.data.too_long, plain.data.packing, plain.training.precision, plain.training.tf32) == (
        "split",
        "best_fit",
        "fp32",
        False,
    )
    assert plain.training.polynomial_power == 1
    assert plain.training.min_lr_ratio == pytest.approx(1e-3)


def test_what_trl_does_without_a_word_is_written(tmp_path: Path) -> None:
    found = made(tmp_path, TRL, gpus=2)
    config = config_from(found.config)
    assert (config.data.train[0].path, config.data.validation[0].split) == ("trl-lib/Capybara:en", "test")
    assert (config.data.targets, config.data.packing, config.data.max_length, config.data.too_long) == (
        "all",
        "none",
        1024,
        "truncate",
    )
    training = config.training
    assert (training.lr_scheduler_type, training.warmup_steps, training.weight_decay) == ("linear", 0, 0.0)
    assert (training.learning_rate, training.num_train_epochs, training.global_batch_size) == (2e-5, 3.0, 16)
    assert (config.adapter.method, training.precision, config.checkpoint.keep_best) == ("full", "bf16", 0)
    assert account(found, "env.WANDB_MODE").fate == "no_effect"
    assert any("what the rows are" in question for question in found.open_questions)


def test_a_mixture_of_trl_over_a_base_in_4_bits(tmp_path: Path) -> None:
    found = made(tmp_path, TRL_LORA)
    config = config_from(found.config)
    assert [(source.path, source.split, source.proportion) for source in config.data.train] == [
        ("a/b", "train", 0.75),
        ("c/d", "train_sft", 0.25),
    ]
    assert (config.data.targets, config.data.packing, config.data.mixing.until) == ("assistant", "best_fit", "first_exhausted")
    assert (config.model.quantization, config.model.double_quantization) == ("nf4", False)
    assert found.config["adapter"] == {"method": "lora", "rank": 32, "dropout": 0.05, "target_modules": ["q_proj", "v_proj"]}
    assert (config.training.lr_scheduler_type, config.training.warmup_ratio) == ("cosine", 0.1)
    assert config.training.min_lr_ratio == pytest.approx(0.1)
    assert [each.key for each in found.left] == ["dtype"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (FULL + "rl: dpo\n", "theirs.yaml:24:1: rl: .* no preference"),
        (FULL + "processor_type: AutoProcessor\n", "text only"),
        (FACTORY.replace("stage: sft", "stage: kto"), "no preference"),
        (FACTORY.replace("finetuning_type: lora", "finetuning_type: freeze"), "strategy.unfreeze"),
        (FACTORY.replace("do_train: true", "do_predict: true"), "do_train is not true"),
        (FACTORY.replace("identity,chats", "pairs"), "preferences"),
        (FACTORY.replace("identity,chats", "pictures"), "text only"),
        (FACTORY + "quantization_bit: 2\n", "4 or 8 bits"),
        (TRL + "beta: 0.1\n", "preferences"),
        (TRL + "loss_type: [sigmoid, bco_pair]\n", "theirs.yaml:10:1: loss_type: .*preferences"),
        (TRL + "precompute_ref_log_probs: true\n", "preferences"),
        ("learning_rate: 1\n", "none of its keys says"),
        ("base_model: x\nuse_peft: true\n", "keys of several projects: base_model of Axolotl; use_peft of TRL.*--of trl"),
        ("model: x\nmodel_class: llm\ntrain_dataset: y\n", "version 1"),
        ("", "empty"),
    ],
)
def test_what_cannot_be_converted_is_refused_with_words(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        made(tmp_path, text)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("learning_rate: fast", "theirs.yaml:1:16"),
        ("micro_batch_size: [2]", "expected a number"),
        ("max_steps: 2.5", "expected a whole number"),
        ("sample_packing: perhaps", "expected true or false"),
        ("lora_dropout: 1.5\nadapter: lora\nlora_r: 8", "adapter.dropout"),
        ("base_model: [x]", "expected text"),
        ("a: !!python/object:os.system x", "tags such as"),
        ("datasets: &d [*d]", "refers to nothing"),
    ],
)
def test_values_that_are_none_are_named_with_their_line(line: str, words: str, tmp_path: Path) -> None:
    key = line.partition(":")[0]
    rest = "".join(f"{text}\n" for text in FULL.strip().splitlines() if not text.startswith((f"{key}:", "  ", "datasets")))
    with pytest.raises(ConfigError, match=words):
        made(tmp_path, f"{line}\n{rest}")


def test_variables_and_secrets_are_left_out_and_said(tmp_path: Path) -> None:
    secret = "hf_" + "a" * 34
    found = made(tmp_path, FULL.replace("Qwen/Qwen2.5-0.5B", "${MODELS}/base") + f"hub_token: {secret}\n")
    assert "model" not in found.config
    assert account(found, "base_model").fate == "left"
    nested = made(tmp_path, FULL.replace("path: mhenrichsen", "path: $DATA/mhenrichsen"))
    assert account(nested, "datasets.0.path").fate == "left"
    assert "which model is trained" in found.open_questions[0]
    assert secret not in json.dumps(found.to_json()) + found.summary + found.yaml
    found = made(tmp_path, FULL + "swanlab_api_key: mine\nspecial_tokens: {pad_token: <pad>}\n")
    assert account(found, "swanlab_api_key").value == "..."
    assert account(found, "special_tokens.pad_token").value == "<pad>"


def test_what_nothing_reads_is_left_out_and_said(tmp_path: Path) -> None:
    found = made(tmp_path, FULL.replace("adamw_torch_fused", "adafactor") + "adam_beta2: 0.95\nloraplus_lr_embedding: 1e-5\n")
    assert "adam_beta2" not in found.config["training"]
    assert [each.key for each in found.left] == ["adam_beta2"]
    assert "adafactor" in account(found, "adam_beta2").note
    alone = made(tmp_path, TRL.replace("dataset_name: trl-lib/Capybara", "datasets: [{path: a/b, fraction: 0.5}]"))
    assert alone.config["data"]["train"] == [{"path": "a/b"}]
    assert account(alone, "datasets.0.fraction").fate == "left"


def test_weights_that_stay_frozen_in_axolotl_stay_frozen(tmp_path: Path) -> None:
    part = made(tmp_path, FULL + "unfrozen_parameters: ['^lm_head.weight$', 'model.layers.2[0-9]+.mlp']\n")
    assert part.config["strategy"] == {"freeze": {"train_only": ["lm_head", "model.layers.2[0-9]+.mlp"]}}
    rows = made(tmp_path, FULL + "unfrozen_parameters: ['model.embed_tokens.weight$[32000:]']\n")
    assert [each.key for each in rows.left] == ["unfrozen_parameters"]


@pytest.mark.parametrize(
    ("optimizer", "settings", "told"),
    [
        ("adamw_torch", {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}}, ["scheduler"]),
        ("adamw_torch", {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}}}, []),
        ("adamw_8bit", {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, ["optimizer"]),
        ("adamw_torch", {"optimizer": {"type": "Lamb", "params": {"lr": "auto"}}}, ["optimizer"]),
        ("adamw_torch", {"optimizer": {"type": "AdamW", "params": {"lr": 1e-5}}}, ["optimizer"]),
    ],
)
def test_what_deepspeed_takes_in_place_of_the_file_is_said(
    optimizer: str, settings: dict[str, Any], told: list[str], tmp_path: Path
) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, **settings}))
    found = made(tmp_path, FACTORY + f"optim: {optimizer}\n")
    assert [name for name in ("optimizer", "scheduler") if f"`{name}` is not read" in account(found, "deepspeed").note] == told
    assert [name for name in told if any(f"the {name} in DeepSpeed's JSON" in each for each in found.open_questions)] == told


def test_llamafactory_without_a_precision_computes_adapters_in_what_the_machine_has(tmp_path: Path) -> None:
    unsaid = FACTORY.replace("bf16: true\n", "")
    assert config_from(made(tmp_path, unsaid).config).training.precision == "auto"
    assert config_from(made(tmp_path, unsaid + "fp16: true\n").config).training.precision == "fp16"
    full = unsaid.replace("finetuning_type: lora", "finetuning_type: full")
    assert config_from(made(tmp_path, full).config).training.precision == "fp32"


@pytest.mark.parametrize(
    ("schedule", "floor"), [("cosine", 0.1), ("rex", 0.1), ("linear", 0.0), ("constant_with_warmup", 0.0), ("one_cycle", 0.0)]
)
def test_a_floor_of_axolotl_is_that_of_a_cosine_only(schedule: str, floor: float, tmp_path: Path) -> None:
    found = made(tmp_path, FULL.replace("lr_scheduler: cosine", f"lr_scheduler: {schedule}") + "cosine_min_lr_ratio: 0.1\n")
    assert config_from(found.config).training.min_lr_ratio == floor
    assert account(found, "cosine_min_lr_ratio").fate == ("converted" if floor else "no_effect")


@pytest.mark.parametrize(
    ("text", "unread"),
    [
        (FULL + "lora_r: 8\nlora_target_linear: true\nlora_target_modules: [q_proj]\npeft_layers_to_transform: [0]\n",
         "lora_r lora_target_linear lora_target_modules peft_layers_to_transform"),
        (FACTORY.replace("finetuning_type: lora", "finetuning_type: full") + "lora_alpha: 8\npissa_init: true\noft_target: all\n",
         "lora_rank lora_alpha lora_target pissa_init oft_target"),
        (FACTORY + "oft_target: all\n", "oft_target"),
    ],
)  # fmt: skip
def test_keys_of_an_adapter_that_is_not_there_change_nothing(text: str, unread: str, tmp_path: Path) -> None:
    found = made(tmp_path, text)
    assert {account(found, key).fate for key in unread.split()} == {"no_effect"}


def test_embeddings_that_llamafactory_trains_as_wholes_are_said(tmp_path: Path) -> None:
    tokens = "add_tokens: <a>,<b>\nresize_vocab: true\n"
    assert account(made(tmp_path, FACTORY + tokens), "resize_vocab").fate == "left"
    named = made(tmp_path, FACTORY + tokens + "additional_target: embed_tokens,lm_head\n")
    assert account(named, "resize_vocab").fate == "same"


@pytest.mark.parametrize(
    ("path", "files", "found", "fate"),
    [
        ("json", "rows.jsonl", "rows.jsonl", "converted"),
        ("json", "[a.jsonl, b.jsonl]", "json", "left"),
        ("org/chats", "part.jsonl", "org/chats", "left"),
        ("FOLDER", "[part.jsonl]", "FOLDER/part.jsonl", "converted"),
        ("json", "{train: a.jsonl}", "json", "left"),
    ],
)
def test_files_of_a_data_set_are_found_where_they_lie(path: str, files: str, found: str, fate: str, tmp_path: Path) -> None:
    text = TRL.replace("dataset_name: trl-lib/Capybara\ndataset_config: en", f"datasets: [{{path: {path}, data_files: {files}}}]")
    imported = made(tmp_path, text.replace("FOLDER", str(tmp_path)))
    assert imported.config["data"]["train"][0]["path"] == found.replace("FOLDER", str(tmp_path))
    assert account(imported, "datasets.0.data_files").fate == fate


def test_true_is_no_number(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training.max_grad_norm +must be a number"):
        made(tmp_path, FULL + "max_grad_norm: true\n")


def test_a_loss_that_trl_adds_for_experts_is_said(tmp_path: Path) -> None:
    assert "router_aux_loss_coef" in account(made(tmp_path, TRL), "model_name_or_path").note
    assert not account(made(tmp_path, TRL + "router_aux_loss_coef: 0.0\n"), "model_name_or_path").note


def test_what_is_wrong_is_said_once_and_at_home(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as twice_read:
        made(tmp_path, FULL.replace("micro_batch_size: 2", "micro_batch_size: auto"))
    assert len(twice_read.value.problems) == 1
    with pytest.raises(ConfigError, match=r"theirs.yaml:4:\d+ +data.train +give each source a proportion"):
        made(tmp_path, TRL_LORA.replace("split: train_sft, columns: [messages], fraction: 0.25", "split: train_sft"))


def test_a_warm_up_of_one_step_is_one_of_two_as_in_axolotl(tmp_path: Path) -> None:
    found = made(tmp_path, FULL.replace("warmup_steps: 10", "warmup_steps: 1"))
    assert found.config["training"]["warmup_steps"] == 2
    assert account(found, "warmup_steps").ours == (("training.warmup_steps", 2),)


def test_no_warm_up_of_axolotl_wins_over_a_share(tmp_path: Path) -> None:
    found = made(tmp_path, FULL.replace("warmup_steps: 10", "warmup_steps: 0\nwarmup_ratio: 0.1"))
    assert "warmup_ratio" not in found.config["training"]
    assert found.config["training"]["warmup_steps"] == 0
    assert account(found, "warmup_ratio").fate == "no_effect"
    found = made(tmp_path, TRL + "warmup_steps: 0\nwarmup_ratio: 0.1\n")
    assert found.config["training"]["warmup_ratio"] == 0.1


def test_gpus_that_are_no_whole_groups_say_no_rows_per_step(tmp_path: Path) -> None:
    text = FULL + "context_parallel_size: 4\n"
    assert "global_batch_size" in made(tmp_path, text, gpus=8).config["training"]
    found = made(tmp_path, text, gpus=6)
    assert "global_batch_size" not in found.config["training"]
    assert any("(6 are no multiple of 4)" in question for question in found.open_questions)


def test_the_verb_prints_or_writes_and_never_over_a_file(tmp_path: Path) -> None:
    made(tmp_path, FULL)
    theirs, ours = str(tmp_path / "theirs.yaml"), tmp_path / "run.yaml"
    printed = CliRunner().invoke(cli, ["import", theirs, "--gpus", "8"])
    assert printed.exit_code == 0, printed.output
    assert "21 keys" in printed.stderr
    assert CliRunner().invoke(cli, ["import", theirs, "--gpus", "8", "--output", str(ours)]).exit_code == 0
    assert ours.read_text() == printed.stdout
    refused = CliRunner().invoke(cli, ["import", theirs, "--output", str(ours)])
    assert refused.exit_code == 2
    assert "--force" in refused.output
    assert ours.read_text() == printed.stdout
    assert CliRunner().invoke(cli, ["import", theirs, "--output", str(ours), "--force"]).exit_code == 0
    facts_of = json.loads(CliRunner().invoke(cli, ["import", theirs, "--json"]).stdout)
    assert (facts_of["project"], len(facts_of["accounts"])) == ("axolotl", 21)


def words_of(project: str) -> list[str]:
    known = projects()[project]
    return sorted({*known.carried, *known.defaults, *known.known_by, *known.names.values()} - {"do_train", *known.refused})


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 5000),
    st.floats(0, 1, allow_nan=False),
    st.sampled_from(
        ["", "auto", "none", "true", "linear", "alpaca", "a/b", "x.jsonl", "${HOME}", "no", "cosine_with_min_lr", "q,v"]
    ),
    st.lists(st.sampled_from(["a", "b"]), max_size=2),
    st.dictionaries(
        st.sampled_from(["path", "type", "split", "x"]), st.sampled_from(["a", "alpaca", "train[:5]", ""]), max_size=3
    ),
    st.lists(
        st.fixed_dictionaries({"path": st.just("a/b")}, optional={"type": st.just("alpaca"), "new": st.just(1)}), max_size=2
    ),
)
OTHERS = [
    "datasets",
    "rope_scaling",
    "warmup_ratio",
    "deepspeed",
    "fsdp_config",
    "report_to",
    "unheard_of",
    "eval_strategy",
    "plugins",
    "special_tokens",
    "save_steps",
    "trust_remote_code",
    "lr_scheduler_kwargs",
    "hub_token",
    "train_on_inputs",
]


@pytest.mark.parametrize("project", ["axolotl", "llamafactory", "trl"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_a_file_says_each_key_is_accounted_for_or_the_file_is_refused(project: Any, data: Any, tmp_path: Path) -> None:
    said = data.draw(st.dictionaries(st.sampled_from([*words_of(project), *OTHERS]), VALUES, max_size=8))
    base = {"do_train": True} if project == "llamafactory" else {"learning_rate": 1e-4}
    gpus = data.draw(st.sampled_from([None, 2]))
    try:
        found = made(tmp_path, write_yaml(base | said), of=project, gpus=gpus)
    except UserError:
        return
    assert_whole(found, tmp_path)


@pytest.mark.parametrize(
    ("name", "settings_of"),
    [
        ("linear", {}),
        ("cosine", {}),
        ("constant", {}),
        ("constant_with_warmup", {}),
        ("cosine_with_restarts", {"num_cycles": 3}),
        ("polynomial", {}),
        ("polynomial", {"power": 2.0, "lr_end": 1e-6}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ("cosine_with_min_lr", {"min_lr": 2e-5}),
        ("warmup_stable_decay", {"num_decay_steps": 20, "decay_type": "linear"}),
    ],
)
def test_the_rate_of_each_step_is_the_one_that_transformers_would_take(
    name: str, settings_of: dict[str, Any], tmp_path: Path
) -> None:
    import torch
    from transformers import get_scheduler

    written = {"learning_rate": 1e-4, "max_steps": 50, "warmup_steps": 10, "lr_scheduler_type": name, "dataset_name": "a/b"}
    training = config_from(made(tmp_path, write_yaml(written | {"lr_scheduler_kwargs": settings_of})).config).training
    ours = tiny_plan(
        optimization={
            "schedule": training.lr_scheduler_type,
            "num_steps": training.max_steps,
            "warmup_steps": training.warmup_steps,
            "learning_rate": training.learning_rate,
        }
        | {key: getattr(training, key) for key in ("min_lr_ratio", "decay_ratio", "polynomial_power", "num_cycles")}
    ).optimization
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    theirs = get_scheduler(
        name, optimizer, num_warmup_steps=10, num_training_steps=50, scheduler_specific_kwargs=settings_of or None
    )
    for step in range(50):
        assert learning_rate(step, ours) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9, abs=1e-20), step
        optimizer.step()
        theirs.step()


def test_facts_name_keys_that_are_there() -> None:
    for project in projects().values():
        for name in project.carried:
            assert counterpart(name) in keys(), name
        assert set(project.names.values()) <= {*project.known_by, *project.defaults, *project.carried, *project.names.values()}
    for setting in facts()["schedule_settings"].values():
        assert setting["ours"] in keys()
    owners = [name for project in projects().values() for name in project.known_by]
    assert len(owners) == len(set(owners))


def test_defaults_are_those_of_the_installed_libraries() -> None:
    from transformers import Seq2SeqTrainingArguments
    from trl import ModelConfig, ScriptArguments, SFTConfig

    def defaults(*kinds: Any) -> dict[str, Any]:
        return {field.name: field.default for kind in kinds for field in dataclasses.fields(kind)}

    trl = defaults(SFTConfig, ModelConfig, ScriptArguments)
    assert {key: trl[key] for key in projects()["trl"].defaults} == projects()["trl"].defaults
    transformers = defaults(Seq2SeqTrainingArguments)
    own = projects()["llamafactory"].defaults
    assert {key: transformers[key] for key in own if key in transformers} == {key: own[key] for key in own if key in transformers}
    assert {"learning_rate", "warmup_steps", "weight_decay", "lr_scheduler_type", "seed"} <= own.keys() & transformers.keys()
