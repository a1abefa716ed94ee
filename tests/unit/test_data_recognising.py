"""Rows of other people's data sets are recognised by their columns, and no column is lost without a word."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune.config.sections.data import COMPRESSED_ENDINGS, FILE_ENDINGS, DataFormat, DataSource
from raytune.config.words.guides import guides
from raytune.data.conversations.conversation import Conversation, Origin, RowError
from raytune.data.conversations.masking import trained_turns
from raytune.data.formats.formats import FORMATS
from raytune.data.formats.recognising import read_row, reading_of
from raytune.data.rows.choices import read_choices
from raytune.data.rows.shards import Tally
from raytune.errors import DataError
from tests.tiny import PATIENT

HERE = Origin("rows.jsonl", 7)


def read(row: dict[str, Any], **fields: Any) -> tuple[DataFormat, Conversation]:
    reading = reading_of(DataSource(path="rows.jsonl", **fields), row)
    return reading.format, read_row(row, reading, HERE)


def exchange(row: dict[str, Any], **fields: Any) -> tuple[str, ...]:
    """The format of a row, and its texts."""
    name, conversation = read(row, **fields)
    return (name, *(message["content"] for message in conversation.messages))


CHAT = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
SHAREGPT = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]


@pytest.mark.parametrize(
    ("row", "read_as"),
    [
        ({"question": "Q", "answer": "A"}, ("question_answer", "Q", "A")),
        ({"query": "Q", "response": "A", "id": 4}, ("question_answer", "Q", "A")),
        ({"problem": "Q", "solution": "A", "source": "web"}, ("question_answer", "Q", "A")),
        ({"context": "C", "question": "Q", "answer": "A"}, ("question_answer", "C\n\nQ", "A")),
        ({"input": "Q", "output": "A"}, ("prompt_completion", "Q", "A")),
        ({"prompt": "Q", "response": "A", "system_prompt": "S"}, ("prompt_completion", "S", "Q", "A")),
        ({"inputs": "Q", "targets": "A"}, ("prompt_completion", "Q", "A")),
        ({"instruction": "I", "input": "Q", "output": "A"}, ("alpaca", "I\n\nQ", "A")),
        ({"instruction": "I", "context": "", "response": "A"}, ("alpaca", "I", "A")),
        ({"article": "long", "highlights": "short", "id": "7"}, ("summarisation", "long", "short")),
        ({"dialogue": "long", "summary": "short"}, ("summarisation", "long", "short")),
        ({"sentence": "great", "label": "good", "idx": 3}, ("classification", "great", "good")),
        ({"Question": "Q", "ANSWER": "A", "ID": 1}, ("question_answer", "Q", "A")),
        ({"conversation": CHAT}, ("messages", "Q", "A")),
        ({"conversations": CHAT, "system": "S"}, ("messages", "S", "Q", "A")),
        ({"conversations": json.dumps(CHAT)}, ("messages", "Q", "A")),
        ({"messages": SHAREGPT}, ("sharegpt", "Q", "A")),
        ({"conversation": json.dumps(SHAREGPT)}, ("sharegpt", "Q", "A")),
    ],
)
def test_data_of_others_is_recognised_by_its_columns(row: dict[str, Any], read_as: tuple[str, ...]) -> None:
    assert exchange(row) == read_as


@pytest.mark.parametrize(
    ("turns", "field", "reason"),
    [
        (SHAREGPT, "messages", r"write `format: sharegpt` with `columns: {conversations: chat}`"),
        (CHAT, "conversations", r"write `format: messages` with `columns: {messages: chat}`"),
        ([{"content": "Q"}], "messages", r"'chat\[0\].role' is None"),
        ([{"value": "Q"}], "conversations", r"'chat\[0\].from' is None"),
    ],
)
def test_turns_of_a_mapped_column_are_read_as_the_field_says(turns: list[Any], field: str, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        read({"chat": turns}, columns={field: "chat"})


@pytest.mark.parametrize("speaker", ["gpt", "GPT", "assistant", "chatgpt", "bing", "bard", "bot", "model"])
def test_each_name_of_an_assistant_is_one(speaker: str) -> None:
    _, conversation = read({"conversations": [{"from": "Human", "value": "Q"}, {"from": speaker, "value": "A"}]})
    assert trained_turns(conversation.messages, "assistant") == [1]


@pytest.mark.parametrize(("calls", "answers"), [("tool_call", "tool_response"), ("function_call", "function_response")])
def test_each_name_of_a_call_and_of_its_result_is_one(calls: str, answers: str) -> None:
    call = {"from": calls, "value": '{"name": "f", "arguments": {}}'}
    _, conversation = read({"conversations": [SHAREGPT[0], call, {"from": answers, "value": "1"}, SHAREGPT[1]]})
    assert [message["role"] for message in conversation.messages] == ["user", "assistant", "tool", "assistant"]
    assert conversation.messages[1]["tool_calls"][0]["function"]["name"] == "f"


# --- Where fields are --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("payload", [{"q": "Q", "answers": ["A", "B"]}, '{"q": "Q", "answers": ["A", "B"]}'])
def test_a_path_leads_through_objects_lists_and_json_in_a_text(payload: Any) -> None:
    columns = {"question": "payload.q", "answer": "payload.answers.0"}
    name, conversation = read({"id": 1, "payload": payload}, columns=columns)
    assert (name, conversation.unread_columns) == ("question_answer", ("id", "payload.answers.1"))
    assert [message["content"] for message in conversation.messages] == ["Q", "A"]


def test_a_column_whose_name_has_dots_comes_before_a_path() -> None:
    row = {"a.b": "Q", "a": {"b": "other"}, "answer": "A"}
    assert exchange(row, columns={"question": "a.b"}, format="question_answer") == ("question_answer", "Q", "A")
    assert read(row, columns={"question": "a.b"}, format="question_answer")[1].unread_columns == ("a",)


def test_a_path_that_a_row_does_not_have_is_named() -> None:
    with pytest.raises(DataError, match=r"'meta.question' fit no format|fit no format"):
        read({"meta": {"q": "Q"}, "answer": "A"}, columns={"question": "meta.question"})
    reading = reading_of(DataSource(path="r", columns={"question": "meta.q"}), {"meta": {"q": "Q"}, "answer": "A"})
    for meta in ({}, None, "text", []):
        with pytest.raises(RowError, match=r"has no 'meta.q', only 'meta', 'answer'"):
            read_row({"meta": meta, "answer": "A"}, reading, HERE)


def test_constants_are_the_same_in_each_row_and_belong_to_a_format() -> None:
    constants = {"instruction": "Good or bad?", "system": "S"}
    row = {"text": "fine", "label": "good"}
    assert exchange(row, constants=constants) == ("classification", "S", "Good or bad?\n\nfine", "good")
    with pytest.raises(DataError, match="constants has 'instruction', which is not a field of the format 'text'"):
        read(row, constants={"instruction": "x"}, format="text")
    with pytest.raises(ValueError, match="system is in columns and in constants"):
        DataSource(path="r", columns={"system": "s"}, constants={"system": "S"})
    with pytest.raises(RowError, match=r"a system prompt in `constants` and another in 'messages\[0\]'"):
        read({"messages": [{"role": "system", "content": "T"}, *CHAT]}, constants={"system": "S"})


def test_a_constant_hides_no_column_of_its_name() -> None:
    row = {"prompt": "Q", "completion": "A", "system": "of the row"}
    with pytest.raises(DataError, match="'system' would be left unread"):
        read(row, constants={"system": "S"})


# --- Labels ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "labels", "name"),
    [
        (1, ["bad", "good"], "good"),
        (0, ["bad", "good"], "bad"),
        ("1", ["bad", "good"], "good"),
        ("good", ["bad", "good"], "good"),
        (True, {True: "yes", False: "no"}, "yes"),
        (4, {1: "one star", 4: "four stars"}, "four stars"),
        ("LABEL_1", {"LABEL_0": "bad", "LABEL_1": "good"}, "good"),
    ],
)
def test_a_label_is_trained_by_its_name(label: Any, labels: Any, name: str) -> None:
    assert exchange({"text": "fine", "label": label}, labels=labels) == ("classification", "fine", name)


@pytest.mark.parametrize(
    ("label", "labels", "reason"),
    [
        (1, {}, r"'label' is 1, which says nothing .*`labels: \[negative, positive\]`"),
        ("1", {}, "which says nothing"),
        ("2.0", {}, "which says nothing"),
        (True, {}, "'label' is true, which says nothing"),
        (2, ["bad", "good"], "'label' is '2', which `labels` does not name: it has 0, 1"),
        ("", {}, "'label' is empty"),
        (None, {}, "'label' is null"),
        (["a", "b"], {}, "'label' is a list, expected the name of a class"),
    ],
)
def test_a_label_without_a_name_is_refused(label: Any, labels: Any, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        read({"sentence": "fine", "label": label}, labels=labels)


def test_labels_are_of_classification_alone() -> None:
    with pytest.raises(DataError, match="labels are of the format classification, but the format is 'text'"):
        read({"text": "fine", "label": 1}, format="text", labels=["bad", "good"])


# --- A prompt of turns -------------------------------------------------------------------------------------------------------


def test_prompts_and_completions_may_be_turns_and_only_the_completion_is_trained() -> None:
    earlier = {"role": "assistant", "content": "before", "weight": 2}
    _, conversation = read({"prompt": [CHAT[0], earlier, CHAT[0]], "completion": [CHAT[1], CHAT[0], CHAT[1]], "tools": []})
    assert [message["content"] for message in conversation.messages] == ["Q", "before", "Q", "A", "Q", "A"]
    assert trained_turns(conversation.messages, "assistant") == [3, 5]
    assert trained_turns(read({"prompt": CHAT[:1], "completion": "A"})[1].messages, "assistant") == [1]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": CHAT, "completion": CHAT[1:]}, "'prompt' ends with an answer"),
        ({"prompt": CHAT[:1], "completion": CHAT}, r"'completion\[0\].role' is 'user', expected 'assistant'"),
        ({"prompt": [], "completion": CHAT[1:]}, "'prompt' is an empty list"),
        ({"prompt": CHAT[:1], "completion": None}, "'completion' is null"),
        ({"prompt": CHAT[:1], "completion": 3}, "'completion' is a number"),
        ({"prompt": "Q", "completion": "A", "tools": [{"name": "f"}]}, "'tools' beside a prompt in text"),
    ],
)
def test_turns_that_are_no_prompt_or_no_completion_are_refused(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        read(row)


# --- Nothing is lost ---------------------------------------------------------------------------------------------------------

SPELLINGS = sorted({name for format in FORMATS.values() for names in format.spellings.values() for name in names})
TEXTS = st.lists(st.sampled_from([*SPELLINGS, "id", "source", "note", "mood"]), min_size=1, max_size=6, unique=True)


def row_of(columns: list[str]) -> dict[str, Any]:
    """A row whose columns hold a text of their own each, in the shape that formats expect."""
    row: dict[str, Any] = {}
    for number, column in enumerate(columns):
        text = f"text-{number}"
        if column in ("messages", "conversation"):
            row[column] = [{"role": "user", "content": text}]
        elif column == "conversations":
            row[column] = [{"from": "human", "value": text}]
        elif column == "history":
            row[column] = [[text, text]]
        elif column == "tools":
            row[column] = [{"name": text}]
        else:
            row[column] = text
    return row


def lost(row: dict[str, Any], conversation: Conversation) -> list[str]:
    """Columns whose text is neither in a conversation nor said to be left out."""
    whole = json.dumps([conversation.messages, conversation.tools, conversation.text])
    return [
        column for number, column in enumerate(row) if f"text-{number}" not in whole and column not in conversation.unread_columns
    ]


@PATIENT
@given(TEXTS)
def test_no_column_is_lost_unsaid_and_none_that_tells_something_is_left_out_of_a_recognised_format(columns: list[str]) -> None:
    row = row_of(columns)
    with suppress(DataError, RowError):
        _, conversation = read(row)
        assert not lost(row, conversation)
        assert {"id", "source"}.issuperset(conversation.unread_columns)


@PATIENT
@given(TEXTS, st.sampled_from(sorted(FORMATS)))
def test_no_column_is_lost_unsaid_in_a_format_that_is_named(columns: list[str], name: DataFormat) -> None:
    row = row_of([*columns, *(field for field in FORMATS[name].required if field not in columns)])
    with suppress(DataError, RowError):
        _, conversation = read(row, format=name)
        assert not lost(row, conversation)


@PATIENT
@given(st.permutations(["id", "system", "input", "instruction", "output"]))
def test_a_format_does_not_depend_on_the_order_of_the_columns(columns: list[str]) -> None:
    assert read(row_of(columns))[0] == "alpaca"


# --- The guide ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_the_guide_has_each_format_with_all_names_of_its_fields(name: DataFormat) -> None:
    (line,) = [line for line in guides()["formats"].text.splitlines() if line.startswith(f"| `{name}` |")]
    names = {each for field in FORMATS[name].spellings.values() for each in field} - {"system_prompt"}
    assert names <= set(line.split("`"))


def test_the_guide_has_each_ending_of_files() -> None:
    text = guides()["formats"].text
    assert not [ending for ending in (*FILE_ENDINGS, *COMPRESSED_ENDINGS) if f"{ending}`" not in text]


@pytest.mark.parametrize(("key", "value"), [("constants", {"question": "Q"}), ("labels", ["a", "b"])])
def test_rows_of_choices_have_neither_constants_nor_labels(key: str, value: Any, tmp_path: Path) -> None:
    source = DataSource.model_validate({"path": "rows.jsonl", key: value})
    with pytest.raises(DataError, match=f"rows of choices have no {key}"):
        list(read_choices(source, tmp_path, Tally()))
