"""Words that a mistyped one may stand for, and never one that means the opposite. Pure."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

_SIDES = [
    ("min minimum least lowest", "max maximum most highest"),
    ("train training trained", "eval evaluation evaluate val valid validation test frozen freeze"),
    ("include included including", "exclude excluded excluding"),
    ("start first begin head", "end last stop tail"),
    ("before", "after"),
    ("input prompt source", "output completion target"),
    ("save write", "load read"),
    ("freeze frozen", "unfreeze unfrozen trainable"),
    ("enable enabled use with", "disable disabled without"),
    ("keep", "drop delete remove"),
    ("up upper high", "down lower low"),
    ("top", "bottom"),
    ("best", "worst"),
    ("more", "less fewer"),
    ("warmup", "cooldown warmdown decay anneal"),
    ("accept allow", "refuse deny reject forbid"),
    ("user", "assistant"),
    ("step", "epoch"),
    ("node", "worker gpu"),
    ("beta1", "beta2"),
    ("forward", "backward"),
    ("cpu", "gpu"),
    ("on", "off"),
]
_OPPOSITES = [(set(one.split()), set(other.split())) for one, other in _SIDES]
_NEGATIONS = {"no", "not", "non", "never", "without", "disable", "disabled", "skip", "ignore", "dont", "anti", "off"}
_NEGATING_STARTS = ("no", "non", "not", "un", "dis", "anti", "de")


def near_words(word: str, candidates: Iterable[str], most: int = 1, *, cutoff: float = 0.6) -> list[str]:
    """Candidates that look like a word, the nearest first, without those of opposite meaning.

    Args:
        most: candidates that are given at most.
        cutoff: least likeness, as `difflib` counts it.
    """
    like = get_close_matches(word, candidates, 4 * most, cutoff=cutoff)
    return [candidate for candidate in like if not are_opposite(word, candidate)][:most]


def are_opposite(one: str, other: str) -> bool:
    """Whether two names differ by words that say the opposite: `no_x` and `x`, `max_x` and `min_x`, `train_x` and `eval_x`."""
    first, second = _parts(one), _parts(other)
    only_first, only_second = first - second, second - first
    if (_num_negations(one) - _num_negations(other)) % 2:
        return True
    if any(_negates(a, b) or _negates(b, a) for a in only_first for b in only_second):
        return True
    return any((only_first & a and only_second & b) or (only_first & b and only_second & a) for a, b in _OPPOSITES)


def _negates(longer: str, word: str) -> bool:
    return any(longer == start + word for start in _NEGATING_STARTS)


def _num_negations(name: str) -> int:
    return sum(word in _NEGATIONS for word in _words(name))


def _parts(name: str) -> set[str]:
    """The words of a name, without an s at their end."""
    return {word.removesuffix("s") if len(word) > 3 else word for word in _words(name)}


def _words(name: str) -> list[str]:
    words = re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())
    return [word for word in words if word]
