"""JSON of users: what Python reads without a word and nobody could train on as it is meant is refused, in a line of a file and in
a text that holds JSON alike."""

import json
from collections import Counter
from typing import Any

_MOST_NESTED = 200
"""Objects and lists within each other. What reads them calls itself, as deep as Python goes and no deeper."""
TOO_DEEP = f"objects and lists lie in each other more than {_MOST_NESTED} deep"


class UnusableJsonError(ValueError):
    """JSON that is well formed but that we refuse."""


def strict_json(text: str) -> Any:
    """The value that a text is.

    Raises:
        ValueError: if it is no JSON (`JSONDecodeError`), or not usable.
    """
    try:
        value = json.loads(text, object_pairs_hook=unique_keys)
    except RecursionError:
        raise UnusableJsonError(TOO_DEEP) from None
    refuse_unusable(value, text)
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a decoder (`object_pairs_hook`).

    Raises:
        UnusableJsonError: if one of two values would be lost.
    """
    values = dict(pairs)
    if len(values) != len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise UnusableJsonError(f"the key '{twice}' appears twice in one object")
    return values


def refuse_unusable(value: Any, written: str) -> None:
    """Refuse what is too deep for who reads it, and text that cannot be encoded, which only an escape (`\\ud800`) brings in.

    Args:
        written: what the value was read from.

    Raises:
        UnusableJsonError: saying what it is.
    """
    if written.count("[") + written.count("{") > _MOST_NESTED and _depth(value) > _MOST_NESTED:
        raise UnusableJsonError(TOO_DEEP)
    if "\\ud" in written or "\\uD" in written:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise UnusableJsonError(f"half of a surrogate pair ({half}), which is no character") from None


def _depth(value: Any) -> int:
    """Of objects and lists within each other."""
    depth, level = 0, [value]
    while level := [one for one in level if isinstance(one, dict | list)]:
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
        depth += 1
    return depth
