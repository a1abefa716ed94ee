"""Rows in other words: which texts of a row a model is asked about, and what is made of its answers. Pure.

Only the chosen turns get other words. Roles, weights, tools and their calls, and thoughts stay as they are.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raytune.config.sections.augment import Part
from raytune.data.conversations.conversation import Conversation
from raytune.data.conversations.fields import has_reasoning, without_thoughts
from raytune.data.formats.origins import MADE_BY, ORIGIN, content_of
from raytune.data.rows.audit import TURNS_IN_TEXT

Turn = int | None
"""Index of a message; None: the text of a plain document."""
Fault = Literal["not asked", "cut", "empty", "control", "unchanged", "repeated"]

FAULTS: Mapping[Fault, str] = {
    "not asked": "the prompt is none for the model",
    "cut": "cut at --max-new-tokens",
    "empty": "empty",
    "control": "with control tokens or marks of turns in the words",
    "unchanged": "as the row is",
    "repeated": "as an earlier version of the row",
}
"""Why a version of a row is dropped."""

_CONTROL = re.compile(r"<\|[^|<>\n]{1,60}\|>")
_MARKS = tuple(dict.fromkeys(mark for pair in TURNS_IN_TEXT for mark in pair))


@dataclass(frozen=True, slots=True, kw_only=True)
class RowToReword:
    """A row with texts that are to be worded otherwise."""

    values: Mapping[str, Any]
    """As it is in its file."""
    conversation: Conversation
    turns: tuple[Turn, ...]
    """Those that get other words, at least one."""

    def text_of(self, turn: Turn) -> str:
        row = self.conversation
        return (row.text or "") if turn is None else row.messages[turn]["content"]


@dataclass(frozen=True, slots=True)
class Written:
    """An answer of the model that was asked for other words."""

    text: str
    has_ended: bool

    @property
    def wording(self) -> str:
        """What it says, without the model's thoughts and white space around it."""
        return without_thoughts(self.text).strip()


def turns_to_reword(row: Conversation, parts: Sequence[Part]) -> tuple[Turn, ...]:
    """The turns of some roles that are nothing but words, or the text of a document."""
    if row.text is not None:
        return (None,) if "text" in parts and row.text.strip() else ()
    return tuple(
        turn
        for turn, message in enumerate(row.messages)
        if message["role"] in parts
        and isinstance(message.get("content"), str)
        and message["content"].strip()
        and not message.get("tool_calls")
        and not has_reasoning(message)
    )


def versions_of(
    row: RowToReword, answers: Sequence[Mapping[Turn, Written]], specials: Sequence[str], made_by: Mapping[str, Any]
) -> Iterator[Mapping[str, Any] | Fault]:
    """What is made of a row: for each version of it a new row in the format `messages` or `text`, or why there is none.

    Args:
        answers: for each version, what the model wrote for each turn; a turn that it was not asked about is missing.
        specials: texts of special tokens.
        made_by: who makes them, for MADE_BY.
    """
    before: set[tuple[str, ...]] = set()
    for number, of_turns in enumerate(answers, 1):
        if (fault := _first_fault(row, of_turns, specials)) is not None:
            yield fault
            continue
        words = {turn: of_turns[turn].wording for turn in row.turns}
        if all(_same(words[turn], row.text_of(turn)) for turn in row.turns):
            yield "unchanged"
        elif (key := tuple(words.values())) in before:
            yield "repeated"
        else:
            before.add(key)
            yield _reworded(row, words, {**made_by, "row": str(row.conversation.origin), "version": number})


def _first_fault(row: RowToReword, of_turns: Mapping[Turn, Written], specials: Sequence[str]) -> Fault | None:
    for turn in row.turns:
        if (fault := _fault(row, turn, of_turns.get(turn), specials)) is not None:
            return fault
    return None


def _fault(row: RowToReword, turn: Turn, written: Written | None, specials: Sequence[str]) -> Fault | None:
    """What is wrong with an answer by itself."""
    if written is None:
        return "not asked"
    if not written.has_ended:
        return "cut"
    words = written.wording
    if not words:
        return "empty"
    asked = row.text_of(turn)
    has_marks = _CONTROL.search(words) or any(mark in words and mark not in asked for mark in _MARKS)
    return "control" if has_marks or any(special in words for special in specials) else None


def _same(one: str, other: str) -> bool:
    """Whether texts are equal, white space aside."""
    return one.split() == other.split()


def _reworded(row: RowToReword, words: Mapping[Turn, str], made_by: Mapping[str, Any]) -> dict[str, Any]:
    conversation = row.conversation
    own = {ORIGIN: content_of(row.values), MADE_BY: dict(made_by)}
    if conversation.text is not None:
        return {"text": words[None], **own}
    messages = [
        {**message, "content": words[turn]} if turn in words else dict(message)
        for turn, message in enumerate(conversation.messages)
    ]
    return {"messages": messages, **({"tools": conversation.tools} if conversation.tools else {}), **own}
