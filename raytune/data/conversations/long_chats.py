"""Chats that are longer than a packed row, made shorter at their turns. Each piece is a conversation that its template writes
whole, with the system prompt in front, so that it has the tokens that a model would be asked with."""

from collections.abc import Callable
from dataclasses import replace

from raytune.data.conversations.conversation import Conversation, Message
from raytune.data.conversations.shaping import exchanges_of

Length = Callable[[Conversation], int]
"""Tokens of a conversation as its template writes it."""

_MOST_CUTS = 16
"""Attempts to cut a question. Each takes off what the last one was too long by, so that few are needed."""


AT_TURNS = ("split_turns", "truncate_left")
"""Policies for long documents that make other conversations of them."""


def made_to_fit(
    row: Conversation,
    limit: int,
    too_long: str,
    length: Length,
    starts: Callable[[str], list[int]],
    *,
    is_last_trained_alone: bool,
) -> list[Conversation]:
    """The conversations that a policy of `AT_TURNS` makes of one that is too long; that one itself where it can do nothing.

    Args:
        starts: where the tokens of a text begin, in characters.
        is_last_trained_alone: whether nothing but its last answer is a target.
    """
    if too_long == "truncate_left":
        return [without_beginning(row, limit, length, starts) or row]
    pieces = split_at_turns(row, limit, length)
    if len(pieces) == 1:
        return [row]
    # That an answer is the last one is true of the conversation, not of each of its pieces.
    return pieces[-1:] if is_last_trained_alone else pieces


def split_at_turns(row: Conversation, limit: int, length: Length) -> list[Conversation]:
    """Pieces of whole exchanges, in order, each with as many as fit; one that does not fit alone is a piece too."""
    head, exchanges = exchanges_of(row.messages)
    pieces, start = [], 0
    while start < len(exchanges):
        stop = _largest(
            start + 1, len(exchanges), lambda stop, start=start: _joined(row, head, exchanges[start:stop]), limit, length
        )
        pieces.append(_joined(row, head, exchanges[start:stop]))
        start = stop
    return pieces or [row]


def without_beginning(row: Conversation, limit: int, length: Length, starts: Callable[[str], list[int]]) -> Conversation | None:
    """The conversation without as few of its earliest exchanges as it takes; of the last one alone, without the beginning of its
    question. None if that does not fit either: an answer is never cut.

    Args:
        starts: where the tokens of a text begin, in characters.
    """
    head, exchanges = exchanges_of(row.messages)
    kept = _largest(1, len(exchanges), lambda kept: _joined(row, head, exchanges[-kept:]), limit, length)
    last = _joined(row, head, exchanges[-kept:])
    if (excess := length(last) - limit) <= 0:
        return last
    asked = next((number for number, turn in reversed([*enumerate(last.messages)]) if turn["role"] == "user"), None)
    question = None if asked is None else last.messages[asked].get("content")
    if asked is None or not isinstance(question, str):
        return None
    places, cut = [*starts(question), len(question)], 0
    for _ in range(_MOST_CUTS):
        cut += excess
        if cut >= len(places) - 1:
            return None
        turns: list[Message] = list(last.messages)
        turns[asked] = turns[asked] | {"content": question[places[cut] :]}
        shorter = replace(last, messages=tuple(turns))
        if (excess := length(shorter) - limit) <= 0:
            return shorter
    return None


def _joined(row: Conversation, head: list[Message], exchanges: list[list[Message]]) -> Conversation:
    return replace(row, messages=(*head, *(turn for exchange in exchanges for turn in exchange)))


def _largest(least: int, most: int, piece: Callable[[int], Conversation], limit: int, length: Length) -> int:
    """The largest number in a range whose piece fits; the least one, whether it does or not."""
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if length(piece(middle)) <= limit else (least, middle - 1)
    return least
