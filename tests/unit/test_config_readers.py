"""Every key of a config has a row that says who reads it, and what nothing reads is refused or said; nothing else is."""

import ast
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytune.config.checks.readers import READERS, unread
from raytune.config.load import ConfigError, config_from, dump_yaml, load_config, load_with_places
from raytune.config.reading.keys import keys
from raytune.config.sections.run import RunConfig
from raytune.errors import UserError
from raytune.plan.ahead import plan_ahead
from raytune.sweeps.space import check_space, trial_config, trials_of
from raytune.sweeps.trial import Trial
from tests.unit.plan_cases import planned
from tests.yaml_text import read_yaml

ROOT = Path(__file__).parents[2]
VALIDATED = {"data": {"train": "a.jsonl", "validation": "b.jsonl"}}
INT8 = {"method": "qlora", "quantization": "int8"}
NF4 = {"method": "qlora", "quantization": "nf4"}


def test_every_key_has_a_row_and_every_row_a_key() -> None:
    assert set(READERS) == set(keys())


@pytest.mark.parametrize("section", sorted({key.partition(".")[0] for key in READERS}))
def test_the_modules_of_a_row_read_the_key(section: str) -> None:
    rows = [(key, reader.modules) for key, reader in READERS.items() if key.partition(".")[0] == section]
    assert all(modules for _, modules in rows)
    for key, module in [(key, module) for key, modules in rows for module in modules]:
        name = key.rpartition(".")[2]
        if module == "cluster":  # templates, filled from `user`, the provider section
            templates = (ROOT / "cluster").rglob("*.j2")
            assert any(
                f"user.{key.removeprefix('provider.')}" in path.read_text() or f"kubernetes.{name}" in path.read_text()
                for path in templates
            ), key
        else:
            assert name in names_used(module), f"{module} does not use {name}"


@cache
def names_used(module: str) -> set[str]:
    """Attributes that a module looks at, fields that it declares, and texts in it, by which some code asks for an attribute."""
    tree = ast.parse((ROOT / "raytune" / Path(*module.split("."))).with_suffix(".py").read_text())
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    declared = {
        node.target.id for node in ast.walk(tree) if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    return (
        attributes
        | declared
        | {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    )


def test_needs_name_keys_that_exist() -> None:
    for reader in READERS.values():
        assert all(key in keys() for need in reader.needs for key in need.keys)


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "int8 and double quantisation": (
        {"adapter": INT8 | {"double_quantization": False}},
        "adapter.double_quantization",
        "adapter.quantization int8 does not read it; leave it out, or set adapter.quantization to nf4 or fp4",
    ),
    "int8 and compute dtype": ({"adapter": INT8 | {"compute_dtype": "bf16"}}, "adapter.compute_dtype", "int8 does not read it"),
    "int8 and storage": ({"adapter": INT8 | {"quant_storage": "uint8"}}, "adapter.quant_storage", "int8 does not read it"),
    "embeddings' rate without LoRA+": (
        {"adapter": {"lora_plus_embedding_rate": 1e-4}},
        "adapter.lora_plus_embedding_rate",
        "there is no LoRA+ without adapter.lora_plus_ratio",
    ),
    "evaluation without rows": ({"evaluation": {"every_steps": 10}}, "evaluation.every_steps", "nothing is evaluated"),
    "evaluation rows without rows": ({"evaluation": {"max_rows": 10}}, "evaluation.max_rows", "or give one of the two"),
    "best without rows": ({"checkpoint": {"keep_best": 3}}, "checkpoint.keep_best", "nothing is evaluated"),
    "mode without rows": ({"checkpoint": {"mode": "max"}}, "checkpoint.mode", "nothing is evaluated"),
    "metric without rows": ({"checkpoint": {"metric": "validation/perplexity"}}, "checkpoint.metric", "nothing is evaluated"),
    "adam under adafactor": (
        {"training": {"optimizer": "adafactor", "adam_beta2": 0.99}},
        "training.adam_beta2",
        "training.optimizer adafactor does not read it",
    ),
    "epsilon under lion": ({"training": {"optimizer": "lion", "adam_epsilon": 1e-6}}, "training.adam_epsilon", "lion does not"),
    "minimum of a constant": (
        {"training": {"lr_scheduler_type": "constant", "min_lr_ratio": 0.1}},
        "training.min_lr_ratio",
        "constant does not read it",
    ),
    "decay of a cosine": ({"training": {"decay_ratio": 0.3}}, "training.decay_ratio", "or set training.lr_scheduler_type to wsd"),
    "split of a file": (
        {"data": {"train": [{"path": "a.jsonl", "split": "test"}]}},
        "data.train.0.split",
        "this path is a file or a pattern, which has no splits",
    ),
    "split of a pattern": (
        {"data": {"train": [{"path": "rows/*", "split": "train[:90%]"}]}},
        "data.train.0.split",
        "this path is a file or a pattern, which has no splits",
    ),
    "split of the demo": (
        {"evaluation": {"generation": {"rows": {"path": "demo:test", "split": "test"}}}},
        "evaluation.generation.rows.0.split",
        "has no splits",
    ),
    "template of plain text": (
        {"data": {"train": [{"path": "a.txt", "format": "text"}], "template": "chatml"}},
        "data.template",
        "all rows are plain text",
    ),
    "metric of a run beside a sweep's": (
        {**VALIDATED, "checkpoint": {"metric": "validation/perplexity"}, "sweep": {"space": {"adapter.rank": [4, 8]}}},
        "checkpoint.metric",
        "ranked by sweep.metric, validation/loss",
    ),
    "no resume in a sweep": (
        {**VALIDATED, "checkpoint": {"resume": False}, "sweep": {"space": {"adapter.rank": [4, 8]}}},
        "checkpoint.resume",
        "trials of a sweep are always continued",
    ),
}

READ: dict[str, dict[str, Any]] = {
    "4 bits": {"adapter": NF4 | {"double_quantization": False, "compute_dtype": "bf16", "quant_storage": "uint8"}},
    "LoRA+": {"adapter": {"lora_plus_ratio": 4.0, "lora_plus_embedding_rate": 1e-4}},
    "validation rows": VALIDATED
    | {"evaluation": {"every_steps": 10, "max_rows": 3}, "checkpoint": {"keep_best": 3, "mode": "max"}},
    "held-out rows": {"data": {"validation_fraction": 0.1}, "evaluation": {"every_steps": 10}},
    "nothing wished of no evaluation": {"evaluation": {"at_start": False}, "checkpoint": {"keep_best": 0, "resume": False}},
    "defaults that are written": {"training": {"optimizer": "lion", "adam_epsilon": 1e-8}, "evaluation": {"at_start": True}},
    "adam": {"training": {"optimizer": "paged_adamw_8bit", "adam_beta1": 0.8, "adam_beta2": 0.99, "adam_epsilon": 1e-6}},
    "split of a hub set": {"data": {"train": [{"path": "owner/rows", "split": "test"}]}},
    "split of a folder behind a URL": {"data": {"train": [{"path": "s3://bucket/rows/", "split": "test"}]}},
    "split of a folder": {"data": {"train": [{"path": "/data/saved", "split": "test"}]}},
    "template for questions": {
        "data": {"train": [{"path": "a.txt", "format": "text"}], "template": "chatml"},
        "evaluation": {"generation": {"rows": "b.jsonl"}},
    },
    "all of plain text": {"data": {"train": [{"path": "a.txt", "format": "text", "split": "train"}], "targets": "all"}},
    "template for one of two": {"data": {"train": [{"path": "a.txt", "format": "text"}, "b.jsonl"], "template": "chatml"}},
    "the sweep's own metric": {
        **VALIDATED,
        "checkpoint": {"metric": "validation/perplexity"},
        "sweep": {"space": {"adapter.rank": [4, 8]}, "metric": "validation/perplexity"},
    },
    "a recipe's epochs under a shorter run": {"training": {"num_train_epochs": 3, "max_steps": 5, "warmup_ratio": 0.1}},
    "a disk that nothing is put on": {"training": {"zero": {"nvme_path": "/nvme"}}},
    "a node type": {"cluster": {"nodes": 4, "spot": True}},
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_nothing_reads_is_refused_at_its_place(case: str, tmp_path: Path) -> None:
    sections, key, message = REFUSED[case]
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(sections))
    with pytest.raises(ConfigError) as caught:
        load_config([path])
    (problem,) = caught.value.problems
    assert (problem.id, problem.key) == ("E105", key)
    assert message in problem.message
    line = path.read_text().splitlines()[(problem.place.line or 0) - 1]
    assert line.strip().lstrip("- ").startswith(key.rpartition(".")[2])


@pytest.mark.parametrize("case", READ)
def test_what_is_read_or_asks_for_nothing_is_not_refused(case: str) -> None:
    config = config_from(READ[case])
    assert config_from(read_yaml(dump_yaml(config))) == config
    assert config_from(read_yaml(dump_yaml(config, full=True))) == config
    assert config_from(config) == config


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "lion"])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_a_dump_of_all_keys_wishes_for_nothing(method: str, optimizer: str, schedule: str) -> None:
    training = {"optimizer": optimizer, "lr_scheduler_type": schedule}
    config = config_from({"adapter": {"method": method}, "training": training})
    dumped = json.loads(config.model_dump_json())
    assert config_from(dumped) == config
    assert not unread(config_from(dumped))


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        (
            {"training": {"num_train_epochs": 3, "max_steps": 5}},
            "num_train_epochs is 3.0, but training.max_steps (5) wins",
        ),
        (
            {"training": {"warmup_ratio": 0.5, "warmup_steps": 2}},
            "warmup_ratio is 0.5, but training.warmup_steps (2) wins",
        ),
        ({"training": {"zero": {"nvme_path": "/nvme"}}}, 'training.zero.nvme_path is "/nvme", but nothing is offloaded to nvme'),
        ({"model": {"base": "demo", "revision": "main"}}, "model.base demo is no model of the hub"),
        ({"adapter": INT8 | {"double_quantization": True}}, "adapter.double_quantization is true, but adapter.quantization int8"),
        ({"cluster": {"instance": "p5.48xlarge"}}, "cluster.instance is p5.48xlarge, but the cluster has no GPUs"),
        (
            {"training": {"optimizer": "lion", "adam_epsilon": 1e-8}},
            "training.adam_epsilon is 1e-08, but training.optimizer lion does not read it.",
        ),
    ],
)
def test_where_nothing_is_lost_the_plan_says_so(sections: dict[str, Any], sentence: str) -> None:
    config_from(sections)
    assert any(sentence in reason for reason in planned(**sections).reasons)


@pytest.mark.parametrize(("key", "value"), [("nodes", 2), ("spot", True)])
def test_nodes_of_no_type_are_refused_where_a_run_is_planned_on_what_is_there(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"cluster\.{key} is {str(value).lower()}, but without cluster\.instance nothing"):
        planned(cluster={key: value})
    config = config_from({"cluster": {"instance": "p5.48xlarge", key: value}, "data": {"train": "x.jsonl"}})
    assert plan_ahead(config, 10_000_000)


# --- sweeps


def sweep(space: dict[str, Any], **sections: Any) -> RunConfig:
    return config_from({**VALIDATED, **sections, "sweep": {"space": space, "trials": 4}})


def test_a_key_of_the_run_that_only_some_trials_read_is_left_out_of_the_others() -> None:
    space = {"training.optimizer": ["adamw", "adafactor"], "adapter.method": ["full", "lora"]}
    run = sweep(space, training={"adam_beta2": 0.95}, adapter={"rank": 4})
    check_space(run)
    beta2 = {trial.values["training.optimizer"]: trial_config(run, trial).training.adam_beta2 for trial in trials_of(run)}
    assert beta2 == {"adamw": 0.95, "adafactor": 0.999}
    for trial in trials_of(run):
        config = trial_config(run, trial)
        assert not [key for key in unread(config) if key.is_refused]
        assert config_from(read_yaml(dump_yaml(config))) == config


def test_a_key_of_the_run_that_no_trial_reads_is_refused(tmp_path: Path) -> None:
    text = """\
data: {validation: demo:validation}
training:
  adam_beta2: 0.95
sweep:
  space:
    training.optimizer: [adafactor]
"""
    (tmp_path / "sweep.yaml").write_text(text)
    run, places = load_with_places([tmp_path / "sweep.yaml"])
    with pytest.raises(ConfigError) as caught:
        check_space(run, places)
    (problem,) = caught.value.problems
    assert (problem.key, problem.place.line) == ("training.adam_beta2", 3)
    assert "adafactor does not read it" in problem.message


def test_a_key_that_depends_on_nothing_drawn_is_refused_before_any_trial() -> None:
    with pytest.raises(ConfigError, match=r"training\.decay_ratio"):
        sweep({"adapter.rank": [4, 8]}, training={"decay_ratio": 0.3})


def test_a_drawn_key_needs_a_condition_where_nothing_reads_it() -> None:
    quantization = {"adapter.quantization": ["nf4", "int8"]}
    storage = {"choice": ["uint8", "auto"]}
    qlora = {"method": "qlora"}
    with pytest.raises(ConfigError, match=r"int8 does not read it; .* or draw it `when` something reads it"):
        check_space(sweep(quantization | {"adapter.quant_storage": storage}, adapter=qlora))
    conditional = storage | {"when": "adapter.quantization == 'nf4'"}
    check_space(sweep(quantization | {"adapter.quant_storage": conditional}, adapter=qlora))
    with pytest.raises(ConfigError, match="wsd"):
        check_space(sweep({"training.lr_scheduler_type": ["cosine", "wsd"], "training.decay_ratio": [0.1, 0.3]}))


def test_a_condition_that_does_not_hold_leaves_the_runs_own_value_out_where_nothing_reads_it() -> None:
    space = {
        "training.lr_scheduler_type": ["cosine", "wsd"],
        "training.decay_ratio": {"choice": [0.1, 0.3], "when": "training.lr_scheduler_type == 'wsd'"},
    }
    run = sweep(space, training={"decay_ratio": 0.5})
    check_space(run)
    config = trial_config(run, Trial(number=0, values={"training.lr_scheduler_type": "cosine"}))
    assert config.training.decay_ratio == 0.2
