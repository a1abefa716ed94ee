"""Claims about hints: names of other trainers have a true answer, and no hint means the opposite of what was written."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from raytune.config.load import ConfigError, load_config
from raytune.config.reading.keys import choices, keys, type_at
from raytune.config.words.document import explain
from raytune.config.words.foreign_names import FILE, answer_for_name, answer_for_value, table
from raytune.config.words.hints import hint_for_key, hint_for_value
from raytune.config.words.near_words import are_opposite, near_words
from raytune.errors import UserError

ANSWERS = sorted({answer.ours for answer in table().names.values() if answer.ours})
MEANT = sorted({answer.ours for meant in table().by_value.values() for answer in meant.values() if answer.ours})
VALUES = sorted({(key, answer.ours) for key, meant in table().values.items() for answer in meant.values() if answer.ours})


def message_of(text: str, folder: Path) -> str:
    path = folder / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config([path])
    (problem,) = caught.value.problems
    return problem.message


# --- the table


@pytest.mark.parametrize("ours", [*ANSWERS, *MEANT])
def test_every_counterpart_is_a_key_of_ours_and_its_value_is_accepted(ours: str):
    path, _, value = ours.partition(": ")
    assert path in keys()
    if value:
        more = ["adapter.method=qlora"] if path.startswith("adapter.quant") else []
        more += ["data.validation_fraction=0.1"] if path.startswith(("checkpoint.", "evaluation.every")) else []
        more += ["data.train.path=rows.jsonl"] if path.startswith("data.train.") else []
        load_config([], [f"{path}={value}", *more])


def test_every_value_is_one_that_its_key_takes():
    for key, ours in VALUES:
        assert key in keys()
        fixed = [str(choice).lower() for choice in choices(type_at(tuple(key.split("."))))]
        assert ours in fixed or ours in ("true", "false") or key.endswith(".metric"), (key, ours)


def test_no_value_of_ours_is_called_foreign():
    for key, meant in table().values.items():
        taken = {str(choice) for choice in choices(keys()[key].annotation)}
        assert not taken & set(meant), key


def test_a_name_stands_once_in_the_table():
    facts = yaml.safe_load(FILE.read_text())
    names = [name for written in facts["counterparts"].values() for name in written.split()]
    names += [name for row in facts["no_counterpart"] for name in row["of"].split()]
    assert sorted({name for name in names if names.count(name) > 1}) == []
    assert len(names) > 800


def test_what_is_said_of_a_name_is_said_of_one_in_the_table():
    facts = yaml.safe_load(FILE.read_text())
    counterparts = {name for written in facts["counterparts"].values() for name in written.split()}
    converted = [name for row in facts["conversions"] for name in row["of"].split()]
    assert set(converted) <= counterparts
    assert len(converted) == len(set(converted))
    words = {word for meant in facts["values"].values() for written in meant.values() for word in written.split()}
    assert {word for row in facts["value_conversions"] for word in row["of"].split()} <= words


# --- complete for what is installed


def fields_of_other_trainers() -> dict[str, list[str]]:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from transformers import TrainingArguments

    from raytune.model.adapters import ADAPTERS

    adapters = [PEFT_TYPE_TO_CONFIG_MAPPING[row.peft_type] for row in ADAPTERS.values() if row.peft_type]
    theirs = [each for each in adapters if each.__module__.startswith("peft.")]
    found = {each.__name__: [field.name for field in dataclasses.fields(each)] for each in (TrainingArguments, *theirs)}
    trl = pytest.importorskip("trl")
    configs = (trl.SFTConfig, trl.ModelConfig, trl.ScriptArguments)
    return found | {each.__name__: [field.name for field in dataclasses.fields(each)] for each in configs}


def test_every_field_of_transformers_trl_and_peft_has_an_answer():
    leaves = {path.rpartition(".")[2] for path in keys()}
    missing = {
        trainer: [name for name in names if name not in leaves and answer_for_name("", name) is None]
        for trainer, names in fields_of_other_trainers().items()
    }
    assert not any(missing.values()), missing


def test_every_optimizer_schedule_and_adapter_of_transformers_and_peft_has_an_answer():
    from peft import PeftType
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    for key, members in (
        ("training.optimizer", OptimizerNames),
        ("training.lr_scheduler_type", SchedulerType),
        ("adapter.method", PeftType),
    ):
        ours = choices(keys()[key].annotation)
        words = [member.value.lower() for member in members]
        assert [word for word in words if word not in ours and answer_for_value(key, word) is None] == []


# --- what is said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("report_to: wandb", '"tracking"'),
        ("freeze: [embed]", '"strategy.freeze"'),
        ("freeze_trainable_layers: 2", '"strategy.freeze.first_layers"? It counts frozen layers here, from the first one'),
        ("unfrozen_parameters: [lm_head]", '"strategy.freeze.train_only"? Set adapter.method: full with it'),
        ("training: {llrd: 0.9}", '"strategy.layer_rate_decay"'),
        ("embedding_learning_rate: 1e-5", '"strategy.rate_scales"? A rate there is a factor of training.learning_rate here'),
        ("model: {attention_dropout: 0.1}", "dropout.attention"),
        ("freeze_vision_tower: true", "raytune has no such setting"),
        ("lr_finder: true", "raytune find-rate RUN.yaml"),
        ("training: {early_stopping_patience: 3}", '"training.early_stopping.patience"'),
        ("early_stopping_threshold: 0.1", '"training.early_stopping.min_delta"'),
        ("sweep: {early_stopping: {}, space: {training.seed: [1, 2]}}\ndata: {validation_fraction: 0.1}", '"sweep.stopping"'),
        ("optim: adamw_torch", '"training.optimizer: adamw"'),
        ("optim: sgd", '"training.optimizer"? sgd is no value: raytune trains with'),
        ("training: {optimizer: adamw_torch_fused}", 'Did you mean "adamw"?'),
        ("training: {optimizer: paged_adamw_32bit}", 'Did you mean "paged_adamw"?'),
        ("training: {optimizer: ademamix}", "; raytune trains with adamw"),
        ("training: {lr_scheduler_type: constant_with_warmup}", 'Did you mean "constant"? The warm-up is training.warmup_steps'),
        ("training: {lr_scheduler_type: cosine_with_min_lr}", 'Did you mean "cosine"? Where it ends is training.min_lr_ratio'),
        ("per_device_eval_batch_size: 8", "evaluation takes as many rows at once as training does"),
        ("overwrite_output_dir: true", "it never overwrites a run"),
        ("stage: sft", "supervised fine-tuning): leave it out"),
        ("stage: dpo", "raytune has no reward models"),
        ("gradient_checkpointing_kwargs: {use_reentrant: false}", "no settings but training.gradient_checkpointing"),
        ("training: {gradient-checkpointing-kwargs: {}}", "no settings but training.gradient_checkpointing"),
        ("lora_dropout: 0.1", '"adapter.dropout"'),
        ("adapter: {peft_use_dora: true}", '"use_dora"'),
        ("load_in_4bit: true", '"adapter.method: qlora"'),
        ("load_in_4bit: false", "Leave it out"),
        ("bf16: false", "Leave it out"),
        ("bf16: true", '"training.precision: bf16"'),
        ("flash_attention: true", '"model.attention: flash_attention_2"'),
        ("sample_packing: false", '"data.packing: none"'),
        ("data: {packing: true}", 'Did you mean "best_fit"?'),
        ("val_set_size: 0.05", '"data.validation_fraction"'),
        ("micro_batch_size: 2", '"training.per_device_train_batch_size"'),
        ("group_by_length: true", '"data.packing: token_budget"'),
        ("training: {neftune_alpha: 5}", '"neftune_noise_alpha"'),
        ("completion_only_loss: true", '"data.targets: completion"'),
        ("train_on_inputs: false", '"data.targets: assistant"'),
        ("deepspeed: ds_zero3.json", '"training.zero.overrides"? raytune writes DeepSpeed\'s JSON itself'),
        ("fsdp: full_shard", '"training.zero"? ZeRO shards as FSDP does'),
        ("training: {zero: {stage: zero3}}", 'Did you mean "3"?'),
        ("load_best_model_at_end: false", '"checkpoint.keep_best: 0"'),
        ("cutoff_len: 2048", '"data.max_length"'),
        ("finetuning_type: freeze", '"adapter.method"? freeze is no value: it is method full here, with strategy.freeze'),
        ("finetuning_type: lora", '"adapter.method"'),
        ("adapter: {method: dora}", "adapter.use_dora: true"),
        ("adapter: llama_adapter", "prompt_tuning is the nearest"),
        ("adapter: {method: ptuning_v2}", 'Did you mean "prefix_tuning"?'),
        ("adapter: {method: houlsby}", 'Did you mean "bottleneck"?'),
        ("adapter: {method: adalora, target_r: 8}", '"adapter.rank"'),
        ("adapter: {method: adalora, init_r: 12}", '"adapter.initial_rank"'),
        ("adapter: {method: adalora, tinit: 200}", "It is a share of the run's steps here"),
        ("adapter: {method: bottleneck, reduction_factor: 16}", '"adapter.reduction"'),
        ("adapter: {method: oft, oft_dropout: 0.1}", '"dropout"'),
        ("evals_per_epoch: 4", '"evaluation.every_epochs"? It counts epochs between two evaluations'),
        ("training: {save_every_epochs: 1}", '"checkpoint.every_epochs"'),
        ("eval_strategy: epoch", '"evaluation.every_epochs: 1"'),
        ("save_strategy: epoch", '"checkpoint.every_epochs: 1"'),
        ("wandb_project: mine", '"tracking.wandb.project"'),
        ("swanlab_project: mine", "raytune has no such setting: metrics go to metrics.jsonl"),
        ("dpo_beta: 0.1", "no preference or reinforcement learning"),
        ("evaluation: {batch_size: 4}", "it belongs to evaluation.generation.batch_size"),
        ("checkpoint: {metric: validation/loss, mode: maximize}\ndata: {validation_fraction: 0.1}", 'Did you mean "max"?'),
    ],
)
def test_a_name_of_another_trainer_is_answered_by_what_it_is_here(text: str, said: str, tmp_path: Path):
    assert said in message_of(text, tmp_path)


def test_explain_and_a_space_of_a_sweep_answer_foreign_names_too(tmp_path: Path):
    with pytest.raises(UserError, match=r"by their options in tracking\.$"):
        explain("swanlab")
    with pytest.raises(UserError, match=r"training\.optimizer"):
        explain("optim")
    text = "sweep: {space: {training.label_smoothing: [0, 0.1]}}\ndata: {validation_fraction: 0.1}"
    assert "mean cross-entropy" in message_of(text, tmp_path)


# --- never the opposite


def opposites_of(name: str) -> list[str]:
    """Names that say the opposite of a name, made of its words."""
    pairs = [("min", "max"), ("train", "eval"), ("include", "exclude"), ("start", "end"), ("first", "last"), ("keep", "drop")]
    pairs += [
        ("save", "load"),
        ("best", "worst"),
        ("input", "output"),
        ("validation", "train"),
        ("steps", "epochs"),
        ("low", "high"),
    ]
    words = name.split("_")
    swapped = {
        "_".join([*words[:i], other, *words[i + 1 :]])
        for i, word in enumerate(words)
        for pair in pairs
        for one, other in (pair, pair[::-1])
        if word == one
    }
    negated = {f"{negation}_{name}" for negation in ("no", "disable", "skip", "without", "not", "never", "ignore", "dont")}
    return sorted(swapped | negated | {f"un{name}", f"non{name}", f"no{name}", f"dis{name}"})


@pytest.mark.parametrize(("place", "path"), enumerate(sorted(keys())), ids=sorted(keys()))
def test_the_opposite_of_a_key_never_hints_at_it(place: int, path: str, pytestconfig: pytest.Config):
    """Half of the opposites of each key often, and not the same half for each; with `--slow` all."""
    section, _, leaf = path.rpartition(".")
    opposites = opposites_of(leaf)
    for opposite in opposites if pytestconfig.getoption("--slow") else opposites[place % 2 :: 2]:
        if answer_for_name(section, opposite) is None:
            hint = hint_for_key(section, opposite, "lora")
            assert f'"{leaf}"' not in hint, opposite
            assert f'"{path}"' not in hint, opposite


@given(st.sampled_from(sorted(keys())), st.sampled_from(sorted(keys())), st.data())
def test_no_hint_at_all_is_the_opposite_of_what_was_written(one: str, other: str, data: Any):
    """Whatever words of keys are put together, mistyped or negated."""
    words = [word for path in (one, other) for word in path.rpartition(".")[2].split("_")]
    more = ["no", "max", "min", "train", "eval", "exclude", "include", "disable", "start", "end"]
    name = "_".join(data.draw(st.lists(st.sampled_from([*words, *more]), min_size=1, max_size=4)))
    section = one.rpartition(".")[0]
    hint = hint_for_key(section, name, "lora")
    if answer_for_name(section, name) is None and 'Did you mean "' in hint:
        assert not are_opposite(name, hint.split('"')[1].rpartition(".")[2])


@pytest.mark.parametrize(
    ("name", "section", "never"),
    [
        ("no_resume", "checkpoint", "resume"),
        ("min_grad_norm", "training", "max_grad_norm"),
        ("include_modules", "adapter", "exclude_modules"),
        ("per_device_test_batch_size", "training", "per_device_train_batch_size"),
        ("eval_rows", "evaluation", "train"),
        ("num_train_steps", "training", "num_train_epochs"),
        ("max_lr_ratio", "training", "min_lr_ratio"),
        ("keep_worst", "checkpoint", "keep_best"),
        ("untrust_remote_code", "model", "trust_remote_code"),
        ("at_end", "evaluation", "at_start"),
        ("keep_first", "checkpoint", "keep_last"),
        ("warmdown_steps", "training", "warmup_steps"),
    ],
)
def test_some_opposites_by_name(name: str, section: str, never: str):
    assert f'"{never}"' not in hint_for_key(section, name, "lora")


def test_typing_errors_still_lead_to_their_key():
    for written, meant in (("learning_rat", "learning_rate"), ("wamup_ratio", "warmup_ratio"), ("sed", "seed")):
        assert hint_for_key("training", written, "lora") == f'. Did you mean "{meant}"?'
    assert near_words("unpacked", ["packed", "stacked"]) == ["stacked"]
    assert hint_for_value("training.precision", keys()["training.precision"].annotation, "bf61") == '. Did you mean "bf16"?'
    assert answer_for_value("training.precision", "bf61") is None
    assert answer_for_name("training", "learning_rat") is None
    assert answer_for_name("", "wandb_anything_new") == answer_for_name("", "comet")
