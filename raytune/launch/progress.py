"""A run as a person sees it while it goes on: one live table in a terminal, plain lines elsewhere. Reads metrics.jsonl only."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from rich.console import Console
from rich.table import Column, Table

from raytune.errors import RaytuneError
from raytune.hub.snapshot import Progress
from raytune.launch.live import showing
from raytune.launch.result import RunResult
from raytune.metrics import History
from raytune.plan.data_report import report_table
from raytune.plan.describe import plan_text
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import RunFolder
from raytune.storage import list_folder, read_json
from raytune.units import format_bytes, format_count, format_seconds

DOWNLOAD_IS_DEAD_AFTER_S = 60.0
"""A node that has noted nothing for so long was killed."""
_SHOWN: list[tuple[str, str, Callable[[float], str]]] = [
    ("loss", "train/loss", "{:.4f}".format),
    ("validation loss", "validation/loss", "{:.4f}".format),
    ("learning rate", "train/learning_rate", "{:.2e}".format),
    ("tokens/s", "train/tokens_per_s", format_count),
    ("memory of rank 0", "train/memory_bytes", format_bytes),
]


@contextmanager
def show_progress(plan: RunPlan, stream: TextIO = sys.stderr) -> Iterator[None]:
    """Show the plan, and then the run's progress until the block ends."""
    console = Console(file=stream)
    console.print(f"{plan_text(plan)}\n", highlight=False, soft_wrap=True)
    view = _View(plan)
    with showing(console, view.table, view.new_lines):
        yield


class _View:
    """A run as its metrics file shows it."""

    def __init__(self, plan: RunPlan) -> None:
        self.plan = plan
        self.folder = RunFolder(plan.storage, plan.name)
        self.path = self.folder.metrics
        self.started = time.monotonic()
        self.last_line = ""

    def new_lines(self) -> Iterator[str]:
        line = "  ".join(f"{label} {value}" for label, value in self._facts())
        if line != self.last_line:
            self.last_line = line
            yield line

    def table(self) -> Table:
        table = Table(
            title=f"raytune · {self.plan.name}", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0)
        )
        for label, value in self._facts():
            table.add_row(f"[dim]{label}[/dim]", value)
        return table

    def _downloads(self) -> Iterator[str]:
        """What nodes lack of the base."""
        folder = self.folder.downloads
        with suppress(RaytuneError, OSError, ValueError, TypeError):  # a file that is gone by now, or half a bucket
            for name in list_folder(folder):
                noted = read_json(f"{folder}/{name}")
                if time.time() - noted.pop("time") < DOWNLOAD_IS_DEAD_AFTER_S:
                    yield Progress(**noted).text

    def _facts(self) -> list[tuple[str, str]]:
        num_steps = self.plan.optimization.num_steps
        try:
            history = History.read(self.path)
        except (RaytuneError, OSError):
            history = None  # not there yet, or a network hiccup: the next look will tell
        step = history.last_step if history else 0
        if not history or not step:
            downloads = [("downloading", text) for text in self._downloads()]
            starting = ("state", f"starting workers, {format_seconds(time.monotonic() - self.started)}")
            return [("step", f"0/{num_steps}"), *(downloads or [starting])]
        seconds_left = (num_steps - step) * history.seconds_per_step()
        return [
            ("step", f"{step}/{num_steps}"),
            *((label, form(value)) for label, name, form in _SHOWN if (value := history.last_of(name)) is not None),
            ("left", format_seconds(seconds_left)),
        ]


def show_result(result: RunResult, console: Console | None = None) -> None:
    """Print where the model lies, what it is worth (base against tuned) and how many rows it was trained on."""
    console = console or Console()
    rows = list(_comparisons(result))
    if rows:
        title = f"{result.comparison.num_rows} held-out rows answered" if result.comparison else None
        numbers = [Column(heading, justify="right") for heading in ("base", "tuned", "gain")]
        table = Table("", *numbers, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(_planned_and_measured(result))
    for label, line in report_table(result.data_report) if result.data_report else []:
        console.print(f"{label}: {line}", highlight=False, soft_wrap=True, markup=False)
    console.print(f"model    {result.model_path}\nmetrics  {result.folder}/metrics.jsonl", highlight=False, soft_wrap=True)


def _planned_and_measured(result: RunResult) -> Table:
    """What the plan expected of the rank that holds most, and what it held."""
    table = Table("", Column("planned", justify="right"), Column("measured", justify="right"))
    names = {"peak": "peak of a worker", "step_s": "seconds per step"}
    for name, planned, measured in result.planned_and_measured:
        form = "{:.3g}".format if name == "step_s" else format_bytes
        table.add_row(names.get(name, name), *("-" if value is None else form(value) for value in (planned, measured)))
    return table


def _comparisons(result: RunResult) -> Iterator[tuple[str, str, str, str]]:
    """Name, base, tuned and difference of whatever was measured on both."""
    if result.comparison:
        metric = result.comparison
        yield metric.metric, f"{metric.base:.1%}", f"{metric.tuned:.1%}", f"{metric.gain:+.1%}"
    for label, name, digits in (("validation loss", "validation/loss", 4), ("perplexity", "validation/perplexity", 3)):
        series = result.history.series(name)
        if series and series[0][0] == 0:  # measured before the first step
            base, tuned = series[0][1], result.metrics[name]
            yield label, f"{base:.{digits}f}", f"{tuned:.{digits}f}", f"{tuned - base:+.{digits}f}"
