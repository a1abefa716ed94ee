"""What the columns of a row mean: each format is a function from a row to a `Conversation` and a line in `FORMATS`."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytune.config.data import DataFormat, DataSource
from raytune.data.conversation import Conversation, Message, Origin, RowError, kind_of
from raytune.errors import DataError

ROLES = ("system", "user", "assistant", "tool")

Columns = Mapping[str, str]
"""The format's field -> the column that holds it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Mapping[str, Any], Columns, Origin], Conversation]

    @property
    def fields(self) -> tuple[str, ...]:
        return self.required + self.optional


def format_of(source: DataSource, row: Mapping[str, Any]) -> DataFormat:
    """The format of a source: the one its config names, or the only one that its first row fits.

    Raises:
        DataError: if the columns fit no format or several, or the config maps a field that the format does not have.
    """
    if source.format != "auto":
        known = FORMATS[source.format].fields
        if unknown := [field for field in source.columns if field not in known]:
            raise DataError(
                f"{source.path}: columns maps '{unknown[0]}', which is not a field of the format '{source.format}'. "
                f"Its fields are {', '.join(known)}."
            )
        if missing := _missing(source.format, source.columns, row):
            raise DataError(
                f"{source.path}: the format '{source.format}' needs the column{'s' * (len(missing) > 1)} {_listed(missing)}, "
                f"but the file has {_listed(row)}. Map them with `columns`, for example "
                f"`columns: {{{FORMATS[source.format].required[0]}: {next(iter(row), 'name')}}}`."
            )
        return source.format
    candidates: list[DataFormat] = [
        name
        for name, format in FORMATS.items()
        if set(source.columns) <= set(format.fields) and not _missing(name, source.columns, row)
    ]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise DataError(
            f"{source.path}: its columns {_listed(row)} fit more than one format ({', '.join(candidates)}). "
            f"Say which one with `format`, for example `format: {candidates[0]}`."
        )
    needs = "; ".join(f"{name}: {', '.join(format.required)}" for name, format in FORMATS.items())
    mapped = f" with columns {dict(source.columns)}" if source.columns else ""
    raise DataError(
        f"{source.path}: its columns {_listed(row)}{mapped} fit no format. Formats and the columns they need: {needs}. "
        f"Name the columns, for example `columns: {{prompt: question, completion: answer}}`."
    )


def read_row(row: Mapping[str, Any], name: DataFormat, columns: Columns, origin: Origin) -> Conversation:
    """Read a row in a format.

    Raises:
        RowError: if a field is missing, null or of the wrong type.
    """
    return FORMATS[name].read(row, columns, origin)


def _messages(row: Mapping[str, Any], columns: Columns, origin: Origin) -> Conversation:
    """OpenAI's: `messages` is a list of turns; `tools`, if any, is a list of JSON schemas (or that list as JSON)."""
    column = columns.get("messages", "messages")
    messages = _present(row, column)
    if not isinstance(messages, list):
        raise RowError(f"'{column}' is {kind_of(messages)}, expected a list of turns")
    if not messages:
        raise RowError(f"'{column}' is an empty list")
    tools = row.get(columns.get("tools", "tools"))
    if isinstance(tools, str):
        tools = _json(tools, "tools")
    if tools is not None and not isinstance(tools, list):
        raise RowError(f"'tools' is {kind_of(tools)}, expected a list")
    return Conversation(
        messages=tuple(_message(message, f"{column}[{index}]") for index, message in enumerate(messages)),
        tools=tools or None,
        origin=origin,
    )


def _message(message: Any, place: str) -> Message:
    if not isinstance(message, dict):
        raise RowError(f"'{place}' is {kind_of(message)}, expected an object with role and content")
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if role not in ROLES:
        raise RowError(f"'{place}.role' is {role!r}, expected one of {', '.join(ROLES)}")
    if calls is not None:
        message = message | {"tool_calls": _tool_calls(calls, f"{place}.tool_calls")}
    if isinstance(content, str) or (content is None and calls and role == "assistant"):
        return message
    if isinstance(content, list):
        return message | {"content": _text_of_parts(content, f"{place}.content")}
    raise RowError(f"'{place}.content' is {kind_of(content)}, expected text")


def _text_of_parts(parts: list[Any], place: str) -> str:
    """The text of OpenAI's list form, `[{"type": "text", "text": ...}]`."""
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RowError(f"'{place}' has a part that is not text; only text can be trained on")
    return "".join(part["text"] for part in parts)


def _tool_calls(calls: Any, place: str) -> list[Any]:
    """Tool calls with their arguments as objects: OpenAI sends them as JSON in a string, which templates would quote again."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RowError(f"'{place}' is not a list of objects")
    read = []
    for call in calls:
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            call = call | {"function": function | {"arguments": _json(function["arguments"], f"{place}.function.arguments")}}
        read.append(call)
    return read


def _alpaca(row: Mapping[str, Any], columns: Columns, origin: Origin) -> Conversation:
    """Stanford Alpaca's: `instruction`, often an `input` to apply it to, and the `output`."""
    instruction = _text(row, columns.get("instruction", "instruction"))
    context = _optional_text(row, columns.get("input", "input"))
    return _exchange(
        system=_optional_text(row, columns.get("system", "system")),
        prompt=f"{instruction}\n\n{context}" if context else instruction,
        answer=_text(row, columns.get("output", "output")),
        origin=origin,
    )


def _prompt_completion(row: Mapping[str, Any], columns: Columns, origin: Origin) -> Conversation:
    """A prompt and what follows it. The template wraps them as user and assistant; `plain` adds nothing between them."""
    return _exchange(
        system=_optional_text(row, columns.get("system", "system")),
        prompt=_text(row, columns.get("prompt", "prompt")),
        answer=_text(row, columns.get("completion", "completion")),
        origin=origin,
    )


def _plain_text(row: Mapping[str, Any], columns: Columns, origin: Origin) -> Conversation:
    """A document for continued pre-training: no turns, every token is a target."""
    column = columns.get("text", "text")
    text = _text(row, column)
    if not text:
        raise RowError(f"'{column}' is empty")
    return Conversation(text=text, origin=origin)


FORMATS: dict[DataFormat, Format] = {
    "messages": Format(required=("messages",), optional=("tools",), read=_messages),
    "alpaca": Format(required=("instruction", "output"), optional=("input", "system"), read=_alpaca),
    "prompt_completion": Format(required=("prompt", "completion"), optional=("system",), read=_prompt_completion),
    "text": Format(required=("text",), optional=(), read=_plain_text),
}


def _exchange(*, system: str, prompt: str, answer: str, origin: Origin) -> Conversation:
    opening = ({"role": "system", "content": system},) if system else ()
    turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
    return Conversation(messages=opening + turns, origin=origin)


def _missing(name: DataFormat, columns: Columns, row: Mapping[str, Any]) -> list[str]:
    """Columns that the row lacks: those of the required fields, and every one that the config maps."""
    needed = [columns.get(field, field) for field in FORMATS[name].required]
    return [column for column in dict.fromkeys([*needed, *columns.values()]) if column not in row]


def _present(row: Mapping[str, Any], column: str) -> Any:
    if column not in row:
        raise RowError(f"has no '{column}', only {_listed(row)}")
    if row[column] is None:
        raise RowError(f"'{column}' is null")
    return row[column]


def _text(row: Mapping[str, Any], column: str) -> str:
    value = _present(row, column)
    if not isinstance(value, str):
        raise RowError(f"'{column}' is {kind_of(value)}, expected text")
    return value


def _optional_text(row: Mapping[str, Any], column: str) -> str:
    return "" if row.get(column) is None else _text(row, column)


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RowError(f"'{place}' is text that is not JSON ({error})") from error


def _listed(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none"
