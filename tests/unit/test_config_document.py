"""Claims about what is generated from the schema's fields: explanations, tables and the JSON Schema."""

import json
import shlex
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner

from raytune.cli import cli
from raytune.config import problems
from raytune.config.load import ConfigError, config_from, dump_yaml, load_config
from raytune.config.reading.keys import example_of, keys, keys_in
from raytune.config.words.document import SCHEMA_FILE, explain, explanation_facts, json_schema, markdown_tables, schema_text
from raytune.config.words.error_pages import ERROR_PAGES
from raytune.errors import UserError
from tests.yaml_text import read_yaml

SECTIONS = sorted({path.partition(".")[0] for path in keys()})


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft7Validator:
    return jsonschema.Draft7Validator(json_schema())


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_is_explained_with_its_sentence_type_and_default(section: str):
    for path, key in keys().items():
        if path.partition(".")[0] == section:
            text = " ".join(explain(path).split())
            assert key.sentence, path
            assert " ".join(key.sentence.split()) in text, path
            assert explanation_facts(path)["type"] in text, path
            for below in keys_in(path):
                assert below.path in text, path


@pytest.mark.parametrize("subject", ["", "training", "data.train.0.path", "training.", "learning_rate", "e101", "E111"])
def test_a_subject_may_be_nothing_a_section_a_position_a_bare_leaf_or_an_error(subject: str):
    assert explain(subject)
    assert json.loads(json.dumps(explanation_facts(subject)))["ok"]


@pytest.mark.parametrize(
    ("subject", "near"),
    [
        ("lora_r", "adapter.rank"),
        ("training.learning_rat", "training.learning_rate"),
        ("every_steps", "checkpoint.every_steps"),
        ("quantisation", "adapter.quantization"),
        ("E999", "raytune explain"),
        ("x y", "raytune explain"),
    ],
)
def test_an_unknown_subject_leads_on(subject: str, near: str):
    with pytest.raises(UserError, match=near):
        explain(subject)


def test_there_is_a_page_for_every_kind_of_problem():
    ids = {value for value in vars(problems).values() if isinstance(value, str) and value.startswith("E1")}
    assert ids == set(ERROR_PAGES)


@pytest.mark.parametrize("id", ERROR_PAGES)
def test_the_examples_of_an_error_page_are_refused_and_accepted_as_it_says(id: str, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("data: {train: {path: demo:train, max_rows: 20}}")
    page, path = ERROR_PAGES[id], tmp_path / "example.yaml"
    for text, expected in ((page.wrong, 2), (page.right, 0)):
        path.write_text(text)
        arguments = shlex.split(text)[1:] if text.startswith("raytune ") else ["check", str(path)]
        arguments += [] if "base:" in text or path.name not in arguments[1] else ["model.base=demo"]
        done = CliRunner().invoke(cli, [*arguments, "--json", *(["--fast"] if id != "E112" else [])])
        assert done.exit_code == expected, done.output
        assert [problem["id"] for problem in json.loads(done.stdout).get("problems", [])] == ([id] if expected else [])


def test_the_shipped_schema_is_the_generated_one():
    """Run `python -m raytune.config.words.document --write` after a change of a field."""
    assert SCHEMA_FILE.read_text(encoding="utf-8") == schema_text()


def test_the_schema_is_valid_draft_7_and_describes_every_key():
    schema = json_schema()
    jsonschema.Draft7Validator.check_schema(schema)
    nodes = list(schema_nodes(schema))
    assert not [node for node in nodes if "$ref" in node and len(node) > 1]
    assert not [node for node in nodes if "properties" in node and node.get("additionalProperties") is not False]
    described = [child for node in nodes for child in node.get("properties", {}).values()]
    assert all(child.get("description") for child in described)


def schema_nodes(schema):
    if isinstance(schema, list):
        for item in schema:
            yield from schema_nodes(item)
    elif isinstance(schema, dict):
        yield schema
        for value in schema.values():
            yield from schema_nodes(value)


ACCEPTED = [
    {},
    {"data": {"train": "a.jsonl"}},
    {"data": {"train": {"path": "a.jsonl"}, "validation": ["a.jsonl", {"path": "b", "format": "text"}]}},
    {"checkpoint": {"every": "15m"}},
    {"checkpoint": {"every": 900}},
    {"adapter": {"rank": 4}},
    {"adapter": {"method": "full"}},
    {"adapter": {"method": "qlora", "quantization": "int8", "target_modules": ["q_proj"]}},
    {"training": {"learning_rate": 2e-4, "zero": {"stage": 3, "overrides": {"any": [1, {"thing": None}]}}}},
]
REFUSED = [
    {"traning": {}},
    {"data": {"train": 3}},
    {"data": {"train": [{"format": "text"}]}},
    {"adapter": {"method": "full", "rank": 4}},
    {"adapter": {"method": "lora", "quantization": "nf4"}},
    {"adapter": {"rank": 0}},
    {"training": {"optimizer": "sgd"}},
    {"training": {"tf32": "yes"}},
    {"name": "Bad Name"},
]


@pytest.mark.parametrize("data", ACCEPTED + REFUSED, ids=str)
def test_the_schema_accepts_what_loading_accepts(data: dict, validator: jsonschema.Draft7Validator):
    errors = list(validator.iter_errors(data))
    try:
        config_from(data)
        loads = True
    except ConfigError:
        loads = False
    assert loads == (data in ACCEPTED) == (not errors)


def test_the_schema_accepts_what_is_dumped(validator: jsonschema.Draft7Validator):
    for overrides in ([], ["adapter.method=qlora"], ["evaluation.generation.rows=a.jsonl", "checkpoint.every=1h"]):
        dumped = read_yaml(dump_yaml(load_config([], overrides), full=True))
        validator.validate(dumped)


@pytest.mark.parametrize("section", SECTIONS)
def test_the_examples_of_keys_fit_the_schema(section: str, validator: jsonschema.Draft7Validator):
    for path, key in keys().items():
        if path.partition(".")[0] == section and not key.is_section:
            assert not list(validator.iter_errors(example_with_what_it_needs(key))), path


def example_with_what_it_needs(key: Any) -> dict[str, Any]:
    data = nested(key.path.split("."), example_of(key))
    if key.path.startswith("adapter.") and key.path != "adapter.method":
        data["adapter"]["method"] = key.methods[-1]
    if sweep := data.get("sweep"):
        space = {"adapter.rank": [4, 8]}
        sweep["space"] = {"adapter.rank": sweep["space"]} if key.path.startswith("sweep.space.") else sweep.get("space", space)
        if key.methods and key.path != "sweep.stopping.method":
            sweep["stopping"]["method"] = key.methods[-1]
    of_data = data.get("data", {})
    benchmarks = (of_data.get("quality") or {}).get("benchmarks")
    for rows in (*(of_data.get(name) for name in ("train", "validation", "test")), benchmarks):
        if isinstance(rows, dict):
            rows.setdefault("path", "a.jsonl")
    if isinstance(fold := data.get("data", {}).get("fold"), dict):
        data["data"]["fold"] = {"index": 0, "of": 5} | fold
    if isinstance(phase := data.get("strategy", {}).get("unfreeze"), dict):
        data["strategy"]["unfreeze"] = [{"last_layers": 1} | phase]
    if isinstance(ewc := data.get("strategy", {}).get("ewc"), dict):
        ewc.setdefault("strength", 1.0)
        with_rows(ewc, "data")
    if isinstance(objective := data.get("strategy", {}).get("objective"), dict):
        objective.setdefault("function", "my_losses.py:focal")
    if isinstance(tokens := data.get("model", {}).get("new_tokens"), dict):
        tokens.setdefault("token", "<a>")
    if isinstance(scaling := data.get("model", {}).get("rope_scaling"), dict):
        data["model"]["rope_scaling"] = {"type": "yarn", "factor": 4.0} | scaling
    if generation := data.get("evaluation", {}).get("generation"):
        with_rows(generation, "rows")
    if isinstance(suite := data.get("evaluation", {}).get("suites"), dict):
        with_rows(suite, "rows")
        if isinstance(suite.get("examples"), dict):
            with_rows(suite, "examples")
        if isinstance(suite.get("bertscore"), dict):
            suite["bertscore"] = {"model": "m", "layer": 1} | suite["bertscore"]
        data["evaluation"]["suites"] = [suite]
    if replay := data.get("strategy", {}).get("replay"):
        with_rows(replay, "data")
    return data


def with_rows(section: dict, key: str) -> None:
    rows = section.setdefault(key, "a.jsonl")
    if isinstance(rows, dict):
        rows.setdefault("path", "a.jsonl")


def nested(parts: list[str], value: object) -> dict:
    return {parts[0]: nested(parts[1:], value) if parts[1:] else value}


def test_the_markdown_tables_hold_every_key():
    text = markdown_tables()
    assert all(f"| `{path}` |" in text for path in keys())
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert all(line.replace("\\|", "").count("|") == 5 for line in rows)
