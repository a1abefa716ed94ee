"""What is made of a conversation before a template sees it: its system prompt, the exchanges that it keeps, and its reasoning.

An exchange is a question and all that follows it until the next one: calls, results of tools, answers. The system prompt in front
of the first question is the head of the conversation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from raytune.config.sections.data import DataSection
from raytune.data.conversations.conversation import Conversation, Message
from raytune.data.conversations.fields import REASONING, has_reasoning, without_thoughts
from raytune.data.conversations.masking import Targets, is_excepted

_ASKED = ("user", "system")
"""Roles of turns that begin an exchange, where an answer stands before them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a config makes of every conversation."""

    system: str | None = None
    system_when: Literal["missing", "always"] = "missing"
    max_turns: int | None = None
    reasoning: Literal["keep", "last", "each", "none"] = "keep"

    @classmethod
    def of(cls, data: DataSection) -> "Shape":
        return cls(system=data.system, system_when=data.system_when, max_turns=data.max_turns, reasoning=data.reasoning)


AS_IT_IS = Shape()


@dataclass(frozen=True, slots=True)
class Shaped:
    """A row as it is trained."""

    pieces: list[Conversation]
    """Usually one; with `data.reasoning: each` one for each exchange, whose own turns alone are trained."""
    counts: dict[str, int]
    """What was changed, by the names of `SourceReport`."""


def shaped(row: Conversation, shape: Shape, targets: Targets) -> Shaped:
    """The conversation, or those, that are trained in the place of a row. Plain text stays as it is."""
    counts: dict[str, int] = {}
    if shape == AS_IT_IS or not row.messages:
        return Shaped([row], counts)
    messages = list(row.messages)
    if shape.system is not None and (shape.system_when == "always" or messages[0]["role"] != "system"):
        messages = [{"role": "system", "content": shape.system}, *(turn for turn in messages if turn["role"] != "system")]
        counts["systems_given"] = 1
    if shape.max_turns is not None:
        head, exchanges = exchanges_of(messages)
        kept = [*head, *(turn for exchange in exchanges[-shape.max_turns :] for turn in exchange)]
        if left := len(messages) - len(kept):
            counts["turns_left_out"] = left
        messages = kept
    if shape.reasoning in ("last", "none"):
        first_kept = len(messages) if shape.reasoning == "none" else _start_of_last(messages)
        bare = [_bare(turn) if number < first_kept else turn for number, turn in enumerate(messages)]
        if left := sum(now is not was for now, was in zip(bare, messages, strict=True)):
            counts["thoughts_left_out"] = left
        messages = bare
    row = replace(row, messages=tuple(messages))
    if shape.reasoning != "each" or targets == "last" or not any(map(has_reasoning, messages[: _start_of_last(messages)])):
        return Shaped([row], counts)
    counts["by_exchange"] = 1
    return Shaped([replace(row, messages=piece) for piece in _by_exchange(messages)], counts)


def exchanges_of(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The head of a conversation, and its exchanges."""
    first = next((number for number, turn in enumerate(messages) if turn["role"] != "system"), len(messages))
    exchanges: list[list[Message]] = []
    for number, turn in enumerate(messages[first:], first):
        if number == first or (turn["role"] in _ASKED and messages[number - 1]["role"] not in _ASKED):
            exchanges.append([])
        exchanges[-1].append(turn)
    return list(messages[:first]), exchanges


def _start_of_last(messages: Sequence[Message]) -> int:
    """Index of the first turn of the last exchange."""
    _, exchanges = exchanges_of(messages)
    return len(messages) - len(exchanges[-1]) if exchanges else len(messages)


def _by_exchange(messages: Sequence[Message]) -> list[tuple[Message, ...]]:
    """For each exchange the conversation up to its end, whose earlier turns are not trained: each turn is, in one of them."""
    head, exchanges = exchanges_of(messages)
    pieces, before = [], list[Message]()
    for number, exchange in enumerate(exchanges):
        now = exchange if number else [*head, *exchange]
        pieces.append((*before, *now))
        before += [turn if is_excepted(turn) else {**turn, "train": False} for turn in now]
    return pieces


def _bare(message: Message) -> Message:
    """A turn without its reasoning; the same one if it has none."""
    if not has_reasoning(message):
        return message
    bare = {key: value for key, value in message.items() if key not in REASONING}
    content = message.get("content")
    return bare | {"content": without_thoughts(content)} if isinstance(content, str) else bare
