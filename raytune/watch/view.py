"""What a person looks at, and what a key makes of it. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from raytune.watch.asking import Wish, refusal, warning
from raytune.watch.rows import Row

Key = Literal["up", "down", "page up", "page down", "home", "end", "enter", "escape", "quit", "save", "stop", "yes", "other"]
KEYS: dict[bytes, Key] = {
    b"q": "quit",
    b"Q": "quit",
    b"\x03": "quit",
    b"s": "save",
    b"x": "stop",
    b"y": "yes",
    b"Y": "yes",
    b"k": "up",
    b"j": "down",
    b"\r": "enter",
    b"\n": "enter",
    b"\x1b": "escape",
    b"\x7f": "escape",
    b"\x1b[A": "up",
    b"\x1bOA": "up",
    b"\x1b[B": "down",
    b"\x1bOB": "down",
    b"\x1b[C": "enter",
    b"\x1bOC": "enter",
    b"\x1b[D": "escape",
    b"\x1bOD": "escape",
    b"\x1b[5~": "page up",
    b"\x1b[6~": "page down",
    b"\x1b[H": "home",
    b"\x1b[1~": "home",
    b"\x1b[F": "end",
    b"\x1b[4~": "end",
}
"""By what a terminal sends."""
PAGE = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Where a person is."""

    selected: str | None = None
    """Path of a row."""
    is_open: bool = False
    """Whether the selected run fills the screen."""
    offset: int = 0
    """Of an opened run, first line of what is below its curves."""
    is_asked: bool = False
    """Whether the selected row is about to be stopped, if the next key says so."""
    message: str = ""
    has_left: bool = False


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be asked of a row."""

    row: Row
    wish: Wish


def selected_row(view: View, rows: Sequence[Row]) -> Row | None:
    """The row that keys are about; the first one where none was chosen or it is gone."""
    return next((row for row in rows if row.path == view.selected), rows[0] if rows else None)


def after_key(view: View, key: Key, rows: Sequence[Row]) -> tuple[View, Wanted | None]:
    """The view after a key, and what it asks of a run."""
    row = selected_row(view, rows)
    was_asked, view = view.is_asked, replace(view, is_asked=False, message="")
    if was_asked:
        return (view, Wanted(row, "stop")) if key == "yes" and row else (replace(view, message="Nothing was asked."), None)
    match key:
        case "quit":
            return replace(view, has_left=True), None
        case "escape":
            return replace(view, is_open=False, offset=0), None
        case "enter" if row and row.kind != "sweep":
            return replace(view, selected=row.path, is_open=True, offset=0), None
        case "save" | "stop" if row:
            view = replace(view, selected=row.path)
            if reason := refusal(row, key):
                return replace(view, message=reason), None
            if key == "stop":
                return replace(view, is_asked=True, message=f"{warning(row)} y: yes, any other key: no"), None
            return view, Wanted(row, key)
        case "up" | "down" | "page up" | "page down" | "home" | "end":
            return _moved(view, key, row, rows), None
    return view, None


def _moved(view: View, key: Key, row: Row | None, rows: Sequence[Row]) -> View:
    by = {"up": -1, "down": 1, "page up": -PAGE, "page down": PAGE, "home": -(10**6), "end": 10**6}[key]
    if view.is_open:
        return replace(view, offset=max(0, view.offset + by))
    if row is None:
        return view
    at = next(index for index, one in enumerate(rows) if one is row)
    return replace(view, selected=rows[min(max(0, at + by), len(rows) - 1)].path)


def keys_in(data: bytes) -> list[Key]:
    """The keys that a terminal has sent."""
    found: list[Key] = []
    while data:
        known = max((sent for sent in KEYS if data.startswith(sent)), key=len, default=b"")
        if known == b"\x1b" and len(data) > 1 and data[1:2] in (b"[", b"O"):  # a sequence that means nothing here
            end = next((at for at in range(2, len(data)) if 0x40 <= data[at] <= 0x7E), len(data) - 1)
            found.append("other")
            data = data[end + 1 :]
            continue
        found.append(KEYS.get(known, "other"))
        data = data[len(known) or 1 :]
    return found
