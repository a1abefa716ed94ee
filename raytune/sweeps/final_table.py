"""A finished sweep as a person sees it in a terminal: the ranked table, what failed, and three sentences."""

import re

from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

from raytune.launch.data.live import PlainConsole
from raytune.printable import plain_text
from raytune.sweeps.results import SweepResult
from raytune.sweeps.tables import result_table
from raytune.sweeps.words import summary

MOST_ROWS = 30
WIDE = 200
"""Columns of what is no terminal: a log file scrolls."""
HEADING_WIDTH = 10
_NUM_FACTS = 5
_LEFT = ("trial", "state")


def show_sweep_result(result: SweepResult, console: Console | None = None) -> None:
    """Print the ranked table, why trials failed, and the sweep in three sentences."""
    console = console or PlainConsole()
    width = console.width if console.is_terminal else max(console.width, WIDE)
    if result.finished_before:
        console.print(Text(f"Sweep {result.name} had finished before: nothing was trained."), soft_wrap=True)
    table, num_hidden = _table(result, console, width)
    console.print(table, width=width, crop=False)
    num_more = max(0, len(result.trials) - MOST_ROWS)
    hidden = [
        f"{count} more {word}{'' if count == 1 else 's'}" for count, word in ((num_more, "trial"), (num_hidden, "key")) if count
    ]
    if hidden:
        console.print(Text(f"{' and '.join(hidden)} in {result.folder}/trials.csv"), soft_wrap=True)
    for trial in result.trials:
        if trial.state == "failed":
            cause = plain_text(trial.cause).partition("\n")[0] or "no cause was recorded"
            console.print(Text(f"{trial.trial.name} failed: {cause}"), soft_wrap=True)
    for sentence in summary(result):
        console.print(Text(sentence), soft_wrap=True)


def _table(result: SweepResult, console: Console, width: int) -> tuple[Table, int]:
    """The table with as many keys as are as wide as the terminal, and how many are left out."""
    headings, rows = result_table(result)
    best = result.best
    for num_columns in range(len(headings), _NUM_FACTS - 1, -1):
        table = Table(
            *(
                Column(Text(_folded(heading)), justify="left" if heading in _LEFT else "right", no_wrap=True)
                for heading in headings[:num_columns]
            ),
            title=Text(f"{result.name}: {len(result.trials)} trials, best first"),
            title_justify="left",
            box=None,
            padding=(0, 2, 0, 0),
        )
        for row, trial in list(zip(rows, result.trials))[:MOST_ROWS]:
            style = "bold" if trial is best else "dim" if trial.state == "failed" else None
            table.add_row(*(Text(cell) for cell in row[:num_columns]), style=style)  # Text: "[red]" is a value, not markup
        if Measurement.get(console, console.options.update(width=10_000), table).maximum <= width:
            break
    return table, len(headings) - num_columns


def _folded(heading: str) -> str:
    """A long name in several lines, broken after its separators."""
    lines = [""]
    for part in re.split(r"(?<=[_./])", heading):
        if lines[-1] and len(lines[-1]) + len(part) > HEADING_WIDTH:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
