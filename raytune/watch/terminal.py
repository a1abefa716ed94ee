"""The screen in a terminal: keys in, lines out; looking at the storage is a thread's, so that keys never wait for it."""

import os
import select
import sys
import termios
import threading
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from rich.live import Live
from rich.text import Text

from raytune.errors import RaytuneError
from raytune.launch.data.live import PlainConsole
from raytune.printable import first_line
from raytune.watch.asking import ask
from raytune.watch.look import Seen, Watcher, looking
from raytune.watch.rows import Row, rows_of, run_at
from raytune.watch.screen import list_screen, run_screen, table
from raytune.watch.view import View, after_key, keys_in, selected_row

TICK_S = 0.2


def plain(rows: list[Row], width: int) -> str:
    """One table, for a file or a pipe."""
    return "\n".join(line.plain.rstrip() for line in table(rows, width)) if rows else "no runs yet"


def show(watcher: Watcher) -> None:
    """Show what goes on until somebody leaves. Standard input and output are a terminal."""
    console = PlainConsole(file=sys.stdout)
    screen, is_over = _Screen(watcher), threading.Event()
    thread = threading.Thread(target=looking, args=(watcher, screen.take, is_over.wait), name="looks", daemon=True)
    thread.start()
    try:
        with _keys() as keys, Live(Text(), console=console, screen=True, auto_refresh=False, redirect_stderr=False) as live:
            shown: list[Text] = []
            while not screen.view.has_left:
                width, height = console.size
                lines = screen.lines(width, height)
                if lines != shown:
                    live.update(Text("\n").join(lines), refresh=True)
                    shown = lines
                for key in keys_in(_typed(keys, TICK_S)):
                    screen.press(key)
    finally:
        is_over.set()


class _Screen:
    """What is shown now. Rows come from the thread that looks, keys from the one that shows."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self.view = View(message="looking …")
        self._seen: Seen = ()
        self._rows: list[Row] = []

    def take(self, seen: Seen) -> None:
        """Take what a look has found."""
        rows = rows_of(seen)
        if not self._seen and self.view.message == "looking …":
            self.view = replace(self.view, message="")
        self._seen, self._rows = seen, rows

    def press(self, key: str) -> None:
        self.view, wanted = after_key(self.view, key, self._rows)  # pyright: ignore[reportArgumentType]
        if wanted:
            try:
                message = ask(self._watcher.storage, wanted.row, wanted.wish)
            except (RaytuneError, OSError) as error:
                message = first_line(error)
            self.view = replace(self.view, message=message)

    def lines(self, width: int, height: int) -> list[Text]:
        row = selected_row(self.view, self._rows)
        run = run_at(self._seen, row.path) if row and self.view.is_open else None
        if row and run:
            return run_screen(row, run, self.view, width, height)
        return list_screen(self._watcher.storage, self._rows, self.view, width, height)


@contextmanager
def _keys() -> Iterator[int]:
    """Standard input as it is typed, key by key and unseen."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        yield descriptor
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _typed(descriptor: int, wait_s: float) -> bytes:
    """What was typed within so many seconds."""
    ready, _, _ = select.select([descriptor], [], [], wait_s)
    if not ready:
        return b""
    data = os.read(descriptor, 1024)
    if data == b"":  # the terminal is gone
        return b"q"
    if data == b"\x1b":  # the rest of a sequence may be on its way
        time.sleep(0.02)
        more, _, _ = select.select([descriptor], [], [], 0)
        data += os.read(descriptor, 1024) if more else b""
    return data
