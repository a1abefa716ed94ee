"""What names, lists and patterns of a config mean of a model's modules: PEFT's rules, without PEFT, and words of ours. Pure."""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

from raytune.errors import ModelError
from raytune.plan.model.shapes import Kind, ModelShape


def matches(pattern: str, name: str, setting: str, *, before: str = "") -> bool:
    """Whether a user's regular expression, behind one of PEFT's, is a whole name.

    Args:
        setting: the key that holds it, for messages.

    Raises:
        ModelError: if it is none.
    """
    try:
        re.compile(pattern)
        return re.fullmatch(f"{before}({pattern})", name) is not None
    except re.error as error:
        raise ModelError(f"{setting}: {pattern!r} is not a regular expression: {error}.") from error


def matches_end(pattern: str, name: str, setting: str) -> bool:
    """PEFT's rule for the keys of `rank_pattern` and `alpha_pattern`: a whole name, or the last parts of one."""
    return matches(pattern, name, setting, before=r"(.*\.)?")


def has_name(name: str, wanted: Sequence[str]) -> bool:
    """PEFT's rule for a module named in a list."""
    return not ends_of(name).isdisjoint(wanted)


@lru_cache(maxsize=20_000)
def ends_of(name: str) -> frozenset[str]:
    """What a list may call a module: its whole name, or the last parts of it."""
    return frozenset([name, *(name[dot + 1 :] for dot, letter in enumerate(name) if letter == ".")])


WORDS: dict[str, Callable[[str, Kind, ModelShape], bool]] = {
    "head": lambda name, kind, shape: name == shape.head.name,
    "embeddings": lambda name, kind, shape: any(name == module.name for module in shape.embeddings),
    "norms": lambda name, kind, shape: kind == "norm",
}
"""Words for groups of modules in patterns of `strategy`: of a module's name and kind."""


def is_meant(pattern: str, name: str, kind: Kind, shape: ModelShape, setting: str) -> bool:
    """Whether a pattern of `strategy` means a module: a word for it, or `matches_end` of its name or of one that holds it.

    Args:
        setting: the key that holds the pattern, for messages.

    Raises:
        ModelError: if the pattern is neither a word nor a regular expression.
    """
    if pattern in WORDS:
        return WORDS[pattern](name, kind, shape)
    return any(matches_end(pattern, path, setting) for path in paths_to(name))


def paths_to(name: str) -> list[str]:
    """The names of all that hold a module, outermost first, and its own."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]


def is_saved(name: str, wanted: list[str]) -> bool:
    """Whether a module, or one that it is a part of, is saved: PEFT asks for the end of a name only, so `norm` is every norm."""
    return any(path.endswith(one) for path in paths_to(name) for one in wanted)


def is_left_to_saving(name: str, wanted: list[str]) -> bool:
    """Whether PEFT adds no update because the module is saved; here whole parts of names must agree."""
    return any(re.match(rf"(^|.*\.){re.escape(one)}($|\..*)", name) for one in wanted)
