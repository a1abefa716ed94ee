"""What a person sees while rows are tokenised: a bar in a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.progress import BarColumn, Progress, TextColumn

from raytune.data.store.drafts import BuildProgress, Report
from raytune.launch.data.live import LINES_EVERY_S, PlainConsole
from raytune.units import format_bytes, format_count, format_seconds

QUIET_S = 4.0
"""What takes less is not worth a word."""


@contextmanager
def show_tokenising(stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> Iterator[Report]:
    """Show how far a store is, once it has taken a few seconds.

    Args:
        stream: default: that of errors.

    Yields:
        What to call with its progress, from any thread.
    """
    console = PlainConsole(file=stream or sys.stderr)
    if not console.is_terminal:
        view = _View(console, clock)
        yield view.take
    else:
        with Progress(BarColumn(), TextColumn("{task.description}"), console=console, transient=True) as bar:
            view = _View(console, clock, bar)
            yield view.take
    view.sum_up()


def progress_text(progress: BuildProgress, per_s: float | None) -> str:
    """How far a store is: `tokenising: 1.2M of about 4M rows, 31.2k rows/s, 1m30s left`.

    Args:
        per_s: of what is done.
    """
    text = _IN_WORDS[progress.stage](progress, per_s)
    if per_s and progress.total is not None and progress.stage != "packing":
        text += f", {format_seconds(max(0, progress.total - progress.done) / per_s)} left"
    return text if progress.is_own else f"waiting for {progress.builder}, which builds the same store; {text}"


def _reading(progress: BuildProgress, per_s: float | None) -> str:
    return f"reading rows through: {format_bytes(progress.done)} of {format_bytes(progress.total or 0)}"


def _tokenising(progress: BuildProgress, per_s: float | None) -> str:
    total = f" of about {format_count(progress.total)}" if progress.total is not None else ""
    pace = f", {format_count(per_s)} rows/s" if per_s else ""
    return f"tokenising: {format_count(progress.done)}{total} rows{pace}"


def _packing(progress: BuildProgress, per_s: float | None) -> str:
    return f"packing {format_count(progress.done)} tokenised rows"


_IN_WORDS = {"reading": _reading, "tokenising": _tokenising, "packing": _packing}


class _View:
    """What was shown of a store.

    Args:
        bar: of a terminal.
    """

    def __init__(self, console: PlainConsole, clock: Callable[[], float], bar: Progress | None = None) -> None:
        self._console, self._clock, self._bar = console, clock, bar
        self._task = None if bar is None else bar.add_task("", total=None, visible=False)
        self._began_s = clock()
        self._told_s: float | None = None
        self._last: BuildProgress | None = None
        self._first = (self._began_s, 0)
        """When the stage was last seen with nothing made, or first seen; and what was made of it then."""

    def take(self, progress: BuildProgress) -> None:
        """Show it."""
        now_s, last, self._last = self._clock(), self._last, progress
        made = progress.done - progress.found
        if last is None or made == 0 or (last.builder, last.stage) != (progress.builder, progress.stage):
            self._first = now_s, made
        if progress.is_own and progress.shards_found and not (last is not None and last.is_own and last.shards_found):
            found = f"{progress.shards_found} of {progress.num_shards} shards of these rows were tokenised before"
            self._console.print(f"{found}: going on from there.", soft_wrap=True)
        if now_s - self._began_s < QUIET_S:
            return
        since_s, before = self._first
        text = progress_text(progress, (made - before) / (now_s - since_s) if now_s > since_s else None)
        if self._bar is not None and self._task is not None:
            total = None if progress.stage == "packing" else progress.total
            self._bar.update(self._task, description=text, completed=progress.done, total=total, visible=True)
        elif self._told_s is None or now_s - self._told_s >= LINES_EVERY_S:
            self._console.print(text, soft_wrap=True)
        else:
            return
        self._told_s = now_s

    def sum_up(self) -> None:
        """Say what it came to, if anything was said of it."""
        if self._told_s is not None and self._last is not None and self._last.is_own and self._last.stage != "reading":
            took = format_seconds(self._clock() - self._began_s)
            self._console.print(f"tokenised {format_count(self._last.done)} rows in {took}", soft_wrap=True)
