"""What other projects are like: `facts.yaml` beside this file, typed."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from raytune.config.problems import Place
from raytune.config.reading.keys import keys
from raytune.config.words.foreign_names import answer_for_name
from raytune.config.yaml_nodes import read_nodes

FILE = Path(__file__).with_name("facts.yaml")


@dataclass(frozen=True, slots=True)
class Refusal:
    say: str
    unless: tuple[str, ...] = ()
    """Values that do not ask for it."""


@dataclass(frozen=True, slots=True)
class RowFormat:
    """A kind of rows of another project, in raytune's words."""

    format: str
    columns: Mapping[str, tuple[str, str]]
    """Field of our format -> (the key that names its column there, the column where that says nothing)."""
    template: str | None = None
    """What its prompts are written in whatever the file says; None: in the file's, or none is needed."""
    chats: bool = False
    """Whether the rows are written in the file's chat template."""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Project:
    id: str
    title: str
    known_by: frozenset[str]
    known_by_all_of: frozenset[str]
    names: Mapping[str, str]
    row_sharing: tuple[str, ...]
    defaults: Mapping[str, Any]
    carried: tuple[str, ...]
    refused: Mapping[str, Refusal]
    templates: Mapping[str, str]
    formats: Mapping[str, RowFormat]


@cache
def facts() -> Mapping[str, Any]:
    tree, problems = read_nodes(FILE.read_text(encoding="utf-8"), Place(FILE.name, 1, 1))
    assert tree is not None, problems
    return tree.plain


@cache
def projects() -> Mapping[str, Project]:
    """By the name that an option has for it."""
    return {name: _project(name, facts()[name]) for name in ("axolotl", "llamafactory", "trl")}


def _project(name: str, said: Mapping[str, Any]) -> Project:
    return Project(
        id=name,
        title=said["title"],
        known_by=frozenset(said["known_by"].split()),
        known_by_all_of=frozenset(said.get("known_by_all_of", "").split()),
        names=said["names"],
        row_sharing=tuple(said.get("row_sharing", "").split()),
        defaults=said["defaults"],
        carried=tuple(said["carried"].split()),
        refused={key: Refusal(each["say"], tuple(each.get("unless", ()))) for key, each in said["refused"].items()},
        templates=said["templates"],
        formats={
            kind: RowFormat(**{**each, "columns": {field: tuple(named) for field, named in each["columns"].items()}})
            for kind, each in said["formats"].items()
        },
    )


def counterpart(name: str) -> str:
    """Our key for a name of theirs, or nothing."""
    answer = answer_for_name("", name)
    if answer and answer.ours:
        return answer.ours.partition(": ")[0]
    return next(
        (key for key in (f"{section}.{name}" for section in ("training", "adapter", "data", "model")) if key in keys()), ""
    )
