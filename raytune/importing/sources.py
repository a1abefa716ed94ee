"""Data sets of other projects as sources of `data.train` and `data.validation`, and the template of their rows."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raytune.config.sections.data import FILE_ENDINGS
from raytune.importing.draft import Draft
from raytune.importing.facts import RowFormat

_KINDS = ("json", "csv", "text", "parquet", "arrow")
"""What stands in place of a path where `data_files` has the paths."""


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
    named = [source for source in sources if source.values.get("path")]
    for source in sources:
        if source not in named:
            draft.open_questions.append(f"where the rows of one of the sources of {ours} are: the file has no path for it")
            for key, _ in source.said_by:
                draft.leave(key, "it is of a source without a path")
    if not named:
        return
    for position, source in enumerate(named):
        for key, name in dict.fromkeys(source.said_by):
            if key not in draft.accounts or draft.accounts[key].fate == "converted":
                draft.write(f"{ours}.{position}.{name}", source.values[name], key)
        for key, note in source.notes.items():
            draft.add_note(key, note)
    draft.values = {key: value for key, value in draft.values.items() if not key.startswith(f"{ours}.")}
    draft.values[ours] = [source.values for source in named]


def columns_of(kind: RowFormat, named: Mapping[str, str]) -> dict[str, str]:
    """Fields of our format that lie in columns of other names.

    Args:
        named: what the file calls columns, by its keys for them.
    """
    found = {ours: named.get(key, usual) for ours, (key, usual) in kind.columns.items()}
    return {ours: column for ours, column in found.items() if column and column != ours}


def located(draft: Draft, holder: str, source: Source) -> None:
    """Where rows lie: at `path`, or in `data_files`, which are read as a kind of file (`json`) or lie in the folder `path`."""
    key, files = f"{holder}.path", f"{holder}.data_files"
    path, is_kind = draft.text(key), draft.text(key) in ("", *_KINDS)
    named = [] if not draft.says(files) or isinstance(draft.raw(files), dict) else draft.texts(files)
    if len(named) == 1 and (is_kind or os.path.isdir(path)):
        source.set("path", named[0] if is_kind else os.path.join(path, named[0]), files, key)
        return
    source.set("path", path, key)
    hub = f"name each file of a hub data set outright: hf://datasets/{path}@COMMIT/FILE"
    draft.leave(files, "name each file as a source of its own" if is_kind or os.path.isdir(path) else hub)


def subset(draft: Draft, key: str, source: Source) -> None:
    """A subset (configuration) of a hub data set, which raytune writes behind its id."""
    if draft.asks_for(key) and not _is_file(source):
        source.set("path", f"{source.values['path']}:{draft.text(key)}", key)
    else:
        draft.leave(key, "files have no subsets")


def split(draft: Draft, key: str, source: Source) -> None:
    """A split, or a slice of one (`train[:10%]`), which a hub data set understands and a file does not."""
    name, bracket, part = draft.text(key).partition("[")
    if not bracket and name in ("", "train"):
        draft.same(key, "the split that is read anyway")
    elif not _is_file(source):
        source.set("split", draft.text(key), key)
    elif part[:1] == ":" and part[1:-1].isdigit():
        source.set("max_rows", int(part[1:-1]), key)
    else:
        draft.leave(key, "a file has no splits: all of it is read; max_rows reads its first rows")


def _is_file(source: Source) -> bool:
    return source.values["path"].endswith(FILE_ENDINGS)


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


def held_out(draft: Draft, key: str, *, named_by: str | None) -> bool:
    """Write which share of the rows is held out for validation. Returns whether there is any validation.

    Args:
        key: of the share there.
        named_by: key that names rows of its own, in place of a share.
    """
    if named_by is not None:
        draft.idle(key, f"{named_by} names the rows")
        return True
    share = draft.number(key) or 0
    if 0 < share < 1:
        draft.write("data.validation_fraction", share, key)
        return True
    if share:
        draft.leave(key, "a number of rows there, a share of them here: data.validation_fraction")
    else:
        draft.same(key, "no rows are held out")
    return False
