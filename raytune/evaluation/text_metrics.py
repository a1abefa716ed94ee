"""Metrics of one answer against the expected one. Pure: strings in, a number in 0..1 out."""

import json
import re
import string
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from typing import Any

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def exact_match(answer: str, expected: str) -> float:
    """1 if both are the same text, leading and trailing white space aside, else 0."""
    return float(answer.strip() == expected.strip())


def token_f1(answer: str, expected: str) -> float:
    """F1 of the words that both have, as SQuAD counts them (Rajpurkar et al. 2018): in lower case, without punctuation and
    articles. Where one has no word, 1 if neither has, else 0."""
    words, wanted = _squad_words(answer), _squad_words(expected)
    if not words or not wanted:
        return float(words == wanted)
    shared = sum((Counter(words) & Counter(wanted)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(words), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)


def numeric_match(answer: str, expected: str) -> float:
    """1 if the last number of both is the same, however it is written (`1,200` is `1200.0`), else 0: GSM8K's rule."""
    wanted = last_number(expected)
    return float(wanted is not None and last_number(answer) == wanted)


def last_number(text: str) -> Decimal | None:
    """The last decimal number of a text; None if it has none."""
    found = _NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "")) if found else None
    except InvalidOperation:  # more digits than a number can have
        return None


def json_valid(answer: str, expected: str) -> float:
    """1 if the answer is JSON and nothing else, whatever is expected, else 0."""
    return float(is_json(answer))


def json_fields(answer: str, expected: str) -> float:
    """Share of the values in the expected JSON that the answer has at the same place, each of the same type; a list's order
    counts. 0 if the answer is no JSON."""
    if not is_json(answer):
        return 0.0
    wanted, found = dict(_values(json.loads(expected))), dict(_values(json.loads(answer)))
    same = sum(path in found and _is_same(found[path], value) for path, value in wanted.items())
    return same / len(wanted)


def is_json(text: str) -> bool:
    """Whether a text is one JSON value, by the standard: `NaN` is none."""
    try:
        json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _values(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Every value that holds no other, with the keys and numbers that lead to it; an empty list or object is one."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not inner or (isinstance(value, list) and not value):
        yield path, value
    for key, one in inner:
        yield from _values(one, (*path, key))


def _is_same(found: Any, wanted: Any) -> bool:
    """JSON has one kind of number, and True is none of them."""
    if isinstance(found, bool) or isinstance(wanted, bool):
        return found is wanted
    return found == wanted and isinstance(found, str) == isinstance(wanted, str)


def _squad_words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()
