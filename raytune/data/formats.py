"""What the columns of a row mean: each format is a function from a row to a `Conversation` and a line in `FORMATS`."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raytune.config.data import DataFormat, DataSource
from raytune.data.conversation import Conversation, Message, Origin, RowError, kind_of
from raytune.data.turns import from_json, is_empty, message_of, sharegpt_message_of, unread_keys
from raytune.errors import DataError

Columns = Mapping[str, str]
"""The format's field -> the column that holds it."""

# What says which row it is, where it is from or how long, but never what a model is to learn. Of `parallel_tool_calls`, a setting
# of OpenAI's API that its rows carry, no text depends.
_BOOKKEEPING = re.compile(
    r"_?id|idx|index|uid|uuid|guid|key|hash|md5|sha1|sha256"
    r"|(row|prompt|example|sample|question|conversation|message|session|doc|document|user)_id"
    r"|sources?|data_?set|dataset_(name|source)|origin|split|subset|config|ur[il]|link|file|file_?name|file_?path|path|licen[cs]e"
    r"|date|timestamp|(created|updated)(_at)?|(num|n)_tokens|tokens?_count|num_turns|length|(char|word)_count"
    r"|meta|metadata|parallel_tool_calls"
    r"|__index_level_\d+__|unnamed: \d+",  # as pandas writes them
    re.IGNORECASE,
)
_HINTS = {
    "label": "raytune trains on text; it has no classifier and does not learn from preferences.",
    "rejected": "raytune does not learn from preferences: it does supervised fine-tuning only.",
    "image": "Images are not trained on.",
    "images": "Images are not trained on.",
    "audio": "Sound is not trained on.",
    "video": "Videos are not trained on.",
}


_PREFERENCES = ("chosen", "rejected")
"""Columns of data for DPO and its like."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Mapping[str, Any], Columns, Origin], Conversation]
    answer: str | None = None
    """The required field that rows need not have which are asked and not trained on."""

    @property
    def fields(self) -> tuple[str, ...]:
        return self.required + self.optional


def format_of(source: DataSource, row: Mapping[str, Any]) -> DataFormat:
    """The format of a source: the one its config names, or the only one that its first row fits.

    Raises:
        DataError: if the columns fit no format or several, a column that may matter would be left unread without the config's
            naming the format, or the config maps a field that the format does not have.
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
        name = candidates[0]
        unread = _telling(_unread_columns(name, source.columns, row))
        if unread and not names_format(source, name):
            raise DataError(f"{source.path}: {_unread_words(unread, name)}.")
        return name
    if candidates:
        raise DataError(
            f"{source.path}: its columns {_listed(row)} fit more than one format ({', '.join(candidates)}). "
            f"Say which one with `format`, for example `format: {candidates[0]}`."
        )
    if set(_PREFERENCES) <= row.keys() and not source.columns:
        raise DataError(_preference_words(source.path, row))
    needs = "; ".join(f"{name}: {', '.join(format.required)}" for name, format in FORMATS.items())
    mapped = f" with columns {dict(source.columns)}" if source.columns else ""
    raise DataError(
        f"{source.path}: its columns {_listed(row)}{mapped} fit no format. Formats and the columns they need: {needs}. "
        f"Name the columns, for example `columns: {{prompt: question, completion: answer}}`."
    )


def format_of_asked(source: DataSource, row: Mapping[str, Any]) -> DataFormat:
    """As `format_of`, for rows that may lack their answers.

    Raises:
        DataError: as that.
    """
    named: list[DataFormat] = [source.format] if source.format != "auto" else list(FORMATS)
    fits = [name for name in named if not _missing(name, source.columns, row)]
    completed = (with_answer(row, name, source.columns) for name in named if not fits)
    return format_of(source, next((one for one in completed if one != row), row))


def with_answer(row: Mapping[str, Any], name: DataFormat, columns: Columns) -> Mapping[str, Any]:
    """A row with an empty answer, where nothing but its answer is missing."""
    answer = FORMATS[name].answer
    column = columns.get(answer, answer) if answer else None
    return row if column is None or _missing(name, columns, row) != [column] else {**row, column: ""}


def names_format(source: DataSource, name: DataFormat) -> bool:
    """Whether the config, rather than the columns of the file, says what the rows are: by a format, or by its columns."""
    return source.format != "auto" or set(FORMATS[name].required) <= set(source.columns)


def read_row(
    row: Mapping[str, Any], name: DataFormat, columns: Columns, origin: Origin, *, is_named: bool = True
) -> Conversation:
    """Read a row in a format.

    Raises:
        RowError: if a field is missing, null or of the wrong type; or, in a format that was only recognised, if a column that may
            matter would be left unread.
    """
    conversation = FORMATS[name].read(row, columns, origin)
    unread = _unread_columns(name, columns, row)
    if not unread:
        return conversation
    if not is_named and (telling := _telling(unread)):
        raise RowError(_unread_words(telling, name))
    return replace(conversation, unread_columns=tuple(unread))


def _messages(row: Mapping[str, Any], columns: Columns, origin: Origin) -> Conversation:
    """OpenAI's: `messages` is a list of turns; `tools`, if any, is a list of JSON schemas (or that list as JSON)."""
    column = columns.get("messages", "messages")
    turns = _turns(row, column)
    messages = tuple(message_of(turn, f"{column}[{index}]") for index, turn in enumerate(turns))
    return Conversation(
        messages=messages,
        tools=_tools(row, columns.get("tools", "tools")),
        origin=origin,
        unread_keys=unread_keys(turns, messages),
    )


def _sharegpt(row: Mapping[str, Any], columns: Columns, origin: Origin) -> Conversation:
    """ShareGPT's: `conversations` is a list of turns with `from` and `value`; often `system` and `tools` beside it."""
    column, system_column = columns.get("conversations", "conversations"), columns.get("system", "system")
    turns = _turns(row, column)
    messages = tuple(sharegpt_message_of(turn, f"{column}[{index}]") for index, turn in enumerate(turns))
    system = _optional_text(row, system_column)
    if system and messages[0]["role"] == "system":
        raise RowError(f"has a system prompt in '{system_column}' and another in '{column}[0]'")
    tools = _tools(row, columns.get("tools", "tools"))
    return Conversation(
        messages=_opening(system) + messages,
        tools=tools and [_function_schema(tool) for tool in tools],
        origin=origin,
        unread_keys=unread_keys(turns, messages),
    )


def _turns(row: Mapping[str, Any], column: str) -> list[Any]:
    turns = _present(row, column)
    if not isinstance(turns, list):
        raise RowError(f"'{column}' is {kind_of(turns)}, expected a list of turns")
    if not turns:
        raise RowError(f"'{column}' is an empty list")
    return turns


def _tools(row: Mapping[str, Any], column: str) -> list[Any] | None:
    tools = row.get(column)
    if isinstance(tools, str):
        tools = from_json(tools, column) if tools.strip() else None
    if tools is not None and not isinstance(tools, list):
        raise RowError(f"'{column}' is {kind_of(tools)}, expected a list")
    for index, tool in enumerate(tools or ()):
        if not isinstance(tool, dict):
            raise RowError(f"'{column}[{index}]' is {kind_of(tool)}, expected an object: the JSON schema of a function")
    return tools or None


def _function_schema(tool: Any) -> Any:
    """A tool as templates expect it: ShareGPT files hold the function's schema alone."""
    is_bare = isinstance(tool, dict) and "name" in tool and "function" not in tool
    return {"type": "function", "function": tool} if is_bare else tool


def _alpaca(row: Mapping[str, Any], columns: Columns, origin: Origin) -> Conversation:
    """Stanford Alpaca's: `instruction`, often an `input` to apply it to, the `output`, and in `history` earlier exchanges."""
    instruction = _text(row, columns.get("instruction", "instruction"))
    context = _optional_text(row, columns.get("input", "input"))
    return _exchange(
        system=_optional_text(row, columns.get("system", "system")),
        prompt=f"{instruction}\n\n{context}" if context else instruction,
        answer=_text(row, columns.get("output", "output")),
        history=_history(row, columns.get("history", "history")),
        origin=origin,
    )


def _history(row: Mapping[str, Any], column: str) -> list[Any]:
    """Earlier exchanges, `[[question, answer], ...]` (or that list as JSON)."""
    history = row.get(column)
    if isinstance(history, str):
        history = from_json(history, column) if history.strip() else None
    if history is None:
        return []
    if not isinstance(history, list):
        raise RowError(f"'{column}' is {kind_of(history)}, expected a list of [question, answer]")
    for index, exchange in enumerate(history):
        if not isinstance(exchange, list) or [type(text) for text in exchange] != [str, str]:
            raise RowError(f"'{column}[{index}]' is not [question, answer] in text")
    return history


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
    "sharegpt": Format(required=("conversations",), optional=("system", "tools"), read=_sharegpt),
    "alpaca": Format(required=("instruction", "output"), optional=("input", "system", "history"), answer="output", read=_alpaca),
    "prompt_completion": Format(
        required=("prompt", "completion"), optional=("system",), answer="completion", read=_prompt_completion
    ),
    "text": Format(required=("text",), optional=(), read=_plain_text),
}


def _exchange(*, system: str, prompt: str, answer: str, origin: Origin, history: Sequence[Sequence[str]] = ()) -> Conversation:
    turns = tuple(
        {"role": role, "content": text}
        for exchange in [*history, (prompt, answer)]
        for role, text in zip(("user", "assistant"), exchange, strict=True)
    )
    return Conversation(messages=_opening(system) + turns, origin=origin)


def _opening(system: str) -> tuple[Message, ...]:
    return ({"role": "system", "content": system},) if system else ()


def _missing(name: DataFormat, columns: Columns, row: Mapping[str, Any]) -> list[str]:
    """Columns that the row lacks: those of the required fields, and every one that the config maps."""
    needed = [columns.get(field, field) for field in FORMATS[name].required]
    return [column for column in dict.fromkeys([*needed, *columns.values()]) if column not in row]


def _unread_columns(name: DataFormat, columns: Columns, row: Mapping[str, Any]) -> list[str]:
    """Columns with something in them that the format does not read."""
    read = {columns.get(field, field) for field in FORMATS[name].fields}
    return [column for column in row if column not in read and not is_empty(row[column])]


def _telling(columns: Sequence[str]) -> list[str]:
    """Those of some columns that may hold what a model is to learn."""
    return [column for column in columns if not _BOOKKEEPING.fullmatch(column)]


def _unread_words(columns: Sequence[str], name: DataFormat) -> str:
    hints = "".join(f" {hint}" for column, hint in _HINTS.items() if column in columns)
    return (
        f"the column{'s' * (len(columns) > 1)} {_listed(columns)} would be left unread: the format '{name}', recognised by its "
        f"columns, reads {_listed(FORMATS[name].fields)}.{hints} If nothing of it is to be trained, say so with "
        f"`format: {name}`, and the run's report counts it; else map what is to be trained with `columns`"
    )


def _preference_words(path: str, row: Mapping[str, Any]) -> str:
    chosen = row["chosen"]
    is_answer = isinstance(chosen, list) and chosen and isinstance(chosen[0], dict) and chosen[0].get("role") == "assistant"
    if isinstance(chosen, list) and not is_answer:
        way = "`columns: {messages: chosen}`"
    elif isinstance(chosen, str) and isinstance(row.get("prompt"), str):
        way = "`columns: {prompt: prompt, completion: chosen}`"
    elif isinstance(chosen, str) and "prompt" not in row:
        way = "`columns: {text: chosen}`, if it is a whole text"
    else:
        way = "write each prompt and its chosen answer as one chat in a column `messages`"
    return (
        f"{path}: its columns 'chosen' and 'rejected' are preferences, for DPO or a reward model, and raytune does supervised "
        f"fine-tuning only. To train on the chosen answers alone, {'map them: ' if way[0] == '`' else ''}{way}."
    )


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


def _listed(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none"
