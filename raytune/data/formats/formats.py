"""What the fields of a row mean: each format is a function from a row to a `Conversation` and a line in `FORMATS`."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from raytune.config.sections.data import DataFormat
from raytune.data.conversations.conversation import Conversation, Message, Origin, RowError, kind_of
from raytune.data.conversations.turns import from_json, message_of, sharegpt_message_of, unread_keys
from raytune.data.formats.row_fields import RowFields


@dataclass(frozen=True, kw_only=True)
class Format:
    required: Mapping[str, Sequence[str]]
    """Field -> other names of columns that are taken for it."""
    optional: Mapping[str, Sequence[str]]
    read: Callable[[RowFields, Origin], Conversation]
    recognises: Callable[[RowFields], bool] = lambda fields: True
    """Whether what is in the required fields looks like this format; asked where formats share a column."""
    answer: str | None = None
    """The required field that rows need not have which are asked and not trained on."""

    @property
    def fields(self) -> tuple[str, ...]:
        return (*self.required, *self.optional)

    @cached_property
    def spellings(self) -> dict[str, tuple[str, ...]]:
        return {field: (field, *others) for field, others in [*self.required.items(), *self.optional.items()]}


def _messages(fields: RowFields, origin: Origin) -> Conversation:
    """OpenAI's: `messages` is a list of turns with `role` and `content`; sometimes `system` and `tools` beside it."""
    messages, unread = _read_turns(fields, "messages", message_of)
    return Conversation(messages=_opened(fields, "messages", messages), tools=_tools(fields), origin=origin, unread_keys=unread)


def _sharegpt(fields: RowFields, origin: Origin) -> Conversation:
    """ShareGPT's: `conversations` is a list of turns with `from` and `value`; often `system` and `tools` beside it."""
    messages, unread = _read_turns(fields, "conversations", sharegpt_message_of)
    tools = _tools(fields)
    return Conversation(
        messages=_opened(fields, "conversations", messages),
        tools=tools and [_function_schema(tool) for tool in tools],
        origin=origin,
        unread_keys=unread,
    )


def _read_turns(
    fields: RowFields, field: str, read_turn: Callable[[Any, str], Message]
) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """The turns of a chat, and those of their keys that we do not know."""
    turns, column = _turns(fields, field), fields.place(field)
    messages = tuple(read_turn(turn, f"{column}[{index}]") for index, turn in enumerate(turns))
    return messages, unread_keys(turns, messages)


def _opened(fields: RowFields, field: str, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Turns behind the system prompt that stands beside them, if one does."""
    system = fields.optional_text("system")
    if system and messages[0]["role"] == "system":
        beside = "`constants`" if "system" in fields.mapped.constants else f"'{fields.place('system')}'"
        raise RowError(f"has a system prompt in {beside} and another in '{fields.place(field)}[0]'")
    return _opening(system) + messages


def _turns(fields: RowFields, field: str) -> list[Any]:
    turns, column = fields.present(field), fields.place(field)
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        turns = from_json(turns, column)
    if not isinstance(turns, list):
        raise RowError(f"'{column}' is {kind_of(turns)}, expected a list of turns")
    if not turns:
        raise RowError(f"'{column}' is an empty list")
    return turns


def _is_sharegpt(fields: RowFields, field: str) -> bool:
    """Whether turns are ShareGPT's rather than OpenAI's: by the field that the config maps, by what the first one has, or else by
    the name of the column."""
    if field in fields.mapped.columns:
        return field == "conversations"
    try:
        first = _turns(fields, field)[0]
    except RowError:
        first = None
    keys = first.keys() if isinstance(first, dict) else ()
    return "from" in keys or ("role" not in keys and fields.place(field) != "messages")


def _tools(fields: RowFields) -> list[Any] | None:
    tools = fields.optional_list("tools")
    for index, tool in enumerate(tools or ()):
        if not isinstance(tool, dict):
            place = f"{fields.place('tools')}[{index}]"
            raise RowError(f"'{place}' is {kind_of(tool)}, expected an object: the JSON schema of a function")
    return tools or None


def _function_schema(tool: Any) -> Any:
    """A tool as templates expect it: ShareGPT files hold the function's schema alone."""
    is_bare = isinstance(tool, dict) and "name" in tool and "function" not in tool
    return {"type": "function", "function": tool} if is_bare else tool


def _alpaca(fields: RowFields, origin: Origin) -> Conversation:
    """Stanford Alpaca's: `instruction`, often an `input` to apply it to, the `output`, and in `history` earlier exchanges."""
    return _exchange(
        fields,
        prompt=_joined(fields.text("instruction"), fields.optional_text("input")),
        answer=fields.text("output"),
        history=_history(fields),
        origin=origin,
    )


def _history(fields: RowFields) -> list[Any]:
    """Earlier exchanges, `[[question, answer], ...]`."""
    history = fields.optional_list("history") or []
    for index, exchange in enumerate(history):
        if not isinstance(exchange, list) or [type(text) for text in exchange] != [str, str]:
            raise RowError(f"'{fields.place('history')}[{index}]' is not [question, answer] in text")
    return history


def _question_answer(fields: RowFields, origin: Origin) -> Conversation:
    """A question and its answer; the `context` in which it is asked, if there is one, stands before it."""
    prompt = _joined(fields.optional_text("context"), fields.text("question"))
    return _exchange(fields, prompt=prompt, answer=fields.text("answer"), origin=origin)


def _classification(fields: RowFields, origin: Origin) -> Conversation:
    """A text and the name of its class, which is the answer; an `instruction` stands before the text."""
    prompt = _joined(fields.optional_text("instruction"), fields.text("text"))
    return _exchange(fields, prompt=prompt, answer=_label(fields), origin=origin)


def _label(fields: RowFields) -> str:
    """The name of a row's label.

    Raises:
        RowError: if it has none, or is a number that nobody named.
    """
    label, column = fields.present("label"), fields.place("label")
    if not isinstance(label, str | int | float):
        raise RowError(f"'{column}' is {kind_of(label)}, expected the name of a class, or its number")
    text = label if isinstance(label, str) else json.dumps(label)
    if text in fields.labels:
        return fields.labels[text]
    if fields.labels and text not in fields.labels.values():
        raise RowError(f"'{column}' is {text!r}, which `labels` does not name: it has {', '.join(fields.labels)}")
    if not text.strip():
        raise RowError(f"'{column}' is empty")
    if not fields.labels and (not isinstance(label, str) or re.fullmatch(r"[-+]?\d+(\.0*)?", text.strip())):
        raise RowError(
            f"'{column}' is {text}, which says nothing to a model of text: name the labels, for example "
            f"`labels: [negative, positive]` for 0 and 1, or `labels: {{1: bad, 2: good}}`"
        )
    return text


def _summarisation(fields: RowFields, origin: Origin) -> Conversation:
    """A document and its summary; an `instruction` stands before the document."""
    prompt = _joined(fields.optional_text("instruction"), fields.text("document"))
    return _exchange(fields, prompt=prompt, answer=fields.text("summary"), origin=origin)


def _prompt_completion(fields: RowFields, origin: Origin) -> Conversation:
    """A prompt and what follows it. The template wraps them as user and assistant; `plain` adds nothing between them. Each may
    be a list of turns; an answer inside of the prompt is not trained."""
    tools = _tools(fields)
    if not any(isinstance(fields.present(field), list) for field in ("prompt", "completion")):
        if tools:
            raise RowError(f"has '{fields.place('tools')}' beside a prompt in text: write it as a list of turns")
        return _exchange(fields, prompt=fields.text("prompt"), answer=fields.text("completion"), origin=origin)
    asked, asked_keys = _side(fields, "prompt", "user")
    answered, answered_keys = _side(fields, "completion", "assistant")
    if answered[0]["role"] != "assistant":
        raise RowError(f"'{fields.place('completion')}[0].role' is {answered[0]['role']!r}, expected 'assistant'")
    if asked[-1]["role"] == "assistant":
        raise RowError(f"'{fields.place('prompt')}' ends with an answer, expected a turn that is answered")
    return Conversation(
        messages=_opened(fields, "prompt", tuple(_untrained(message) for message in asked)) + answered,
        tools=tools,
        origin=origin,
        unread_keys=tuple(dict.fromkeys((*asked_keys, *answered_keys))),
    )


def _side(fields: RowFields, field: str, role: str) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """The turns of a prompt or a completion, and those of their keys that we do not know."""
    if isinstance(fields.present(field), str):
        return ({"role": role, "content": fields.text(field)},), ()
    return _read_turns(fields, field, message_of)


def _untrained(message: Message) -> Message:
    if message["role"] != "assistant":
        return message
    return {key: value for key, value in message.items() if key != "weight"} | {"train": False}


def _plain_text(fields: RowFields, origin: Origin) -> Conversation:
    """A document for continued pre-training: no turns, every token is a target."""
    text = fields.text("text")
    if not text:
        raise RowError(f"'{fields.place('text')}' is empty")
    return Conversation(text=text, origin=origin)


_SYSTEM: Mapping[str, Sequence[str]] = {"system": ("system_prompt",)}
FORMATS: dict[DataFormat, Format] = {
    "messages": Format(
        required={"messages": ("conversations", "conversation")},
        optional={**_SYSTEM, "tools": ()},
        read=_messages,
        recognises=lambda fields: not _is_sharegpt(fields, "messages"),
    ),
    "sharegpt": Format(
        required={"conversations": ("conversation", "messages")},
        optional={**_SYSTEM, "tools": ()},
        read=_sharegpt,
        recognises=lambda fields: _is_sharegpt(fields, "conversations"),
    ),
    "alpaca": Format(
        required={"instruction": (), "output": ("response",)},
        optional={"input": ("context",), **_SYSTEM, "history": ()},
        read=_alpaca,
        answer="output",
    ),
    "question_answer": Format(
        required={"question": ("query", "problem"), "answer": ("response", "solution")},
        optional={"context": ("passage",), **_SYSTEM},
        read=_question_answer,
        answer="answer",
    ),
    "classification": Format(
        required={
            "text": ("sentence", "review", "tweet", "utterance"),
            "label": ("label_text", "class", "category", "sentiment", "intent"),
        },
        optional={"instruction": (), **_SYSTEM},
        read=_classification,
    ),
    "summarisation": Format(
        required={"document": ("article", "dialogue", "text"), "summary": ("highlights",)},
        optional={"instruction": (), **_SYSTEM},
        read=_summarisation,
        answer="summary",
    ),
    "prompt_completion": Format(
        required={"prompt": ("input", "inputs"), "completion": ("response", "output", "target", "targets")},
        optional={**_SYSTEM, "tools": ()},
        read=_prompt_completion,
        answer="completion",
    ),
    "text": Format(required={"text": ("content",)}, optional={}, read=_plain_text),
}


def _exchange(
    fields: RowFields, *, prompt: str, answer: str, origin: Origin, history: Sequence[Sequence[str]] = ()
) -> Conversation:
    turns = tuple(
        {"role": role, "content": text}
        for exchange in [*history, (prompt, answer)]
        for role, text in zip(("user", "assistant"), exchange, strict=True)
    )
    return Conversation(messages=_opening(fields.optional_text("system")) + turns, origin=origin)


def _joined(*texts: str) -> str:
    return "\n\n".join(text for text in texts if text)


def _opening(system: str) -> tuple[Message, ...]:
    return ({"role": "system", "content": system},) if system else ()
