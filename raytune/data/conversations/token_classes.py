"""Which of the trained tokens count more, or less, than others in the loss: those that share text with a class of text. Pure."""

import keyword
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from raytune.config.sections.data import TokenWeightsSection

Span = tuple[int, int]
"""Characters of a text, from the first to behind the last."""

_NUMBER = re.compile(r"\d+")
# As CommonMark has it: indented by at most three spaces, to a fence that is at least as long, or to the end.
_FENCED = re.compile(r"^ {0,3}(`{3,}|~{3,})[^\n]*\n(.*?)(?:^ {0,3}\1|\Z)", re.MULTILINE | re.DOTALL)
_OTHER_KEYWORDS = (
    "auto bool case catch char const default delete do double else end enum export extends extern false fi float fn for func "
    "function goto impl implements int interface let long match mod mut namespace new nil null package private protected pub "
    "public return short static struct super switch template then this throw throws trait true try type typedef undefined "
    "union unsigned use using var void where while"
)
_KEYWORDS = sorted({*keyword.kwlist, *_OTHER_KEYWORDS.split()}, key=len, reverse=True)
_SYNTAX = re.compile(r"[][(){}<>=+\-*/%&|^~!?:;,.@#$\\]+|\b(?:" + "|".join(_KEYWORDS) + r")\b")


@dataclass(frozen=True, slots=True)
class TokenClass:
    """A class of text, and how much tokens count that share some of it."""

    name: str
    """`numbers`, `code_syntax`, or a pattern between slashes."""
    weight: float

    def __str__(self) -> str:
        return f"{self.name} x {self.weight:g}"

    def spans(self, text: str) -> Iterator[Span]:
        """Where a piece of text that is trained is of the class."""
        find = _NAMED.get(self.name) or _finds(re.compile(self.name[1:-1]))
        return ((start, end) for start, end in find(text) if start < end)


def token_classes(section: TokenWeightsSection) -> tuple[TokenClass, ...]:
    """The classes of `data.token_weights` that count otherwise than all the rest."""
    named = {"numbers": section.numbers, "code_syntax": section.code_syntax}
    named |= {f"/{pattern}/": weight for pattern, weight in section.patterns.items()}
    return tuple(TokenClass(name, weight) for name, weight in named.items() if weight != 1)


def spans_in(classes: Sequence[TokenClass], text: str, trained: Sequence[Span]) -> list[list[Span]]:
    """For each class, where text that is trained is of it; each trained piece is looked at alone."""
    return [
        [(first + start, first + end) for first, last in trained for start, end in one.spans(text[first:last])] for one in classes
    ]


def weights_of(classes: Sequence[TokenClass], members: np.ndarray, weights: np.ndarray | None) -> np.ndarray | None:
    """The weight of each token, float32, times those of all classes that it is of.

    Args:
        members: which tokens are of each class, a row per class.
        weights: of the tokens without classes; None: 1.

    Returns:
        None if each token weighs 1.
    """
    factors = [np.where(member, np.float32(one.weight), np.float32(1)) for one, member in zip(classes, members) if member.any()]
    if not factors:
        return weights
    return reduce(np.multiply, factors if weights is None else [weights, *factors])


def _finds(pattern: re.Pattern[str]) -> Callable[[str], Iterator[Span]]:
    return lambda text: (found.span() for found in pattern.finditer(text))


def _code_syntax(text: str) -> Iterator[Span]:
    for block in _FENCED.finditer(text):
        yield from (found.span() for found in _SYNTAX.finditer(text, *block.span(2)))


_NAMED: dict[str, Callable[[str], Iterator[Span]]] = {"numbers": _finds(_NUMBER), "code_syntax": _code_syntax}
