"""Files that look like training data and are something else: what to do about them is said."""

import json
from pathlib import Path
from typing import Any

import pytest

from raytune.config.sections.data import DataSource
from raytune.config.sections.evaluation import SuiteSection
from raytune.data.rows.shards import Tally
from raytune.data.rows.source_rows import read_conversations
from raytune.data.templates.template import ChatTemplate
from raytune.data.templates.text import resolve_template
from raytune.errors import DataError
from raytune.evaluation.questions import read_questions
from raytune.evaluation.suite_metrics import METRICS
from tests.tiny import tiny_tokenizer

ROW = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
ROWS = [ROW, ROW, ROW]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def roles(path: Path, **source: Any) -> list[list[str]]:
    """Of the turns of each row of a file."""
    rows = read_conversations(DataSource(path=str(path), **source), path.parent, Tally())
    return [[message["role"] for message in row.messages] for row in rows]


ONE_OBJECT = {
    "a row over several lines": (
        json.dumps(ROW, indent=2),
        r"one JSON object over several lines.*jq -c \. rows\.jsonl? > rows-rows\.jsonl",
    ),
    "rows over several lines": (
        "\n".join(json.dumps(row, indent=2) for row in ROWS),
        r"objects that lie over several lines each.*jq -c \.",
    ),
    "data": (json.dumps({"data": ROWS}), r"one JSON object with 3 rows in a list under 'data'.*jq -c '\.data\[\]' rows\.json"),
    "data over several lines": (json.dumps({"version": "1", "data": ROWS}, indent=1), r"3 rows in a list under 'data'"),
    "splits": (
        json.dumps({"train": ROWS, "test": [ROW]}) + "\n",
        r"3 rows in a list under 'train'.*lists under 'test': give each a file",
    ),
    "behind a byte order mark": ("\ufeff" + json.dumps({"rows": ROWS}), r"3 rows in a list under 'rows'"),
}


@pytest.mark.parametrize("case", ONE_OBJECT)
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_one_object_is_no_file_of_rows_and_how_to_make_one_is_said(case: str, name: str, tmp_path: Path) -> None:
    text, said = ONE_OBJECT[case]
    with pytest.raises(DataError, match=f"(?s){said}"):
        roles(write(tmp_path / name, text))


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROW),
        "\n\n" + json.dumps(ROW) + "\n\n",
        json.dumps(ROW) + "\n" + json.dumps(ROW),
        json.dumps([ROW], indent=2),
        json.dumps(ROW | {"source": "x"}) + "\n",
    ],
)
def test_rows_are_rows_however_few(text: str, tmp_path: Path) -> None:
    assert set(map(tuple, roles(write(tmp_path / "rows.json", text)))) == {("user", "assistant")}


def test_a_row_with_a_list_beside_its_turns_is_a_row(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", json.dumps(ROW | {"items": [{"name": "x"}]}))
    assert roles(path, format="messages") == [["user", "assistant"]]


def test_a_torn_first_row_is_still_named_by_its_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:1: not JSON"):
        roles(write(tmp_path / "rows.jsonl", '{"messages": [\n'))


QUESTION, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
PREFERENCES = {
    "whole chats": ({"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, ANSWER]}, "map them: `columns: {messages: chosen}`"),
    "answers in text": (
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        "map them: `columns: {prompt: prompt, completion: chosen}`",
    ),
    "texts": ({"chosen": "Human: Q Assistant: A", "rejected": "Human: Q Assistant: B"}, "map them: `columns: {text: chosen}`"),
    "turns": (
        {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [ANSWER]},
        "map them: `columns: {prompt: prompt, completion: chosen}`",
    ),
    "answers as turns": (
        {"question": "Q", "chosen": [ANSWER], "rejected": [ANSWER]},
        "write each prompt and its chosen answer as one chat",
    ),
}


@pytest.mark.parametrize("case", PREFERENCES)
def test_preferences_are_told_apart_from_answers_to_learn(case: str, tmp_path: Path) -> None:
    row, way = PREFERENCES[case]
    path = write(tmp_path / "rows.jsonl", json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"preferences, for DPO .* supervised fine-tuning only") as caught:
        roles(path)
    assert way in str(caught.value)
    if way.startswith("map them"):  # which then works
        columns = dict(pair.split(": ") for pair in way.split("{")[1].split("}")[0].split(", "))
        assert len(roles(path, columns=columns)) == 1


def test_a_developer_is_a_system_prompt_and_that_is_told(tmp_path: Path) -> None:
    row = {"messages": [{"role": "developer", "content": "Be brief."}, *ROW["messages"]]}
    source = DataSource(path=str(write(tmp_path / "rows.jsonl", json.dumps(row))))
    tally = Tally()
    (conversation,) = read_conversations(source, tmp_path, tally)
    assert conversation.messages[0] == {"role": "system", "content": "Be brief."}
    assert dict(tally.unread_keys) == {"role: developer, as system": 1}


@pytest.mark.parametrize(
    ("role", "meant"), [("human", "user"), ("gpt", "assistant"), ("model", "assistant"), ("function", "tool")]
)
def test_roles_of_others_are_hinted(role: str, meant: str, tmp_path: Path) -> None:
    row = {"messages": [{"role": role, "content": "x"}, ANSWER]}
    tally = Tally()
    list(read_conversations(DataSource(path=str(write(tmp_path / "rows.jsonl", json.dumps(row)))), tmp_path, tally))
    assert (
        f'role\' is {role!r}, expected one of system, user, assistant, tool. Did you mean "{meant}"?' in tally.examples["bad"][0]
    )


def questions(path: Path, max_rows: int = 100) -> int:
    tokenizer = tiny_tokenizer()
    template = ChatTemplate(tokenizer, resolve_template("chatml", tokenizer))
    suite = SuiteSection(rows=[DataSource(path=str(path))], max_rows=max_rows)
    return len(
        read_questions(
            suite, "evaluation.generation", template, tokenizer, {"exact_match": METRICS["answers"]["exact_match"]}, path.parent
        )
    )


def test_bad_questions_are_told_all_at_once(tmp_path: Path) -> None:
    asked = {"messages": [QUESTION]}
    bad_turn = {"messages": [QUESTION, {"role": "assistant", "content": 7}]}
    lines = [json.dumps(row) for row in (ROW, asked, bad_turn, ROW, asked, asked, asked, asked)]
    lines.insert(4, "{not JSON")
    path = write(tmp_path / "rows.jsonl", "\n".join(lines) + "\n")
    with pytest.raises(DataError) as caught:
        questions(path)
    first, *shown, more, fix = str(caught.value).splitlines()
    assert first == "7 rows of evaluation.generation.rows cannot be asked:"
    assert [line.split(": ")[0].rpartition(":")[2] for line in shown] == ["2", "3", "5", "6", "7"]
    assert "its last turn is not an answer" in shown[0]
    assert (more, fix.startswith("Repair them")) == ("  and 2 more", True)


def test_only_the_rows_that_are_asked_have_to_be_good(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", "\n".join([json.dumps(ROW), json.dumps(ROW), json.dumps({"messages": [QUESTION]})]))
    assert questions(path, max_rows=2) == 2
    with pytest.raises(DataError, match="1 row of evaluation"):
        questions(path, max_rows=3)
