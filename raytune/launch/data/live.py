"""Showing something that changes: one live table in a terminal, new lines elsewhere."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from rich.console import Console
from rich.live import Live
from rich.segment import Segment
from rich.table import Table

from raytune.printable import printable

REFRESH_S = 1.0
LINES_EVERY_S = 10.0


class PlainConsole(Console):
    """A console that takes text for text: neither markup in names and values nor what a terminal would obey acts on it."""

    def __init__(self, file: IO[str] | None = None, **options: Any) -> None:
        super().__init__(file=file, markup=False, highlight=False, emoji=False, **options)

    def _render_buffer(self, buffer: Iterable[Segment]) -> str:  # through which all goes, tables and live ones, too
        return super()._render_buffer(
            segment if segment.control else Segment(printable(segment.text), segment.style) for segment in buffer
        )


@contextmanager
def showing(console: Console, table: Callable[[], Table], new_lines: Callable[[], Iterable[str]]) -> Iterator[None]:
    """Show it until the block ends, and its last state then, from a thread of its own.

    Args:
        table: how it stands, for a terminal.
        new_lines: what is new since the last call, for a log.
    """
    finished = threading.Event()
    thread = threading.Thread(target=_show, args=(console, table, new_lines, finished), name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join(timeout=10)


def _show(
    console: Console, table: Callable[[], Table], new_lines: Callable[[], Iterable[str]], finished: threading.Event
) -> None:
    if console.is_terminal:
        with Live(table(), console=console, refresh_per_second=4, transient=False) as live:
            while not finished.wait(REFRESH_S):
                live.update(table())
            live.update(table())
        return
    is_over = False
    while not is_over:
        is_over = finished.wait(LINES_EVERY_S)
        for line in new_lines():
            console.print(line, soft_wrap=True)
