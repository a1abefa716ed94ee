"""What a person sees while a large base is read through for its hashes."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from raytune.launch.data.live import PlainConsole
from raytune.units import GIB, format_bytes

WORTH_SAYING_BYTES = GIB
"""Less is read in a second or two."""


@contextmanager
def show_reading(base: str, num_bytes: int, stream: TextIO | None = None) -> Iterator[Callable[[int], None]]:
    """Say what is read and why, and how far that is in a terminal.

    Args:
        base: folder.
        num_bytes: that will be read.
        stream: default: that of errors.

    Yields:
        What to call with each number of bytes that was read, from any thread.
    """
    if num_bytes < WORTH_SAYING_BYTES:
        yield _silent
        return
    console = PlainConsole(file=stream or sys.stderr)
    why = "a run holds the hashes of its base's files, so that another base is noticed; files that stay as they are are read once"
    console.print(f"Reading {format_bytes(num_bytes)} of {base}: {why}.", soft_wrap=True)
    if not console.is_terminal:
        yield _silent
        return
    columns = (TextColumn("reading"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("reading", total=num_bytes)
        yield lambda more: progress.advance(task, more)


def _silent(num_bytes: int) -> None:
    pass
