"""A run as a person sees it while it goes on: one live table in a terminal, plain lines elsewhere. Reads metrics.jsonl only."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table

from raytune.errors import RaytuneError
from raytune.metrics import History
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import RunFolder
from raytune.units import format_bytes, format_count, format_seconds

REFRESH_S = 1.0
LINE_EVERY_S = 10.0


@contextmanager
def show_progress(plan: RunPlan, stream: TextIO = sys.stderr) -> Iterator[None]:
    """Show the run's progress until the block ends."""
    watcher = _Watcher(plan, Console(file=stream))
    thread = threading.Thread(target=watcher.watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        watcher.finished.set()
        thread.join(timeout=10)


class _Watcher:
    """Follows the metrics file of a run in a thread of its own."""

    def __init__(self, plan: RunPlan, console: Console) -> None:
        self.plan = plan
        self.path = RunFolder(plan.storage, plan.name).metrics
        self.console = console
        self.finished = threading.Event()
        self.started = time.monotonic()

    def watch(self) -> None:
        if self.console.is_terminal:
            with Live(self._table(), console=self.console, refresh_per_second=4, transient=False) as live:
                while not self.finished.wait(REFRESH_S):
                    live.update(self._table())
                live.update(self._table())
        else:
            last_line = ""
            while not self.finished.wait(LINE_EVERY_S):
                last_line = self._print_if_new(last_line)
            self._print_if_new(last_line)

    def _print_if_new(self, last_line: str) -> str:
        line = "  ".join(f"{label} {value}" for label, value in self._facts())
        if line != last_line:
            self.console.print(line, highlight=False, soft_wrap=True)
        return line

    def _table(self) -> Table:
        table = Table(title=f"raytune · {self.plan.name}", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        for label, value in self._facts():
            table.add_row(f"[dim]{label}[/dim]", value)
        return table

    def _facts(self) -> list[tuple[str, str]]:
        num_steps = self.plan.optimization.num_steps
        try:
            history = History.read(self.path)
        except (RaytuneError, OSError):
            history = None  # not there yet, or a network hiccup: the next look will tell
        step = history.last_step if history else 0
        if not history or not step:
            return [("step", f"0/{num_steps}"), ("state", f"starting workers, {format_seconds(time.monotonic() - self.started)}")]
        last = history.last_of("train/loss")
        seconds_left = (num_steps - step) * history.seconds_per_step()
        facts = [
            ("step", f"{step}/{num_steps}"),
            ("loss", f"{last:.4f}"),
            ("learning rate", f"{history.last_of('train/learning_rate'):.2e}"),
            ("tokens/s", format_count(history.last_of("train/tokens_per_s"))),
            ("memory per worker", format_bytes(history.last_of("train/memory_bytes"))),
            ("left", format_seconds(seconds_left)),
        ]
        if (validation := history.last_of("validation/loss")) is not None:
            facts.insert(2, ("validation loss", f"{validation:.4f}"))
        return facts
