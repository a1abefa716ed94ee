"""Rows of every format become the same shape; what does not fit is refused with the reason."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune.config.data import DataSource
from raytune.data.conversation import Conversation, Origin, RowError
from raytune.data.formats import FORMATS, format_of, read_row
from raytune.data.split import side_of
from raytune.errors import DataError
from tests.tiny import PATIENT

HERE = Origin("rows.jsonl", 7)


def source(**fields: Any) -> DataSource:
    return DataSource(path="rows.jsonl", **fields)


def read(row: dict[str, Any], **fields: Any) -> Conversation:
    return read_row(row, format_of(source(**fields), row), fields.get("columns", {}), HERE)


def turns(conversation: Conversation) -> list[tuple[str, Any]]:
    return [(message["role"], message.get("content")) for message in conversation.messages]


def test_each_format_becomes_turns() -> None:
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert turns(read({"messages": messages, "id": 3})) == [("user", "Q"), ("assistant", "A")]
    assert turns(read({"instruction": "Add", "input": "1 2", "output": "3"})) == [("user", "Add\n\n1 2"), ("assistant", "3")]
    assert turns(read({"instruction": "Add", "input": None, "output": "3"})) == [("user", "Add"), ("assistant", "3")]
    assert turns(read({"prompt": "Q", "completion": " A"})) == [("user", "Q"), ("assistant", " A")]
    assert turns(read({"system": "S", "prompt": "Q", "completion": "A"}))[0] == ("system", "S")
    text = read({"text": "a document"})
    assert (text.messages, text.text, text.origin) == ((), "a document", HERE)


def test_columns_are_mapped() -> None:
    row = {"question": "Q", "answer": "A", "level": 3}
    assert turns(read(row, columns={"prompt": "question", "completion": "answer"})) == [("user", "Q"), ("assistant", "A")]
    assert read({"body": "t"}, columns={"text": "body"}).text == "t"
    assert turns(read({"chat": [{"role": "user", "content": "Q"}]}, columns={"messages": "chat"})) == [("user", "Q")]


def test_tools_and_tool_calls_are_kept_with_their_arguments_as_objects() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1]}'}}
    tools = [{"type": "function", "function": {"name": "f"}}]
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Q"}, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1", "tool_call_id": "1"},
    ]
    for given_tools in (tools, json.dumps(tools)):
        conversation = read({"messages": messages, "tools": given_tools})
        assert conversation.tools == tools
        assert conversation.messages[0]["content"] == "Q?"
        assert conversation.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": [1]}
        assert conversation.messages[2]["tool_call_id"] == "1"
    assert call["function"]["arguments"] == '{"x": [1]}', "the row itself is left alone"


USER = {"role": "user", "content": "Q"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": "hello"}, "'messages' is text, expected a list of turns"),
        ({"messages": None}, "'messages' is null"),
        ({"messages": []}, "an empty list"),
        ({"messages": ["hello"]}, r"'messages\[0\]' is text"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, r"'messages\[1\].content' is null"),
        ({"messages": [{"role": "user", "content": None, "tool_calls": [{}]}]}, r"content' is null"),
        ({"messages": [{"role": "user", "content": 3}]}, "is a number, expected text"),
        ({"messages": [{"role": "user"}]}, "is null, expected text"),
        ({"messages": [{"role": "human", "content": "Q"}]}, "role' is 'human', expected one of system, user, assistant, tool"),
        ({"messages": [{"content": "Q"}]}, "role' is None"),
        ({"messages": [{"role": ["user"], "content": "Q"}]}, "role' is "),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "not text; only text"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": "f()"}]}, "not a list of objects"),
        ({"messages": [USER], "tools": {"name": "f"}}, "'tools' is an object, expected a list"),
        ({"messages": [USER], "tools": "[not json"}, "'tools' is text that is not JSON"),
        ({"instruction": "a", "output": None}, "'output' is null"),
        ({"instruction": "a", "output": ["b"]}, "'output' is a list, expected text"),
        ({"instruction": "a", "input": 3, "output": "b"}, "'input' is a number"),
        ({"prompt": True, "completion": "b"}, "'prompt' is a boolean"),
        ({"text": ""}, "'text' is empty"),
        ({"text": None}, "'text' is null"),
    ],
)
def test_a_field_of_the_wrong_kind_is_named(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        read(row)


def test_a_later_row_without_the_column_is_named_with_what_it_has() -> None:
    with pytest.raises(RowError, match="has no 'completion', only 'prompt', 'answer'"):
        read_row({"prompt": "Q", "answer": "A"}, "prompt_completion", {}, HERE)


def test_columns_that_fit_several_formats_are_not_guessed() -> None:
    with pytest.raises(DataError, match=r"'text' fit more than one format \(alpaca, text\). Say which one with `format`"):
        format_of(source(), {"instruction": "a", "output": "b", "text": "c"})
    assert format_of(source(format="alpaca"), {"instruction": "a", "output": "b", "text": "c"}) == "alpaca"
    assert format_of(source(columns={"text": "text"}), {"instruction": "a", "output": "b", "text": "c"}) == "text"


def test_columns_that_fit_no_format_are_listed_beside_what_formats_need() -> None:
    with pytest.raises(DataError, match=r"'question', 'answer' fit no format.*prompt_completion: prompt, completion"):
        format_of(source(), {"question": "a", "answer": "b"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "alpaca"}, "needs the columns 'instruction', 'output', but the file has 'question'"),
        ({"format": "text", "columns": {"body": "question"}}, "maps 'body', which is not a field of the format 'text'"),
        ({"format": "text", "columns": {"text": "body"}}, "needs the column 'body', but the file has 'question'"),
        ({"columns": {"nonsense": "question"}}, "fit no format"),
    ],
)
def test_a_mapping_or_format_that_does_not_fit_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        format_of(source(**fields), {"question": "a", "answer": "b"})


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "tool_calls", "function"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@PATIENT
@given(
    st.sampled_from(sorted(FORMATS)),
    st.dictionaries(st.sampled_from(sorted({field for format in FORMATS.values() for field in format.fields})), ANY),
)
def test_no_row_whatever_is_in_it_does_more_than_fail_as_a_row(name: Any, row: dict[str, Any]) -> None:
    with suppress(RowError):
        conversation = read_row(row, name, {}, HERE)
        assert conversation.text or conversation.messages


@PATIENT
@given(st.dictionaries(st.text(max_size=3), ANY, max_size=3), st.floats(0, 1), st.floats(0, 1))
def test_a_row_keeps_its_side_whatever_the_order_of_its_columns(row: dict[str, Any], one: float, other: float) -> None:
    low, high = sorted((one, other))
    reordered = dict(reversed(row.items()))
    assert side_of(row, low) == side_of(reordered, low)
    assert side_of(row, low) == "train" or side_of(row, high) == "validation"


def test_about_the_asked_share_is_held_out() -> None:
    sides = [side_of({"text": f"row {index}"}, 0.2) for index in range(5000)]
    assert 900 < sides.count("validation") < 1100  # standard deviation 28
