"""Data sets of other projects as sources of `data.train` and `data.validation`, and the template of their rows."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raytune.importing.draft import Draft
from raytune.importing.facts import RowFormat


@dataclass(slots=True)
class Source:
    """A source in the making."""

    values: dict[str, Any] = field(default_factory=dict)
    said_by: list[tuple[str, str]] = field(default_factory=list)
    """(key of the file, what of the source it says)."""
    notes: dict[str, str] = field(default_factory=dict)
    """By key of the file."""

    def set(self, name: str, value: Any, *keys: str) -> None:
        self.values[name] = value
        self.said_by += [(key, name) for key in keys]


def write_sources(draft: Draft, ours: str, sources: list[Source]) -> None:
    for position, source in enumerate(sources):
        for key, name in dict.fromkeys(source.said_by):
            if key not in draft.accounts or draft.accounts[key].fate == "converted":
                draft.write(f"{ours}.{position}.{name}", source.values[name], key)
        for key, note in source.notes.items():
            draft.add_note(key, note)
    draft.values = {key: value for key, value in draft.values.items() if not key.startswith(f"{ours}.")}
    draft.values[ours] = [source.values for source in sources]


def columns_of(kind: RowFormat, named: Mapping[str, str]) -> dict[str, str]:
    """Fields of our format that lie in columns of other names.

    Args:
        named: what the file calls columns, by its keys for them.
    """
    found = {ours: named.get(key, usual) for ours, (key, usual) in kind.columns.items()}
    return {ours: column for ours, column in found.items() if column and column != ours}


def local_path(path: str, folders: list[str]) -> str:
    """A path that is there below one of some folders, or the path as it is."""
    return next((found for folder in folders if os.path.exists(found := os.path.normpath(os.path.join(folder, path)))), path)


def template(draft: Draft, wanted: Mapping[str, str]) -> None:
    """Write the template of a run.

    Args:
        wanted: our name of a template, by the key that asks for it. All sources of a run have one.
    """
    if not wanted:
        return
    first, name = next(iter(wanted.items()))
    draft.write("data.template", name, first)
    for key, other in wanted.items():
        if other == name:
            draft.write("data.template", name, key)
            continue
        draft.accounts.pop(key, None)
        draft.leave(key, f"its template would be {other}, and all sources of a run have one: {name}, as {first} says")
