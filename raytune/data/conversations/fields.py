"""The texts in a conversation, and where each of them lies in what a template made of it.

A field is found by putting marks around it: where the template renders the marked conversation to the same text, marks aside, the
marks show where the field lies, letter by letter. A field whose marks do not come out is one that the template leaves out.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytune.data.conversations.conversation import Conversation, Message

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys that hold a thought beside the answer; transformers shows a template each of them under every name."""

# Marks are rare but printable: Python's repr, JSON and changes of case leave them as they are.
_PAIRS = (("⸨", "⸩"), ("⦗", "⦘"), ("⟬", "⟭"))
_THOUGHT = re.compile(
    r"(?P<open><(?P<tag>[a-z_:|]*think[a-z_]*\|?|thought|reasoning)>|\[THINK\]|<\|START_THINKING\|>|◁think▷)"
    r"(?P<thought>.*?)(?P<close></(?P=tag)>|\[/THINK\]|<\|END_THINKING\|>|◁/think▷)",
    re.DOTALL,
)
# Behind a prompt that opens the thought, an answer begins inside of it.
_THOUGHT_END = re.compile(r"</(?:[a-z_:|]*think[a-z_]*\|?|thought|reasoning)>|\[/THINK\]|<\|END_THINKING\|>|◁/think▷")
EMPTY_THOUGHT = re.compile(
    r"\s*(?:<(?P<tag>[a-z_:|]*think[a-z_]*\|?|thought|reasoning)>\s*</(?P=tag)>|\[THINK\]\s*\[/THINK\]|◁think▷\s*◁/think▷)\s*"
)
"""At the beginning of an answer, with the white space around it."""
# Templates look at how a turn begins and ends (`<tool_response>`, say), so marks stand inside such tags.
_TAG_BEFORE = re.compile(r"<[^<>\s]{1,40}>")
_TAG_BEHIND = re.compile(r"<[^<>\s]{1,40}>$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """A piece of text of a conversation."""

    turn: int | None
    """Index of its message; None for the tools that a conversation offers."""
    kind: str
    """"content", "thought" (inside a content), "reasoning", "name" (of a called tool), "argument" or "tools"."""
    name: str
    """What to call it in messages: its key."""
    path: tuple[str | int, ...]
    """From the message (or the list of tools) to the string that holds it."""
    start: int
    stop: int
    text: str
    tag: int = 0
    """Characters of the turn that follow it: a closing tag."""


Span = tuple[int, int]


def fields_of(conversation: Conversation) -> list[Field]:
    """Every text in a conversation that says something, without white space around it."""
    fields: list[Field] = []
    for turn, message in enumerate(conversation.messages):
        fields += _content_fields(turn, message)
        fields += _reasoning_fields(turn, message)
        for index, call in enumerate(message.get("tool_calls") or ()):
            fields += _call_fields(turn, index, call)
    for index, tool in enumerate(conversation.tools or ()):
        function, path = (tool["function"], (index, "function")) if isinstance(tool.get("function"), dict) else (tool, (index,))
        key = "description" if function.get("description") else "name"
        fields += _whole(None, "tools", "tools", (*path, key), function.get(key))
    return fields


def has_thought(content: str) -> bool:
    return _THOUGHT_END.search(content) is not None


def has_reasoning(message: Message) -> bool:
    """Whether a turn of the assistant has a thought, in its words or beside them."""
    content = message.get("content")
    return message["role"] == "assistant" and (
        any(message.get(key) for key in REASONING) or (isinstance(content, str) and has_thought(content))
    )


def without_thoughts(content: str) -> str:
    """A content without the thoughts in it; as it is if it has none."""
    first, end = _THOUGHT.search(content), _THOUGHT_END.search(content)
    if end and not (first and first.start() < end.start()):
        content = content[end.end() :]
    elif not end:
        return content
    return _THOUGHT.sub("", content).lstrip()


def _content_fields(turn: int, message: Message) -> Iterator[Field]:
    content = message.get("content")
    if not isinstance(content, str):
        return
    path = ("content",)
    if message["role"] != "assistant":
        yield from _whole(turn, "content", "content", path, content, inside_tags=True)
        return
    at, first = 0, _THOUGHT.search(content)
    if (end := _THOUGHT_END.search(content)) and not (first and first.start() < end.start()):
        yield from _piece(turn, "thought", f"the thought ({end[0]}) in content", path, content, 0, end.start())
        at = end.end()
    for found in _THOUGHT.finditer(content, at):
        yield from _piece(turn, "content", "content", path, content, at, found.start("open"))
        tag = found["open"]
        yield from _piece(turn, "thought", f"the thought ({tag}) in content", path, content, *found.span("thought"))
        at = found.end()
    yield from _piece(turn, "content", "content", path, content, at, len(content))


def _reasoning_fields(turn: int, message: Message) -> Iterator[Field]:
    key = next((key for key in REASONING if isinstance(message.get(key), str) and message[key].strip()), None)
    if key is not None:
        yield from _whole(turn, "reasoning", key, (key,), message[key])


def _call_fields(turn: int, index: int, call: Mapping[str, Any]) -> Iterator[Field]:
    path: tuple[str | int, ...] = ("tool_calls", index)
    if isinstance(call.get("function"), dict):
        call, path = call["function"], (*path, "function")
    yield from _whole(turn, "name", "tool_calls", (*path, "name"), call.get("name"))
    yield from _leaves(turn, (*path, "arguments"), call.get("arguments"))


def _leaves(turn: int, path: tuple[str | int, ...], value: Any) -> Iterator[Field]:
    """The strings in the arguments of a call. Numbers cannot be marked; they stand between strings and names that are."""
    if isinstance(value, str):
        yield from _whole(turn, "argument", "the arguments in tool_calls", path, value)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(turn, (*path, key), inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(turn, (*path, index), inner)


def _whole(
    turn: int | None, kind: str, name: str, path: tuple[str | int, ...], text: Any, *, inside_tags: bool = False
) -> Iterator[Field]:
    if isinstance(text, str):
        yield from _piece(turn, kind, name, path, text, 0, len(text), inside_tags=inside_tags)


def _piece(
    turn: int | None,
    kind: str,
    name: str,
    path: tuple[str | int, ...],
    text: str,
    start: int,
    stop: int,
    *,
    inside_tags: bool = False,
) -> Iterator[Field]:
    start, stop = _trimmed(text, start, stop)
    tag = 0
    if inside_tags and (before := _TAG_BEFORE.match(text, start, stop)) and before.end() < stop:
        behind = _TAG_BEHIND.search(text, before.end(), stop)
        inner = _trimmed(text, before.end(), behind.start() if behind else stop)
        if inner[0] < inner[1]:
            tag, (start, stop) = stop - inner[1], inner
    if start < stop:
        yield Field(turn=turn, kind=kind, name=name, path=path, start=start, stop=stop, text=text[start:stop], tag=tag)


def _trimmed(text: str, start: int, stop: int) -> Span:
    piece = text[start:stop]
    stop = start + len(piece.rstrip())
    return min(stop, start + len(piece) - len(piece.lstrip())), stop


@dataclass(frozen=True, slots=True)
class Marks:
    """What stands around fields while they are looked for: numbered, so that a template may move them."""

    left: str
    right: str

    @classmethod
    def absent_from(cls, text: str) -> "Marks | None":
        return next((cls(*pair) for pair in _PAIRS if not re.search(rf"{pair[0]}\d+{pair[1]}", text)), None)

    def around(self, fields: Sequence[Field], conversation: Conversation) -> tuple[list[Message], list[Any] | None]:
        """Messages and tools of a conversation with marks around some of its fields."""
        messages: list[Any] = list(conversation.messages)
        tools: Any = conversation.tools
        for number in reversed(range(len(fields))):  # from behind, so that places in a string stay what they are
            field = fields[number]
            holder = tools if field.turn is None else messages[field.turn]
            marked = _replaced(holder, field.path, lambda text, field=field, number=number: self._marked(text, field, number))
            if field.turn is None:
                tools = marked
            else:
                messages[field.turn] = marked
        return messages, tools

    def _marked(self, text: str, field: Field, number: int) -> str:
        opens, closes = (f"{self.left}{2 * number + side}{self.right}" for side in (0, 1))
        return f"{text[: field.start]}{opens}{text[field.start : field.stop]}{closes}{text[field.stop :]}"

    def taken_out(self, marked: str, fields: Sequence[Field]) -> tuple[str, dict[Field, list[Span]]]:
        """The text without its marks, and where each field lies in it; a field that is not shown has no place."""
        pieces, at, places = [], 0, {}
        for found in re.finditer(f"{self.left}(\\d+){self.right}", marked):
            pieces.append(marked[at : found.start()])
            at = found.end()
            places.setdefault(int(found[1]), []).append(sum(map(len, pieces)))
        pieces.append(marked[at:])
        shown = {
            field: list(zip(places[2 * number], places[2 * number + 1]))
            for number, field in enumerate(fields)
            if len(places.get(2 * number, ())) == len(places.get(2 * number + 1, ())) > 0
        }
        return "".join(pieces), shown


def _replaced(holder: Any, path: Sequence[str | int], change: Any) -> Any:
    """A copy of nested dicts and lists in which the string at a path is changed."""
    if not path:
        return change(holder)
    key: Any = path[0]
    copy: Any = list(holder) if isinstance(holder, list) else dict(holder)
    copy[key] = _replaced(holder[key], path[1:], change)
    return copy
