"""What raytune has in place of other trainers' names. The facts are data: `foreign_names.yaml` beside this file."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from raytune.config.problems import Place
from raytune.config.yaml_nodes import read_nodes

FILE = Path(__file__).with_name("foreign_names.yaml")

_OFF = ("false", "no", "off", "none", "null", "0")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a foreign name, or a foreign value, is here."""

    ours: str = ""
    """A key or `key: value` for a name, a value for a value; nothing: there is none."""
    note: str = ""
    """How to convert what was written; where there is nothing of ours, why not, or what to do instead."""
    changes_nothing: bool = False
    """Whether, with it or without, the same is trained."""


@dataclass(frozen=True, slots=True)
class Table:
    names: Mapping[str, Answer]
    """By name; `a_*` stands for all names that begin so."""
    by_value: Mapping[str, Mapping[str, Answer]]
    """By name and value; the value `""` is any other."""
    values: Mapping[str, Mapping[str, Answer]]
    """By key of ours and value."""


@cache
def table() -> Table:
    """The facts. Read where a hint is needed first, which costs 20 ms."""
    tree, problems = read_nodes(FILE.read_text(encoding="utf-8"), Place(FILE.name, 1, 1))
    assert tree is not None, problems
    facts = tree.plain
    converted = dict(_said(facts["conversions"]))
    names = {
        name: Answer(ours, converted.get(name, "")) for ours, written in facts["counterparts"].items() for name in written.split()
    }
    idle = {name for row in facts["no_counterpart"] if row.get("changes") == "nothing" for name in row["of"].split()}
    for name, why in _said(facts["no_counterpart"]):
        names[name] = Answer(note=f"raytune has no such setting: {why}", changes_nothing=name in idle)
    return Table(names, {name: _by_value(meant) for name, meant in facts["by_value"].items()}, _values(facts))


def answer_for_name(section: str, name: str, value: object = None) -> Answer | None:
    """What a key of another trainer is here; None: no name that is known.

    Args:
        section: dotted path of the section that holds the key; some names mean another thing in `sweep`.
        name: as written.
        value: what was written under it; None: not to be looked at.
    """
    plain, word = name.lower().replace("-", "_"), _word(value)
    meant = table().by_value.get(plain, {})
    if value is not None and (found := meant.get(word) or meant.get("")):
        return found
    answer = table().names.get(f"{section.partition('.')[0]}.{plain}") or table().names.get(plain) or _of_family(plain)
    if answer is None or value is None or not answer.ours:
        return answer
    key, _, fixed = answer.ours.partition(": ")
    if fixed:
        said = f'Leave it out: "{answer.ours}" is what asks for it, and {word} asks for nothing'
        return Answer(note=said) if word in _OFF else answer
    translated = answer_for_value(key, value)
    if translated is None:
        return answer
    more = translated.note if translated.ours else f"{word} is no value: {translated.note}."
    ours = f"{key}: {translated.ours}" if translated.ours else key
    return Answer(ours, " ".join(filter(None, (answer.note, more))))


def answer_for_value(key: str, value: object) -> Answer | None:
    """What a value of another trainer's is as a value of one of our keys; None: no value that is known."""
    return table().values.get(key, {}).get(_word(value))


def _of_family(name: str) -> Answer | None:
    """The answer for all names that begin alike; the longest such beginning counts."""
    beginnings = (f"{name[:length]}*" for length in range(len(name), 0, -1))
    return next((table().names[beginning] for beginning in beginnings if beginning in table().names), None)


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, str | int | float) else ""


def _by_value(meant: Mapping[str, str]) -> dict[str, Answer]:
    return {value: Answer(note=text[1:].rstrip(".")) if text.startswith("!") else Answer(text) for value, text in meant.items()}


def _values(facts: Mapping[str, Any]) -> dict[str, dict[str, Answer]]:
    converted = dict(_said(facts["value_conversions"]))
    found: dict[str, dict[str, Answer]] = {}
    for key, ours in facts["values"].items():
        found[key] = {word: Answer(value, converted.get(word, "")) for value, words in ours.items() for word in words.split()}
    for key, refused in facts["refused_values"].items():
        found.setdefault(key, {}).update({word: Answer(note=why) for word, why in _said(refused)})
    return found


def _said(rows: list[dict[str, str]]) -> Iterator[tuple[str, str]]:
    """(name, sentence) of rows that say one thing of many names."""
    return ((name, row["say"]) for row in rows for name in row["of"].split())
