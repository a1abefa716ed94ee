"""Tokens as text that a person reads: neighbours of one kind together, letter by letter what the tokenizer makes of all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

Decode = Callable[[Sequence[int]], str]
"""The text of tokens, special ones included."""


@dataclass(frozen=True, slots=True)
class TokenKind:
    """What neighbouring tokens have in common."""

    is_target: bool
    weight: float = 1.0
    """In the loss; of a token that is no target, 1."""
    turn: int | None = None
    """Which message it is of, from 0; None: the template's, or there are none."""
    is_special: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighbouring tokens of one kind."""

    text: str
    kind: TokenKind
    num_tokens: int


def pieces_of(ids: Sequence[int], kinds: Sequence[TokenKind], decode: Decode) -> list[Piece]:
    """The pieces of a document. What a token adds to the text can depend on those before it: a first space may go, and letters
    may lie in several tokens; so a piece is what the text up to its end has that the text up to its beginning has not."""
    pieces, before, start = [], "", 0
    for kind, run in groupby(kinds):
        count = sum(1 for _ in run)
        text = decode(ids[: start + count])
        pieces.append(Piece(text[len(before) :], kind, count))
        before, start = text, start + count
    return pieces
