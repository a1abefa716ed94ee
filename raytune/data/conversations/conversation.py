"""`Conversation`: the one shape between the formats that files come in and the tokens that a model sees."""

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
"""What chat templates read: `role`, `content` and, where the row has them, `tool_calls`, `name`, `reasoning_content`.

Two keys are not for templates. `train` is there, and False, exactly where the row says that the turn carries no loss
(`weight: 0`, `train: false`); `masking.trained_turns` obeys it. `weight` is there, a float, where the row gives the turn another
one than 1."""

NOT_FOR_TEMPLATES = frozenset({"train", "weight"})


class RowError(Exception):
    """Why one row cannot be used, without its place; the caller knows file and line and decides whether to stop or to skip."""


def kind_of(value: Any) -> str:
    """What a JSON value is, for messages."""
    kinds = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        bytes: "bytes",
    }
    return "null" if value is None else kinds.get(type(value), f"a {type(value).__name__}")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row came from: the file as the user named it, and the line (in a Parquet file or data set: the row), from 1."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """One row: turns for a chat template, or a plain document (then `text` is set and there are no messages)."""

    messages: tuple[Message, ...] = ()
    tools: list[Any] | None = None
    """Tools offered to the model, as JSON schemas."""
    text: str | None = None
    origin: Origin
    unread_columns: tuple[str, ...] = ()
    """Columns of the row with something in them that its format does not read."""
    unread_keys: tuple[str, ...] = ()
    """Keys of its turns that we do not know. They stay in the messages: a template may read them."""
    made_by: str | None = None
    """Of a row that a model made of another: of which, and who, in words (`origins`)."""
