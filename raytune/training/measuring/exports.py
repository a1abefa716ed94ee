"""Models of a run as it goes on, for whoever measures them: written whole or not at all, the newest kept; and what they came to.

The ranks write an export into a folder of its own, whose name no other one ever has, and EXPORT.json last of all: before that
nobody reads it. Who measures one says so in READING.json, so that it stays; every other one goes when a newer one is there. What
an export came to is a file by its step, which names the export: a run that is resumed from before a step takes export and file
away, and what somebody still writes of it is nobody's.

No torch: the command that looks after measuring reads these files too.
"""

import json
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

from raytune import storage
from raytune.metrics.json_numbers import decode_number, encode_number
from raytune.run_folder import EXPORT, EXPORT_FOLDER, SUITE_RESULT, RunFolder, step_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """A model of the run, after a step."""

    step: int
    name: str
    """Of its folder."""

    @classmethod
    def new(cls, step: int) -> Self:
        """One that nobody has written yet."""
        return cls(step=step, name=f"{step_folder(step)}.{uuid.uuid4().hex[:12]}")

    def path(self, folder: RunFolder) -> str:
        return f"{folder.exports}/{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteResult:
    """What suites came to on an export."""

    export: Export
    values: Mapping[str, float]
    """By the names of metrics, SUITE/METRIC."""
    seconds: float
    """That measuring took."""

    def to_json(self) -> dict[str, Any]:
        values = {name: encode_number(value) for name, value in self.values.items()}
        return {"step": self.export.step, "export": self.export.name, "seconds": self.seconds, "values": values}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        return cls(
            export=Export(step=record["step"], name=record["export"]),
            values={name: decode_number(value) for name, value in record["values"].items()},
            seconds=record["seconds"],
        )


def complete(folder: RunFolder, export: Export) -> None:
    """Make an export count whose files are all there."""
    storage.write_json(f"{export.path(folder)}/{EXPORT}", {"step": export.step})


def is_there(folder: RunFolder, export: Export) -> bool:
    """Whether an export counts, still."""
    return storage.exists(f"{export.path(folder)}/{EXPORT}")


def exports_in(folder: RunFolder) -> list[Export]:
    """Those that count, by step."""
    found = [export for export in _folders(folder) if is_there(folder, export)]
    return sorted(found, key=lambda export: export.step)


def remove(folder: RunFolder, export: Export) -> None:
    """Make an export count no more, then remove its files."""
    storage.remove_folder(f"{export.path(folder)}/{EXPORT}", folder.exports)
    storage.remove_folder(export.path(folder), folder.exports)


def remove_old(folder: RunFolder) -> None:
    """Remove what is neither the newest export nor being measured. What is not whole yet is being written."""
    there = exports_in(folder)
    reading = being_read(folder)
    for export in there[:-1]:
        if export.name != reading:
            remove(folder, export)


def remove_all(folder: RunFolder) -> None:
    for export in _folders(folder):
        remove(folder, export)
    storage.remove_folder(folder.exports, folder.path)


def being_read(folder: RunFolder) -> str | None:
    """Name of the export that somebody measures."""
    with suppress(FileNotFoundError):
        return storage.read_json(folder.reading)["export"]
    return None


def take(folder: RunFolder, export: Export) -> None:
    """Say that an export is being measured; before that it may go any time."""
    storage.write_json(folder.reading, {"export": export.name})


def leave(folder: RunFolder) -> None:
    """Say that none is."""
    storage.remove_folder(folder.reading, folder.exports)


def forget_after(folder: RunFolder, step: int) -> None:
    """Take away exports and results of steps behind one that an attempt goes on from, and what is not whole."""
    for export in _folders(folder):
        if export.step > step or not is_there(folder, export):
            remove(folder, export)
    for found, path in _results(folder):
        if found > step:
            storage.remove_folder(path, folder.while_training)


def write_result(folder: RunFolder, result: SuiteResult) -> bool:
    """Write what an export came to; nothing if it does not count any more. Whether it was written."""
    path = folder.suite_result(result.export.step)
    if not is_there(folder, result.export):
        return False
    storage.write_json(path, result.to_json())
    if is_there(folder, result.export):
        return True
    if (written := read_result(folder, result.export.step)) and written.export == result.export:
        storage.remove_folder(path, folder.while_training)  # the run went back behind it in between
    return False


def read_result(folder: RunFolder, step: int) -> SuiteResult | None:
    """What the export of a step came to; None if it is not known."""
    with suppress(FileNotFoundError):
        return SuiteResult.from_json(json.loads(storage.read_bytes(folder.suite_result(step))))
    return None


def results_in(folder: RunFolder) -> list[SuiteResult]:
    """All that are known, by step."""
    found = (read_result(folder, step) for step, _ in _results(folder))
    return [result for result in found if result]


def _folders(folder: RunFolder) -> list[Export]:
    """Exports, and what is on its way to become one."""
    matches = (EXPORT_FOLDER.match(name) for name in storage.list_folder(folder.exports))
    return [Export(step=int(match.group(1)), name=match.group(0)) for match in matches if match]


def _results(folder: RunFolder) -> list[tuple[int, str]]:
    matches = (SUITE_RESULT.match(name) for name in sorted(storage.list_folder(folder.while_training)))
    return [(int(match.group(1)), f"{folder.while_training}/{match.group(0)}") for match in matches if match]
