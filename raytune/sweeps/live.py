"""A sweep as a person sees it while it runs: every trial with its rung, or a line for each thing that is decided."""

import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.table import Column, Table
from rich.text import Text

from raytune.launch.data.live import PlainConsole, showing
from raytune.sweeps.board import Board
from raytune.sweeps.describe import sweep_text
from raytune.sweeps.ledger import Known
from raytune.sweeps.sweep_plan import SweepPlan
from raytune.sweeps.words import metric_text, value_text
from raytune.units import format_seconds

MOST_ROWS = 24


@contextmanager
def show_sweep(plan: SweepPlan, known: Known, board: Board, stream: TextIO = sys.stderr) -> Iterator[None]:
    """Show what is going to happen, and then the trials until the block ends."""
    console = PlainConsole(file=stream)
    console.print(f"{sweep_text(plan)}\n", soft_wrap=True)
    view = _View(plan, known, board)
    with showing(console, view.table, view.new_lines):
        yield


class _View:
    """Trials as the ledger and the board know them."""

    def __init__(self, plan: SweepPlan, known: Known, board: Board) -> None:
        self._plan, self._known, self._board = plan, known, board
        self._started = time.monotonic()
        self._told = set(known.ends)
        self._last_state = ""

    def table(self) -> Table:
        """Trials that run first, then those that ended last."""
        numbers = [Column(Text(heading), justify="right") for heading in ("rung", "step", self._plan.metric, "best")]
        table = Table("trial", "state", *numbers, title=Text(self._state()), title_justify="left", box=None, padding=(0, 2, 0, 0))
        statuses = list(self._board.statuses.items())
        running = [(name, status) for name, status in statuses if status.activity == "running"]
        others = [(name, status) for name, status in reversed(statuses) if status.activity != "running"]
        for name, status in (running + others)[:MOST_ROWS]:
            end, rung = self._known.ends.get(name), self._known.rung_of(name)
            table.add_row(
                Text(name),
                Text(end.state if end else status.activity),
                "" if rung is None else f"{rung + 1}/{len(self._plan.rungs)}",
                str(status.step),
                metric_text(status.newest),
                metric_text(status.best),
                style=None if status.activity == "running" else "dim",
            )
        return table

    def new_lines(self) -> Iterator[str]:
        """How trials ended, and where the sweep stands."""
        for name in [name for name in list(self._known.ends) if name not in self._told]:
            self._told.add(name)
            end, best = self._known.ends[name], self._board.of(name).best
            values = ", ".join(f"{key}={value_text(value)}" for key, value in self._known.trials[name].values.items())
            yield f"{name} {end.state}{f' {end.cause}' if end.cause else ''}  best {metric_text(best)}  {values}"
        state, elapsed = self._state(), format_seconds(time.monotonic() - self._started)
        if state != self._last_state:
            self._last_state = state
            yield f"{state}  {elapsed}"

    def _state(self) -> str:
        """The sweep in a line."""
        counts = Counter(end.state for end in list(self._known.ends.values()))
        statuses = self._board.statuses
        running = sum(status.activity == "running" for status in statuses.values())
        states = [f"{counts[state]} {state}" for state in ("finished", "stopped", "failed") if counts[state]]
        bests = {
            name: status.best
            for name, status in statuses.items()
            if status.best is not None and not ((end := self._known.ends.get(name)) and end.state == "failed")
        }
        winner = ""
        if bests:
            name = (min if self._plan.mode == "min" else max)(bests, key=lambda name: bests[name])
            winner = f"  best {name} {metric_text(bests[name])}"
        done = ", ".join([f"{running} running", *states])
        return f"{self._plan.name}: {done} of {self._plan.num_trials} trials{winner}"
