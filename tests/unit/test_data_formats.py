"""Rows of every format become the same shape; what does not fit is refused with the reason."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune.config.sections.data import DataSource
from raytune.data.conversations.conversation import Conversation, Origin, RowError
from raytune.data.conversations.masking import trained_turns
from raytune.data.formats.formats import FORMATS
from raytune.data.formats.recognising import Reading, read_row, reading_of
from raytune.data.formats.row_fields import Mapped
from raytune.errors import DataError
from tests.tiny import PATIENT

HERE = Origin("rows.jsonl", 7)


def source(**fields: Any) -> DataSource:
    return DataSource(path="rows.jsonl", **fields)


def read(row: dict[str, Any], **fields: Any) -> Conversation:
    return read_row(row, reading_of(source(**fields), row), HERE)


def format_of(source: DataSource, row: dict[str, Any]) -> str:
    return reading_of(source, row).format


def as_format(name: Any, *, is_named: bool = True) -> Reading:
    return Reading(format=name, is_named=is_named, mapped=Mapped(columns={}, constants={}), labels={})


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
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": "f"}]}]},
            r"tool_calls\[0\].name' is null, expected the name",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}]},
            r"tool_calls\[0\].function.arguments' is a list, expected an object",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": '"x"'}]}]},
            r"tool_calls\[0\].arguments' is text, expected an object",
        ),
        ({"messages": [USER, {"role": "assistant", "content": "A", "reasoning": ["R"]}]}, r"\[1\].reasoning' is a list"),
        ({"messages": [USER], "tools": ["f"]}, r"'tools\[0\]' is text, expected an object: the JSON schema"),
        ({"messages": [USER], "tools": {"name": "f"}}, "'tools' is an object, expected a list"),
        ({"messages": [USER], "tools": "[not json"}, "'tools' is text that is not JSON"),
        ({"instruction": "a", "output": None}, "'output' is null"),
        ({"instruction": "a", "output": ["b"]}, "'output' is a list, expected text"),
        ({"instruction": "a", "input": 3, "output": "b"}, r"'input' is a number, expected text; write it in quotes: \"3\""),
        ({"prompt": True, "completion": "b"}, "'prompt' is a boolean"),
        ({"text": ""}, "'text' is empty"),
        ({"text": None}, "'text' is null"),
    ],
)
def test_a_field_of_the_wrong_kind_is_named(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        read(row)


@pytest.mark.parametrize("in_function", [True, False])
@pytest.mark.parametrize(
    ("given", "read_as"),
    [('{"x": 1}', {"x": 1}), ({"x": None}, {"x": None}), ({}, {}), ("{}", {}), ("", {}), (None, {}), ("null", {})],
)
def test_arguments_are_an_object_however_the_call_holds_them(given: Any, read_as: dict[str, Any], in_function: bool) -> None:
    called = {"name": "f", "arguments": given}
    call = {"type": "function", "function": called} if in_function else called
    (read_call,) = read({"messages": [USER, turn(content=None, tool_calls=[call])]}).messages[1]["tool_calls"]
    assert (read_call["function"] if in_function else read_call) == {"name": "f", "arguments": read_as}


def test_a_call_without_arguments_has_empty_ones() -> None:
    (call,) = read({"messages": [USER, turn(tool_calls=[{"function": {"name": "f"}}])]}).messages[1]["tool_calls"]
    assert call == {"function": {"name": "f", "arguments": {}}}


@pytest.mark.parametrize("nothing", [[], None])
def test_no_calls_are_no_key_since_templates_ask_for_the_key_alone(nothing: Any) -> None:
    assert read({"messages": [USER, turn(tool_calls=nothing)]}).messages[1] == turn()


def test_a_later_row_without_the_column_is_named_with_what_it_has() -> None:
    with pytest.raises(RowError, match="has no 'completion', only 'prompt', 'answer'"):
        read_row({"prompt": "Q", "answer": "A"}, as_format("prompt_completion"), HERE)


def test_columns_that_fit_several_formats_are_not_guessed() -> None:
    with pytest.raises(
        DataError,
        match=r"fit more than one format \(alpaca, by which 'text' would be left unread; text, by which",
    ):
        format_of(source(), {"instruction": "a", "output": "b", "text": "c"})
    with pytest.raises(
        DataError, match=r"\(classification; text, by which 'label' would be left unread\).* `format: classification`"
    ):
        format_of(source(), {"text": "great film", "label": "good", "id": 3})
    with pytest.raises(
        DataError, match=r"\(summarisation; text, by which 'summary' would be left unread\).* `format: summarisation`"
    ):
        format_of(source(), {"text": "a long text", "summary": "short"})
    with pytest.raises(DataError, match=r"as question_answer, a row has 'query', 'problem', each of which may be its 'question'"):
        format_of(source(), {"query": "Q", "problem": "P", "answer": "4"})
    with pytest.raises(DataError, match=r"'solution' would be left unread.* `format: question_answer`"):
        format_of(source(), {"problem": "Q", "solution": "because", "answer": "4"})
    assert turns(read({"problem": "Q", "solution": "S", "answer": "4"}, columns={"question": "problem", "answer": "solution"}))[
        1
    ] == ("assistant", "S")
    assert format_of(source(format="text"), {"text": "great film", "label": "good"}) == "text"
    assert format_of(source(format="alpaca"), {"instruction": "a", "output": "b", "text": "c"}) == "alpaca"
    assert format_of(source(columns={"text": "text"}), {"instruction": "a", "output": "b", "text": "c"}) == "text"


def test_columns_that_fit_no_format_are_listed_beside_what_formats_need() -> None:
    with pytest.raises(DataError, match=r"'frage', 'antwort' fit no format.*prompt_completion: prompt, completion"):
        format_of(source(), {"frage": "a", "antwort": "b"})


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


# --- What a turn says of itself ----------------------------------------------------------------------------------------------


def turn(role: str = "assistant", **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": "A"} | fields


@pytest.mark.parametrize("nothing", [{}, {"weight": 1}, {"weight": 1.0}, {"train": True}, {"weight": None, "train": None}])
def test_a_turn_is_trained_unless_its_row_says_otherwise(nothing: dict[str, Any]) -> None:
    conversation = read({"messages": [USER, turn(**nothing)]})
    assert conversation.messages[1] == turn(), "templates see neither weight nor train"
    assert trained_turns(conversation.messages, "assistant") == [1]


@pytest.mark.parametrize("excepted", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"weight": 0, "train": False}])
def test_a_turn_that_is_not_to_be_trained_is_no_target_of_any_kind(excepted: dict[str, Any]) -> None:
    messages = read({"messages": [USER, turn(**excepted), USER, turn(), USER | {"train": False}]}).messages
    assert messages[1] == turn(train=False)
    assert trained_turns(messages, "assistant") == [3]
    assert trained_turns(messages, ("user", "assistant")) == [0, 2, 3]
    assert trained_turns(messages[:2], "last") == [], "the last answer is meant, not the last that may be trained"
    sharegpt = read({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A", **excepted}]})
    assert trained_turns(sharegpt.messages, "completion") == []


@pytest.mark.parametrize("weight", [0.5, 2, 1e-6, 1_000_000])
def test_another_weight_than_0_and_1_is_kept_with_its_turn(weight: float) -> None:
    messages = read({"messages": [USER, turn(weight=weight, train=True)]}).messages
    assert messages[1] == turn(weight=float(weight))
    assert trained_turns(messages, "assistant") == [1]
    sharegpt = read({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A", "weight": weight}]})
    assert sharegpt.messages[1]["weight"] == weight


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"weight": -1}, r"'messages\[1\].weight' is -1, expected a number: 0 \(the turn is not trained\)"),
        ({"weight": float("nan")}, "weight' is nan"),
        ({"weight": float("inf")}, "weight' is inf"),
        ({"weight": 10**400}, "weight' is 1000"),
        ({"weight": 1e-9}, "from 1e-06 to 1e\\+06"),
        ({"weight": [0.5]}, r"weight' is \[0.5\]"),
        ({"weight": 0.5, "train": False}, "contradict each other"),
        ({"weight": "0"}, "weight' is '0'"),
        ({"weight": True}, "weight' is True"),
        ({"train": 0}, "train' is 0, expected true or false"),
        ({"train": "false"}, "train' is 'false'"),
        ({"weight": 0, "train": True}, "contradict each other"),
        ({"weight": 1, "train": False}, "contradict each other"),
        ({"function_call": {"name": "f", "arguments": "{}"}}, "older form of a call; write it as an entry of tool_calls"),
    ],
)
def test_what_a_turn_asks_for_and_cannot_get_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        read({"messages": [USER, turn(**fields)]})


def test_keys_that_nobody_knows_are_named_and_left_for_the_template() -> None:
    openai = {"refusal": None, "audio": None, "annotations": [], "function_call": None, "name": "bot", "reasoning_content": "R"}
    conversation = read({"messages": [USER, turn(**openai)]})
    assert conversation.unread_keys == ()
    assert conversation.messages[1] == turn(name="bot", reasoning_content="R")
    assert read({"messages": [USER, turn(thinking="T")]}).unread_keys == (), "a thought is trained or refused under each name"
    conversation = read({"messages": [USER | {"trian": False}, turn(loss=True, mood="", trian=False)]})
    assert conversation.unread_keys == ("trian", "loss")
    assert conversation.messages[1]["loss"] is True
    assert read({"messages": [USER, turn(refusal="no")]}).unread_keys == ("refusal",)
    assert read({"messages": [USER | {"weight": 1}, turn(weight=1)]}).unread_keys == ("weight: 1 of user",)
    assert read({"messages": [USER | {"weight": 0.5}, turn(weight=0.5)]}).unread_keys == (), "what is trained says who reads it"
    assert read({"messages": [USER | {"train": True}, turn()]}).unread_keys == ("train: true of user",)


# --- Columns that no format reads --------------------------------------------------------------------------------------------

QA = {"prompt": "Q", "completion": "A"}


@pytest.mark.parametrize(
    ("row", "column", "name"),
    [
        ({"sentence": "great film", "label": "good", "stars": 0}, "stars", "classification"),
        ({"question": "Q", "answer": "A", "choices": ["A", "B"]}, "choices", "question_answer"),
        ({"dialogue": "Hi", "summary": "A", "topic": "greeting"}, "topic", "summarisation"),
        ({"text": "bonjour", "lang": "fr"}, "lang", "text"),
        ({"text": "hello", "role": "prompter", "id": 1}, "role", "text"),
        ({**QA, "label": True}, "label", "prompt_completion"),
        ({**QA, "chosen": "A", "rejected": "B"}, "rejected", "prompt_completion"),
        ({"messages": [USER], "images": ["a.png"]}, "images", "messages"),
        ({"messages": [USER], "functions": [{"name": "f"}]}, "functions", "messages"),
        ({"instruction": "a", "output": "b", "explanation": "c"}, "explanation", "alpaca"),
        ({"conversations": [{"from": "human", "value": "Q"}], "score": 3}, "score", "sharegpt"),
    ],
)
def test_a_column_that_may_matter_is_refused_until_the_format_is_named_and_then_said(
    row: dict[str, Any], column: str, name: Any
) -> None:
    with pytest.raises(DataError, match=rf"'{column}'.* would be left unread.* say so with `format: {name}`"):
        format_of(source(), row)
    assert column in read(row, format=name).unread_columns
    with pytest.raises(RowError, match=rf"'{column}'.* would be left unread"):  # a later row of a file that began without it
        read_row(row, as_format(name, is_named=False), HERE)


def test_empty_columns_and_those_that_only_keep_the_books_do_not_stand_in_the_way() -> None:
    kept = {"id": 7, "source": "web", "url": "u", "__index_level_0__": 3, "Unnamed: 0": 1, "prompt_id": "x", "metadata": {"a": 1}}
    conversation = read({**QA, **kept, "label": None, "images": [], "note": ""})
    assert conversation.unread_columns == tuple(kept)
    assert read_row({**QA, **kept}, as_format("prompt_completion", is_named=False), HERE).unread_columns == tuple(kept)


def test_mapping_the_columns_names_the_format() -> None:
    row = {"question": "Q", "answer": "A", "label": 1}
    assert read(row, columns={"prompt": "question", "completion": "answer"}).unread_columns == ("label",)
    with pytest.raises(DataError, match="'label' would be left unread"):
        format_of(source(columns={"system": "s"}), {**QA, "s": "S", "label": 1})


# --- History and ShareGPT ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_text", [False, True])
def test_the_history_of_alpaca_rows_comes_before_the_question(as_text: bool) -> None:
    history: Any = [["Q1", "A1"], ["Q2", "A2"]]
    row = {
        "system": "S",
        "instruction": "now?",
        "input": "",
        "output": "O",
        "history": json.dumps(history) if as_text else history,
    }
    exchanges = [("system", "S"), ("user", "Q1"), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2")]
    assert turns(read(row)) == [*exchanges, ("user", "now?"), ("assistant", "O")]
    for nothing in (None, [], ""):
        assert turns(read(row | {"history": nothing})) == [("system", "S"), ("user", "now?"), ("assistant", "O")]


@pytest.mark.parametrize("history", [[["Q1"]], ["Q1"], {"q": "a"}, [["Q1", None]], "Q1", [["Q", "A", "more"]]])
def test_a_history_of_another_shape_is_refused(history: Any) -> None:
    with pytest.raises(RowError, match="'history"):
        read({"instruction": "a", "output": "b", "history": history})


def test_sharegpt_rows_become_chats_under_each_spelling_of_its_roles() -> None:
    call = json.dumps({"name": "f", "arguments": {"x": 1}})
    conversations = [
        {"from": "human", "value": "Q"},
        {"from": "function_call", "value": call},
        {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "A"},
        {"from": "user", "value": "Q2"},
        {"from": "assistant", "value": "A2"},
    ]
    schema = {"name": "f", "parameters": {}}
    conversation = read({"conversations": conversations, "system": "S", "tools": json.dumps([schema])})
    assert [role for role, _ in turns(conversation)] == ["system", "user", "assistant", "tool", "assistant", "user", "assistant"]
    assert conversation.messages[2] == turn(
        content="", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    )
    assert conversation.tools == [{"type": "function", "function": schema}]
    assert trained_turns(conversation.messages, "assistant") == [2, 4, 6]
    two = read({"conversations": [*conversations[:1], {"from": "function_call", "value": f"[{call}, {call}]"}]})
    assert len(two.messages[1]["tool_calls"]) == 2
    assert turns(read({"conversations": [{"from": "system", "value": "S"}, *conversations[:1]]}))[0] == ("system", "S")


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"from": "narrator", "value": "A"}, "from' is 'narrator', expected one of system, human, user, gpt"),
        ({"from": None, "value": "A"}, "from' is None"),
        ({"from": ["gpt"], "value": "A"}, "from' is "),
        ({"from": "gpt", "value": None}, "value' is null, expected text"),
        ({"from": "gpt"}, "value' is null, expected text"),
        ("hello", "is text, expected an object with from and value"),
        ({"from": "function_call", "value": "f(1)"}, "not JSON"),
        ({"from": "function_call", "value": "[1]"}, "not a call with name and arguments"),
        ({"from": "gpt", "value": "A", "content": "B"}, "has 'content' beside 'from' and 'value'"),
        ({"from": "gpt", "value": "A", "role": "user"}, "has 'role' beside 'from' and 'value'"),
        ({"from": "function_call", "value": "[]"}, "not a call with name and arguments"),
        ({"role": "user", "content": "Q"}, "write `format: messages` with `columns: {messages: conversations}`"),
        ({"from": "gpt", "value": "A", "weight": -0.3}, "weight' is -0.3"),
    ],
)
def test_turns_that_are_not_sharegpts_are_refused(turn: Any, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        read({"conversations": [{"from": "human", "value": "Q"}, turn]})


def test_two_system_prompts_and_sharegpt_turns_in_messages_are_refused() -> None:
    system = {"from": "system", "value": "S"}
    with pytest.raises(RowError, match=r"a system prompt in 'system' and another in 'conversations\[0\]'"):
        read({"conversations": [system], "system": "other"})
    with pytest.raises(RowError, match=r"write `format: sharegpt` with `columns: \{conversations: messages\}`"):
        read({"messages": [system]}, format="messages")


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "tool_calls", "function", "from", "value", "weight", "train"]), inner, max_size=4
        )
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
        conversation = read_row(row, as_format(name), HERE)
        assert conversation.text or conversation.messages
