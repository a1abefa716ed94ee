"""`raytune evaluate` before anything is started: which models and rows it takes, where it writes, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from raytune.config.problems import ConfigError
from raytune.config.sections.run import RunConfig
from raytune.config.suite_file import read_suites
from raytune.errors import ModelError, UserError
from raytune.evaluation import judging
from raytune.evaluation.answers import all_chunks, together
from raytune.evaluation.questions import Question
from raytune.evaluation.side_by_side import Evaluation, paired, samples_of_models, values_of
from raytune.evaluation.suite_metrics import Given
from raytune.launch.asking.evaluate import Prepared, folder_for, identity_of, prepare_evaluation
from raytune.launch.asking.models_to_ask import Named
from raytune.launch.state.record import RunRecord, State, write_plan
from raytune.model.files.base_content import base_content, save_content
from raytune.plan.run_plan import CodePlan, SuitePlan
from raytune.run_folder import RunFolder
from raytune.storage import write_json
from tests.tiny import save_tiny_model, tiny_model, tiny_plan, tiny_tokenizer

SUITES = """
suites:
  - {name: answers, rows: "demo:test", max_rows: 3, max_new_tokens: 4}
  - {name: general, kind: loss, rows: TEXT, batch_size: 2}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a base, one of another shape, an adapter, and files of suites."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("A fox.", "Once upon a time.")))
    (folder / "suites.yaml").write_text(SUITES.replace("TEXT", str(folder / "text.jsonl")))
    save_tiny_model(folder / "base")
    save_tiny_model(folder / "wider", hidden_size=64)
    save_tiny_model(folder / "smaller", vocab_size=100, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    bare = tiny_tokenizer()
    bare.chat_template = None
    tiny_model().save_pretrained(folder / "bare")
    bare.save_pretrained(folder / "bare")
    config = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"], base_model_name_or_path=str(folder / "base"))
    adapted = get_peft_model(tiny_model(), config)
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
    adapted.save_pretrained(folder / "adapter")
    return folder


def prepared(folder: Path, model: str, suite: str | None = "suites.yaml", **named: Any) -> Prepared:
    path = model if model == "demo" else str(folder / model)
    return prepare_evaluation(Named(model=path, **named), suite=None if suite is None else str(folder / suite))


def names(one: Prepared) -> list[str]:
    return [subject.name for subject in one.to_ask.subjects]


def test_an_adapter_brings_the_base_that_it_names_and_a_whole_model_stands_alone(folder: Path) -> None:
    adapter, whole = prepared(folder, "adapter"), prepared(folder, "base")
    assert names(adapter) == ["base", "adapter"]
    assert adapter.to_ask.pairs == (("base", "adapter"),)
    assert names(whole) == ["base"]
    assert whole.to_ask.pairs == ()
    assert [len(rows) for rows in adapter.asked["adapter"].values()] == [3, 2]
    base, tuned = (one.asked.model for one in adapter.to_ask.subjects)
    assert base == tuned == whole.to_ask.subjects[0].asked.model, "loaded once"


def test_adapters_lie_over_one_base_and_another_model_stands_beside_both(folder: Path) -> None:
    several = prepared(folder, "base", adapters={"a": str(folder / "adapter"), "b": str(folder / "adapter")})
    assert names(several) == ["base", "a", "b"]
    assert several.to_ask.pairs == (("base", "a"), ("base", "b"))
    beside = prepared(folder, "adapter", compare=str(folder / "wider"))
    assert names(beside) == ["base", "adapter", "wider"]
    assert beside.to_ask.pairs == (("base", "adapter"), ("base", "wider"), ("adapter", "wider"))
    twice = prepared(folder, "base", compare=str(folder / "base"))
    assert names(twice) == ["base", "base-2"]
    assert names(prepared(folder, "wider", base=str(folder / "base"))) == ["base", "wider"]
    for model in ("base", "adapter"):  # nobody who asks for it would know that it is called otherwise
        with pytest.raises(UserError, match=f"the name '{model}' to another model"):
            prepared(folder, "adapter", adapters={model: str(folder / "adapter")})


@pytest.mark.parametrize(
    ("model", "named", "says"),
    [
        ("absent", {}, r"absent is neither the folder of a run, nor that of a model or an adapter"),
        ("adapter", {"base": "wider"}, r"cannot be put on .*wider"),
        ("bare", {}, r"has no chat template(.|\n)*--template"),
        ("wider", {"base": "smaller"}, r"smaller has embeddings for 100 tokens, but rows have token \d+"),
        ("base", {"compare": "absent"}, r"absent is neither"),
        ("base", {"adapters": {"a b": "adapter"}}, r"'a b' is no name"),
        ("base", {"adapters": {"a": "base"}}, r"holds no adapter_config.json"),
    ],
)
def test_models_that_cannot_be_asked_are_refused_with_what_to_do(
    folder: Path, model: str, named: dict[str, Any], says: str
) -> None:
    placed = {
        key: {name: str(folder / path) for name, path in value.items()} if isinstance(value, dict) else str(folder / value)
        for key, value in named.items()
    }
    with pytest.raises(UserError, match=says):
        prepared(folder, model, **placed)


def test_a_template_is_given_to_a_tokenizer_that_has_none(folder: Path) -> None:
    asked = prepared(folder, "bare", template="chatml").asked["bare"]["answers"]
    assert asked[0].prompt.endswith("<|im_start|>assistant\n")


def test_a_model_that_is_no_run_needs_a_file_of_suites(folder: Path) -> None:
    with pytest.raises(UserError, match=r"is no run, so that there is nothing to measure on.*--suite FILE"):
        prepared(folder, "base", suite=None)


@pytest.mark.parametrize("state", ["running", "interrupted", "failed"])
def test_a_run_that_has_not_finished_is_refused(tmp_path: Path, state: State) -> None:
    folder = RunFolder(str(tmp_path), "tiny")
    config = RunConfig().model_dump(mode="json")
    RunRecord(name="tiny", state=state, attempts=1, created=0.0, config=config, versions={}).write(folder)
    write_plan(folder, tiny_plan(storage=str(tmp_path)))
    with pytest.raises(UserError, match=rf"has not finished \(it is {state}\).*same `raytune train` goes on"):
        prepare_evaluation(Named(model=folder.path))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("suites: []\n", r"suites.yaml:1:9 +suites +names no suite"),
        ("", r"suites.yaml.* names no suite"),
        ("suite: x\n", r"suites.yaml:1:1 +suite +unknown key; a file of suites has one key, suites"),
        ("suites:\n  - {rows: 'demo:test', metrics: [chfr]}\n", r"suites.yaml:2:25 .*Did you mean \"chrf\""),
        ("suites:\n  - {rows: gone.jsonl}\n", r"suites.yaml:2:12 .*gone.jsonl.* is not on this machine"),
        ("suites: [{rows: 'demo:test'}, {rows: 'demo:test'}]\n", r"two suites are called"),
    ],
)
def test_what_is_wrong_in_a_file_of_suites_is_told_with_its_place(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "suites.yaml").write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_suites(str(tmp_path / "suites.yaml"))


def test_rows_that_are_none_are_told_with_the_line_that_names_them(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "suites.yaml").write_text(f"suites:\n  - {{name: none, rows: {tmp_path}/empty.jsonl}}\n")
    with pytest.raises(UserError, match=r"suites.yaml:2:18  evaluation.suites.0.rows\n.*empty"):
        prepare_evaluation(Named(model=str(folder / "base")), suite=str(tmp_path / "suites.yaml"))


def test_what_nobody_named_takes_no_other_place_and_what_was_named_is_gone_on_with(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole, wider = prepared(folder, "base"), prepared(folder, "wider")
    identity, other = identity_of(whole), identity_of(wider)
    assert identity != other
    assert identity == identity_of(prepared(folder, "base"))
    (folder / "judged.yaml").write_text(
        (folder / "suites.yaml").read_text().replace("max_rows: 3", "max_rows: 3, metrics: [chrf]")
    )
    assert identity == identity_of(prepared(folder, "base", "judged.yaml")), "its answers are there"
    first = folder_for(whole, identity)
    assert first.path == str(tmp_path / "evaluations/base-suites")
    write_json(first.identity, other)
    assert folder_for(whole, identity).path == f"{first.path}-2"
    write_json(first.identity, identity)
    assert folder_for(whole, identity) == folder_for(whole, identity, first.path) == first
    with pytest.raises(UserError, match="holds an evaluation of other models, suites or rows"):
        folder_for(wider, other, first.path)


def question(text: str) -> Question:
    return Question(suite="one", prompt=text, prompt_ids=tuple(text.encode()), expected="y")


SUITE = SuitePlan(name="one", metrics=("exact_match",), batch_size=2, max_new_tokens=1)


def test_chunks_hold_each_row_once_whatever_order_and_parts_they_come_back_in() -> None:
    asked = {"one": [question("x" * length) for length in (5, 1, 4, 2, 3)]}
    chunks = all_chunks([SUITE], asked)
    assert [list(chunk.rows) for chunk in chunks] == [[1, 3], [4, 2], [0]]
    parts = [{"one": {number: Given(text=str(number)) for number in chunk.rows}} for chunk in reversed(chunks)]
    assert [given.text for given in together(parts, asked)["one"]] == ["0", "1", "2", "3", "4"]


def test_the_table_has_a_column_per_model_and_one_per_pair() -> None:
    asked = {"one": [question(str(number)) for number in range(4)]}
    given = {"base": ["n", "n", "y", "n"], "tuned": ["y", "y", "y", "n"]}
    answers = {name: {"one": [Given(text=text) for text in texts]} for name, texts in given.items()}
    expected = {"one": ["y"] * 4}
    found = Evaluation(
        output="out",
        models={"base": "b", "tuned": "t"},
        num_rows={"one": 4},
        values={"one": values_of(SUITE, expected["one"], {name: of["one"] for name, of in answers.items()}, "cpu")[0]},
        failed={},
        pairs=(paired("base", "tuned", [SUITE], expected, answers, "cpu"),),
    )
    counts, head, line, *_ = found.lines
    assert counts == "one: 4 rows"
    assert head.split()[:2] == ["base", "tuned"]
    assert head.endswith("tuned - base (95 % interval)")
    assert line.split()[:6] == ["one:", "exact", "match", "25.0%", "75.0%", "+50.0%"]
    facts = json.loads(json.dumps(found.to_json()))
    assert facts["values"]["one"]["exact_match"]["of_models"] == {"base": 0.25, "tuned": 0.75}
    assert facts["pairs"][0]["comparisons"]["one"]["scores"]["exact_match"]["gain_low"] >= 0
    assert next(samples_of_models(asked, answers))["answers"] == {"base": "n", "tuned": "y"}


def test_a_base_that_is_another_one_of_the_same_shape_is_refused(folder: Path) -> None:
    """It would be measured without a word: by weights that nothing was trained over, or on texts that nobody wrote."""
    save_content(base_content(str(folder / "base"), None), folder / "adapter")
    assert names(prepared(folder, "adapter")) == ["base", "adapter"]
    changed = tiny_model()
    next(changed.parameters()).data += 1.0
    changed.save_pretrained(folder / "changed")
    tiny_tokenizer().save_pretrained(folder / "changed")
    with pytest.raises(ModelError, match=r"trained on another base than .*changed holds now:\n  model.safetensors"):
        prepared(folder, "adapter", base=str(folder / "changed"))
    save_tiny_model(folder / "turned")
    file = folder / "turned" / "tokenizer.json"
    facts = json.loads(file.read_text())
    numbers = facts["model"]["vocab"]
    numbers["A"], numbers["B"] = numbers["B"], numbers["A"]
    file.write_text(json.dumps(facts))
    with pytest.raises(ModelError, match=r"turned has other tokens than .*base: '[AB]' is token"):
        prepared(folder, "base", base=str(folder / "turned"))


def test_a_metric_of_the_users_that_fails_costs_no_other_one() -> None:
    code = CodePlan(module="mine.py", name="digits", text="def digits(answer, expected):\n    return int(answer)\n")
    suite = SUITE.model_copy(update={"metrics": ("mine.py:digits", "exact_match"), "code": {"mine.py:digits": code}})
    given = {"base": [Given(text="1")], "tuned": [Given(text="one")]}
    values, failed = values_of(suite, ["1"], given, "cpu")
    pair = paired("base", "tuned", [suite], {"one": ["1"]}, {name: {"one": rows} for name, rows in given.items()}, "cpu")
    found = Evaluation(
        output="out",
        models={"base": "b", "tuned": "t"},
        num_rows={"one": 1},
        values={"one": values},
        failed={"one": failed},
        pairs=(pair,),
    )
    assert found.lines[2].split()[:5] == ["one:", "exact", "match", "100.0%", "0.0%"]
    assert "mine.py:digits fails for the answer 'one'" in found.lines[3]
    assert list(found.to_json()["failed"]["one"]) == ["mine.py:digits"]
    alone, why = judging.values_of([suite], {"one": [question("1")]}, {"one": given["tuned"]}, device="cpu")
    assert (alone, list(why)) == ({"one/exact_match": 0.0}, ["one/mine.py:digits"])
