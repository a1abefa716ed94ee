"""Runs side by side: what was asked otherwise, then what each came to. A view over run folders."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

from raytune.config.load import config_diff
from raytune.config.sections.run import RunConfig
from raytune.errors import UserError
from raytune.launch.state.outcome import Change
from raytune.metrics.json_numbers import encode_number
from raytune.report.run_page import value_in_words
from raytune.report.run_seen import RunSeen
from raytune.run_folder import BESIDE_RUNS
from raytune.storage import absolute, exists
from raytune.units import format_bytes, format_count, format_dollars, format_seconds

MOST_WIDE = 40
"""Letters of a cell in a terminal."""
PLACES = ("name", "storage", "version")
"""Keys that say where a run lies, and not what it is."""


@dataclass(frozen=True, slots=True)
class Row:
    """One thing of every run."""

    label: str
    cells: tuple[str, ...]
    """A text for each run; a dash where it is not known."""
    values: tuple[Any, ...]
    """The same as JSON values."""
    best: int | None = None
    """Number of the run that is best in it; None where nothing is better, or several are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunComparison:
    """Runs side by side.

    Attributes:
        names: of the runs; with their storage where two have the same.
        differences: keys of the config that differ, the dotted names in their order.
        outcomes: state, time, dollars, losses, scores, memory and speed.
    """

    names: tuple[str, ...]
    folders: tuple[str, ...]
    differences: tuple[Row, ...]
    outcomes: tuple[Row, ...]
    runs: tuple[RunSeen, ...]

    @classmethod
    def read(cls, paths: Sequence[str]) -> Self:
        """Read the folders of runs, finished or not.

        Args:
            paths: of runs; what lies beside these in their storage is passed over, so that `runs/*` names them all.

        Raises:
            UserError: if there are fewer than two of them, or one is no run.
        """
        runs = tuple(RunSeen.read(path) for path in paths if not _lies_beside_runs(path))
        if len({run.folder.path for run in runs}) < 2:
            raise UserError("Name at least two runs: one beside itself says nothing.")
        names = [run.folder.name for run in runs]
        return cls(
            names=tuple(run.folder.path if names.count(run.folder.name) > 1 else run.folder.name for run in runs),
            folders=tuple(run.folder.path for run in runs),
            differences=tuple(_differences([run.config for run in runs])),
            outcomes=tuple(_outcomes(runs)),
            runs=runs,
        )

    @property
    def text(self) -> str:
        """Aligned columns for a terminal: differences first. The best of a row has a star."""
        blocks = [("Asked otherwise", self.differences), ("Came to", self.outcomes)]
        rows = [
            (row.label, *(f"{cell} *" if row.best == index else cell for index, cell in enumerate(row.cells)))
            for _, block in blocks
            for row in block
        ]
        short = [[_short(cell) for cell in cells] for cells in [("", *self.names), *rows]]
        widths = [max(len(cells[column]) for cells in short) for column in range(len(self.names) + 1)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip() for cells in short]
        at = 1 + len(self.differences)
        asked = lines[1:at] or ["  nothing: the same keys with the same values"]
        return "\n".join([lines[0], f"{blocks[0][0]}:", *asked, f"{blocks[1][0]}:", *lines[at:]])

    def to_json(self) -> dict[str, Any]:
        return {
            "runs": list(self.folders),
            "differences": {row.label: list(row.values) for row in self.differences},
            "outcomes": {row.label: list(row.values) for row in self.outcomes},
        }


def _lies_beside_runs(path: str) -> bool:
    return absolute(path).rpartition("/")[2] in BESIDE_RUNS and not exists(f"{absolute(path)}/run.json")


def _short(cell: str) -> str:
    line = " ".join(cell.split())
    return line if len(line) <= MOST_WIDE else f"{line[: MOST_WIDE - 1]}…"


def _differences(configs: Sequence[RunConfig | None]) -> Iterator[Row]:
    """Keys whose values are not the same in all configs that this raytune reads."""
    first = next((config for config in configs if config), None)
    if first is None:
        return
    diffs = [{key: new for key, _, new in config_diff(first, config)} if config else None for config in configs]
    olds = {key: old for config in configs if config for key, old, _ in config_diff(first, config) if key not in PLACES}
    for key, old in olds.items():
        values = tuple(None if diff is None else diff.get(key, old) for diff in diffs)
        yield Row(key, tuple("–" if value is None else value_in_words(value) for value in values), values)


def _outcomes(runs: Sequence[RunSeen]) -> Iterator[Row]:
    yield _row("state", [run.record.state for run in runs], str)
    yield _row("steps", [run.last_step for run in runs], str)
    yield _row("trained for", [run.spent.training_s for run in runs], format_seconds)
    yield _row("with start and end", [run.spent.total_s for run in runs], format_seconds)
    yield _row("dollars", [run.spent.usd for run in runs], format_dollars, better=min)
    yield from _changes(runs)
    yield _row("training loss at the end", [_newest(run, "train/loss") for run in runs], "{:.4f}".format, better=min)
    yield _row("seconds per step", [run.step_s for run in runs], "{:.3g}".format, better=min)
    yield _row("tokens per second", [_newest(run, "train/tokens_per_s") for run in runs], format_count, better=max)
    yield _row("peak of a worker", [run.evidence.peak_bytes for run in runs], format_bytes, better=min)
    yield _row("looks wrong", [", ".join(symptom.name for symptom in run.symptoms) or None for run in runs], str)


def _changes(runs: Sequence[RunSeen]) -> Iterator[Row]:
    """Losses and scores of the tuned models, in the order in which they come up."""
    known: dict[str, Change] = {change.name: change for run in runs for change in run.changes}
    for name, change in known.items():
        own = [next((one for one in run.changes if one.name == name), None) for run in runs]
        values = [None if one is None else one.tuned for one in own]
        yield _row(change.words, values, partial(_tuned_text, change), better=max if change.kind == "score" else min)


def _tuned_text(change: Change, tuned: float) -> str:
    """Another run's value of what has changed."""
    return replace(change, tuned=tuned).cells[1]


def _newest(run: RunSeen, name: str) -> float | None:
    return run.history.as_of(run.last_step).get(name)


def _row(
    label: str, values: Sequence[Any], form: Callable[[Any], str], better: Callable[[Sequence[Any]], Any] | None = None
) -> Row:
    """A row, with its best cell where one is better than all others.

    Args:
        better: `min` or `max`.
    """
    known = [value for value in values if isinstance(value, int | float) and value == value]
    best = better(known) if better and len(known) > 1 else None
    return Row(
        label,
        tuple("–" if value is None else form(value) for value in values),
        tuple(encode_number(value) if isinstance(value, float) else value for value in values),
        values.index(best) if best is not None and known.count(best) == 1 else None,
    )
