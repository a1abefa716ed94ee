"""A table of mistakes that new users make: what is said, at which place, with which exit code, and that nothing was started."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import ray
from click.testing import CliRunner

from raytune.cli import cli

ROWS = '{"prompt": "Two and two?", "completion": "Four."}\n' * 4
DEMO = "model: {base: demo}\n"
RUN = DEMO + "data: {train: rows.jsonl, max_length: 256}\n"
LLAMA = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "vocab_size": 300,
    "max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Mistake:
    text: str
    """Of run.yaml."""
    place: str
    """`line:column` in it; or all of what stands for the place."""
    said: str
    """In what is printed."""
    verb: str = "check"
    more: tuple[str, ...] = ()
    """Further words on the command line."""
    files: dict[str, str | bytes] = field(default_factory=dict)
    """Beside run.yaml and rows.jsonl."""


MISTAKES = {
    # the file
    "a name that is nearly right": Mistake("", "run.yml", 'no such file. Did you mean "run.yaml"?', more=("run.yml",)),
    "a folder": Mistake(RUN, "folder", "a folder, not a file", more=("folder",), files={"folder/x": ""}),
    "a tab": Mistake("training:\n\tseed: 1\n", "2:1", "a tab in the indentation"),
    "a colon in text": Mistake("name: a: b\n", "1:8", "put the text in quotes"),
    "a bracket left open": Mistake("data: {train: [a.jsonl}\n", "1:23", "is not closed"),
    "not UTF-8": Mistake("", "broken.yaml:1:8", "not UTF-8 text", more=("broken.yaml",), files={"broken.yaml": b"name: a\xff"}),
    "a key twice": Mistake(RUN + "training:\n  seed: 1\n  seed: 2\n", "5:3", "duplicate key, first on line 4"),
    "two documents": Mistake(RUN + "---\nname: b\n", "3:1", "a second document"),
    "an include": Mistake(RUN + "training: !include t.yaml\n", "3:11", "tags such as !include are not allowed"),
    "a merge key": Mistake(RUN + "training: {<<: {seed: 1}}\n", "3:12", "merge keys (<<) are not supported"),
    "a token": Mistake("model: {base: hf_aaaaaaaaaaaaaaaaaaaaaaaa}\n", "1:15", "looks like a secret"),
    # forgotten
    "an empty file": Mistake("", "1:1", "nothing says which model is to be trained"),
    "no model": Mistake("data: {train: rows.jsonl}\n", "1:1", 'nothing says which model is to learn from "rows.jsonl"'),
    "no rows": Mistake("model: {base: org/model}\n", "1:1", 'nothing says what "org/model" is to learn from'),
    "training without rows": Mistake("model: {base: org/model}\n", "1:1", "is missing", verb="train"),
    "no model beside an override": Mistake(
        "name: a\n", "1:1", "which model is to be trained", verb="train", more=("training.seed=1",)
    ),
    # names of keys
    "a typing error": Mistake(RUN + "training: {learning_rat: 1e-4}\n", "3:12", 'Did you mean "learning_rate"?'),
    "a key one level too high": Mistake(RUN + "learning_rate: 1e-4\n", "3:1", "it belongs to training.learning_rate"),
    "transformers' name": Mistake(RUN + "per_device_eval_batch_size: 4\n", "3:1", "evaluation takes as many rows at once"),
    "TRL's name": Mistake(RUN + "completion_only_loss: true\n", "3:1", 'Did you mean "data.targets: completion"?'),
    "PEFT's name": Mistake(RUN + "adapter: {lora_alpha: 16}\n", "3:11", 'Did you mean "adapter.alpha"?'),
    "Axolotl's name": Mistake(RUN + "micro_batch_size: 4\n", "3:1", 'Did you mean "training.per_device_train_batch_size"?'),
    "LLaMA-Factory's name": Mistake(RUN + "stage: sft\n", "3:1", "(supervised fine-tuning): leave it out"),
    "a tracker": Mistake(RUN + "report_to: wandb\n", "3:1", '"tracking"'),
    "a flag that is off": Mistake(RUN + "bf16: false\n", "3:1", "Leave it out"),
    "a key of another method": Mistake(RUN + "adapter: {method: full, rank: 8}\n", "3:25", "it belongs to method lora or qlora"),
    # values
    "a number in quotes": Mistake(RUN + 'training: {learning_rate: "2e-4"}\n', "3:27", "must be a number > 0 or auto"),
    "a rank of zero": Mistake(RUN + "adapter: {rank: 0}\n", "3:17", "must be an integer >= 1, got 0"),
    "yes for true": Mistake(RUN + "training: {liger: yes}\n", "3:19", 'must be true or false or auto, got "yes"'),
    "not a number": Mistake(RUN + "training: {weight_decay: .nan}\n", "3:26", "must be a finite number"),
    "transformers' optimizer": Mistake(RUN + "training: {optimizer: adamw_torch}\n", "3:23", 'Did you mean "adamw"?'),
    "transformers' schedule": Mistake(RUN + "training: {lr_scheduler_type: constant_with_warmup}\n", "3:31", "The warm-up is"),
    "a method that is not there": Mistake(RUN + "adapter: {method: fourierft}\n", "3:19", "lora is the nearest"),
    "transformers' metric": Mistake(
        RUN + "checkpoint: {metric: eval_loss}\n",
        "3:22",
        'Did you mean "validation/loss"?',
        more=("data.validation_fraction=0.5",),
    ),
    # keys against each other
    "a longer warm-up than the run": Mistake(
        RUN + "training: {warmup_steps: 9, max_steps: 5}\n", "3:1", "is more than max_steps 5"
    ),
    "validation twice": Mistake(
        DEMO + "data: {train: rows.jsonl, validation: rows.jsonl, validation_fraction: 0.1}\n", "2:1", "not both"
    ),
    "evaluation of nothing": Mistake(RUN + "evaluation: {every_steps: 5}\n", "3:14", "nothing is evaluated"),
    "steps and epochs": Mistake(
        RUN + "checkpoint:\n  every_epochs: 0.5\n  every_steps: 5\n", "5:3", "checkpoint.every_epochs (0.5) says so in epochs"
    ),
    "early stopping by what is not evaluated": Mistake(
        DEMO
        + "data: {train: rows.jsonl, validation_fraction: 0.5}\ntraining:\n  early_stopping: {patience: 2, metric: train/loss}\n",
        "4:41",
        '"train/loss" is not measured here; these are: validation/loss',
    ),
    "early stopping without evaluations": Mistake(
        RUN + "training:\n  early_stopping:\n    patience: 2\n", "5:5", "nothing is evaluated"
    ),
    "a detector of overfitting without evaluations": Mistake(
        RUN + "training:\n  overfitting: {}\n", "4:3", "looks at evaluations, but nothing is evaluated"
    ),
    "NVMe without a disk": Mistake(
        RUN + "training: {zero: {offload_optimizer: nvme}}\n", "3:12", "needs training.zero.nvme_path"
    ),
    "nodes of no type": Mistake(RUN + "cluster: {nodes: 2}\n", "3:11", "without cluster.instance nothing reads it"),
    # files
    "rows that are not there": Mistake(DEMO + "data: {train: row.jsonl}\n", "2:15", '"row.jsonl" is not on this machine'),
    "an empty file of rows": Mistake(DEMO + "data: {train: none.jsonl}\n", "2:8", "is empty", files={"none.jsonl": ""}),
    "broken JSON": Mistake(
        DEMO + "data: {train: bad.jsonl}\n", "2:8", "bad.jsonl:3: not JSON", files={"bad.jsonl": ROWS[:50] + '\n{"prompt": \n'}
    ),
    "columns of no format": Mistake(
        DEMO + "data: {train: other.jsonl}\n", "2:8", "question", files={"other.jsonl": '{"question": "a", "reply": "b"}\n'}
    ),
    "a column that is not there": Mistake(
        DEMO + "data:\n  train:\n    path: rows.jsonl\n    format: prompt_completion\n    columns: {prompt: question}\n",
        "3:3",
        "question",
    ),
    "a format that the rows do not have": Mistake(
        DEMO + "data: {train: {path: rows.jsonl, format: messages}}\n", "2:8", "messages"
    ),
    "a template that is not there": Mistake(
        RUN, "command line: data.template=llama3", "chatml", more=("data.template=llama3",)
    ),
    "no targets": Mistake(
        DEMO + "data: {train: t.jsonl}\n",
        "2:8",
        "have no target",
        files={"t.jsonl": '{"messages": [{"role": "user", "content": "a"}]}\n'},
    ),
    # the model
    "a model that is no folder": Mistake(
        "model: {base: ./nowhere}\ndata: {train: rows.jsonl}\n", "1:15", "is not on this machine"
    ),
    "a folder without a model": Mistake(
        "model: {base: ./folder}\ndata: {train: rows.jsonl}\n", "1:9", "holds no config.json", files={"folder/x": ""}
    ),
    "a hub model that is not here": Mistake(
        "model: {base: org/nobody-has-this}\ndata: {train: rows.jsonl}\n", "1:9", "org/nobody-has-this"
    ),
    "a hub model that is not here, and bad rows": Mistake(
        "model: {base: org/nobody-has-this}\ndata: {train: none.jsonl}\n", "1:9", "2 problems", files={"none.jsonl": ""}
    ),
    "more tokens than positions": Mistake(
        DEMO + "data:\n  train: rows.jsonl\n  max_length: 100000\n", "4:3", "Set data.max_length to 2048 or less"
    ),
    "targets that match nothing": Mistake(RUN + "adapter: {target_modules: [q_prj]}\n", "3:11", "q_prj"),
    "a module that is not there": Mistake(RUN + "adapter: {modules_to_save: [embed]}\n", "3:11", "embed"),
    # machines and storage
    "more workers than CPUs": Mistake(RUN + "cluster: {workers: 4000}\n", "3:11", "The run does not fit"),
    "a GPU that is not there": Mistake(RUN + "cluster: {gpus_per_worker: 1}\n", "3:11", "the cluster has no GPU"),
    "FlashAttention on a CPU": Mistake(
        RUN, "command line: model.attention=flash_attention_2", "does not work", more=("model.attention=flash_attention_2",)
    ),
    "a misspelt instance": Mistake(RUN + "cluster: {instance: p5.48xlage}\n", "3:11", "p5.48xlarge"),
    "ZeRO-3 and compile": Mistake(RUN + "training: {compile: true, zero: {stage: 3}}\n", "3:", "Change one of the two"),
    "a file as storage": Mistake(RUN + "storage: rows.jsonl\n", "3:1", "is a file, not a folder"),
    "a bucket without a store": Mistake(RUN + "storage: s3://bucket/runs\n", "3:1", "Set data.store to a folder"),
    # sweeps and overrides
    "a space with a typing error": Mistake(
        RUN + "sweep:\n  space:\n    training.lr: [1e-4, 1e-3]\n", "5:5", 'Did you mean "training.learning_rate"?',
        more=("data.validation_fraction=0.5",),
    ),
    "a metric that nobody measures": Mistake(
        RUN + "sweep:\n  space: {training.seed: [1, 2]}\n  metric: validation/acc\n", "5:11", "is not measured here",
        more=("data.validation_fraction=0.5",),
    ),
    "train with a sweep": Mistake(
        RUN + "sweep: {space: {training.seed: [1, 2]}}\n", "3:1", "run it with `raytune sweep`", verb="train",
        more=("data.validation_fraction=0.5",),
    ),
    "an override with a typing error": Mistake(
        RUN, "command line: training.learnin_rate=1e-3", 'Did you mean "learning_rate"?', more=("training.learnin_rate=1e-3",)
    ),
    "an override of no position": Mistake(
        RUN, "command line: data.train.3.path=a.jsonl", "position 3 does not exist", more=("data.train.3.path=a.jsonl",)
    ),
    "training with a wrong value": Mistake(RUN + "training: {max_steps: 1.5}\n", "3:23", "must be an integer", verb="train"),
    "training on more tokens than positions": Mistake(
        DEMO + "data:\n  train: rows.jsonl\n  max_length: 100000\n", "4:3", "Set data.max_length", verb="train"
    ),
    "training targets that match nothing": Mistake(RUN + "adapter: {target_modules: [q_prj]}\n", "3:11", "q_prj", verb="train"),
}  # fmt: skip


def written(mistake: Mistake, folder: Path) -> list[str]:
    """The command line of a mistake, and its files below a folder."""
    files = {"run.yaml": mistake.text, "rows.jsonl": ROWS, **mistake.files}
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    file = [] if any("=" not in word for word in mistake.more) else ["run.yaml"]
    return [mistake.verb, *file, *mistake.more]


def found_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_with_its_place_and_nothing_is_started(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    mistake = MISTAKES[name]
    arguments = written(mistake, tmp_path)
    before, was_up = found_in(tmp_path), ray.is_initialized()
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 2, done.output
    assert mistake.said in done.stderr
    place = mistake.place if not mistake.place[0].isdigit() else f"run.yaml:{mistake.place}"
    line = next(line for line in done.stderr.splitlines() if re.search(r"\[E\d+\]$|^\S+:\d+:\d+  |^command line", line))
    assert line.startswith(place), done.stderr
    assert "Traceback" not in done.output
    assert done.stdout == ""
    assert found_in(tmp_path) == before, "no run folder, no store"
    assert ray.is_initialized() == was_up


def test_everything_wrong_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    text = (
        "model: {base: demo, attention: flash_attention_2}\n"
        "data:\n  train: none.jsonl\n  validation: other.jsonl\n  max_length: 100000\n"
        "adapter: {target_modules: [q_prj]}\ntraining: {compile: true, zero: {stage: 3}}\nstorage: rows.jsonl\n"
    )
    files: dict[str, str | bytes] = {"none.jsonl": "", "other.jsonl": '{"question": "a", "reply": "b"}\n'}
    written(Mistake(text, "", "", files=files), tmp_path)
    facts = json.loads(CliRunner().invoke(cli, ["check", "run.yaml", "--json"]).stdout)
    assert {(problem["line"], problem["key"]) for problem in facts["problems"]} == {
        (1, "model.attention"),
        (3, "data.train"),
        (4, "data.validation"),
        (5, "data.max_length"),
        (6, "adapter.target_modules"),
        (7, "training.zero.stage"),
        (8, "storage"),
    }
    assert {problem["id"] for problem in facts["problems"]} == {"E112"}


def test_what_is_right_is_said_with_what_was_looked_at_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    long = json.dumps({"prompt": "x" * 300, "completion": "y"})
    written(Mistake(RUN, "", "", files={"rows.jsonl": f"{ROWS}{long}\n"}), tmp_path)
    before = found_in(tmp_path)
    waived = ["data.limits.cut=0.2", "data.limits.lost=0.2"]
    done = CliRunner().invoke(cli, ["check", "run.yaml", *waived])
    assert (done.exit_code, done.stderr) == (0, "")
    assert "Looked at model demo (llama), its tokenizer and template, 5 rows of rows, the plan, in " in done.stdout
    assert "rows: 1 row of 5 rows without targets: they lie behind data.max_length, 256 tokens" in done.stdout
    assert found_in(tmp_path) == before
    seen = json.loads(CliRunner().invoke(cli, ["check", "run.yaml", "--json", *waived]).stdout)["seen"]
    assert seen["not_looked_at"] == []
    assert json.loads(CliRunner().invoke(cli, ["check", "run.yaml", "--json", "--fast"]).stdout)["seen"] is None


def test_what_lies_elsewhere_is_named_as_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    written(Mistake(DEMO + "data: {train: [rows.jsonl, org/rows, memory://x/rows.jsonl]}", "", ""), tmp_path)
    done = CliRunner().invoke(cli, ["check", "run.yaml"])
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("Not looked at")]
    for what in ("10.0.0.1:6379", "org/rows", "memory://x/rows.jsonl"):
        assert what in line


def test_files_that_lie_with_a_named_cluster_are_no_mistakes_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    text = "model: {base: /there/model}\ndata: {train: /there/rows.jsonl}\nstorage: /there/runs\n"
    written(Mistake(text, "", ""), tmp_path)
    done = CliRunner().invoke(cli, ["check", "run.yaml", "cluster.address=10.0.0.1:6379"])
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("Not looked at")]
    assert "/there/model" in line
    assert "/there/rows.jsonl" in line
