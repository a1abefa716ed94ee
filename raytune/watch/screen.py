"""Runs and sweeps on a screen of any size: exactly as many lines as there is room for, none wider. Pure: rows in, lines out."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from raytune.printable import in_a_line, printable
from raytune.units import GIB, format_count, format_dollars, format_seconds
from raytune.watch.blocks import chart, is_logarithmic, spark, stretched
from raytune.watch.look import FollowedRun, asked_of
from raytune.watch.rows import Row, series_of
from raytune.watch.view import View, selected_row

STYLES = {
    "running": "green",
    "starting": "cyan",
    "waiting": "dim",
    "finished": "dim",
    "stopped": "dim",
    "interrupted": "yellow",
    "stale": "yellow",
    "failed": "red",
    "unreadable": "red",
}
GAP, LEAST_NAME, LEAST_NOTE = 2, 14, 16
MOST_SUITES = 4
"""Metrics of suites that are shown of a run."""
LIST_KEYS = "q quit  ↑↓ choose  Enter open  s save now  x stop"
RUN_KEYS = "q quit  Esc back  ↑↓ scroll  s save now  x stop"


@dataclass(frozen=True, slots=True)
class _Column:
    heading: str
    width: int
    text: Callable[[Row], str]
    is_right: bool = True


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if abs(value) < 1000 else f"{value:.3g}"


def _steps(row: Row) -> str:
    return f"{row.step}/{'?' if row.num_steps is None else row.num_steps}"


def _memory(row: Row) -> str:
    if row.memory_bytes is None and row.planned_bytes is None:
        return ""
    measured, planned = ("-" if size is None else f"{size / GIB:.1f}" for size in (row.memory_bytes, row.planned_bytes))
    return f"{measured}/{planned}"


def _left(row: Row) -> str:
    return "" if row.left_s is None else ("≤" if row.left_is_most else "") + format_seconds(row.left_s)


_COLUMNS = {
    "state": _Column("state", 11, lambda row: row.state, is_right=False),
    "step": _Column("step", 11, _steps),
    "loss": _Column("loss", 7, lambda row: _number(row.loss)),
    "valid": _Column("valid.", 7, lambda row: _number(row.validation_loss)),
    "speed": _Column("tok/s", 6, lambda row: "" if row.tokens_per_s is None else format_count(row.tokens_per_s)),
    "memory": _Column("GiB/plan", 9, _memory),
    "left": _Column("left", 7, _left),
    "cost": _Column("cost", 7, lambda row: "" if row.usd is None else format_dollars(row.usd)),
    "curve": _Column("loss curve", 16, lambda row: spark(row.curve, 16) if row.curve else "", is_right=False),
}
"""In the order of the screen."""
_FIRST = ("state", "step", "loss", "left", "valid", "speed", "curve", "memory", "cost")
"""Which of them a narrow screen keeps."""


# --- The table ---------------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row], width: int, *, selected: str | None = None) -> list[Text]:
    """A line of headings and one per row."""
    names = [("  " if row.kind == "trial" else "") + printable(row.name) for row in rows]
    free = width - LEAST_NAME
    kept = set()
    for key in _FIRST:
        if free < _COLUMNS[key].width + GAP:
            break
        kept.add(key)
        free -= _COLUMNS[key].width + GAP
    columns = [column for key, column in _COLUMNS.items() if key in kept]
    has_notes = free >= LEAST_NOTE + GAP and any(row.note for row in rows)
    wanted = max([LEAST_NAME, *(cell_len(name) for name in names)])
    name_width = min(wanted, LEAST_NAME + free - (LEAST_NOTE + GAP if has_notes else 0))
    note_width = free - (name_width - LEAST_NAME) - GAP
    heading = [set_cell_size("run", name_width), *(_cell(column, column.heading) for column in columns)]
    lines = [Text((" " * GAP).join(heading).ljust(width), style="bold")]
    for name, row in zip(names, rows):
        line = Text(_fitted(name, name_width))
        for column in columns:
            style = STYLES[row.state] if column.heading == "state" else ""
            line.append(" " * GAP + _cell(column, column.text(row)), style=style)
        if has_notes:
            line.append(" " * GAP + _fitted(in_a_line(printable(row.note)), note_width), style="dim")
        line.append(" " * (width - line.cell_len))
        if row.path == selected:
            line.stylize("reverse")
        lines.append(line)
    return lines


def _cell(column: _Column, text: str) -> str:
    text = _fitted(text, column.width).rstrip()
    return text.rjust(column.width) if column.is_right else set_cell_size(text, column.width)


def _fitted(text: str, width: int) -> str:
    """A text in exactly so many cells; dots stand for what was cut."""
    if cell_len(text) > width:
        text = set_cell_size(text, width - 1).rstrip() + "…"
    return set_cell_size(text, width)


# --- Screens -----------------------------------------------------------------------------------------------------------------


def list_screen(storage: str, rows: Sequence[Row], view: View, width: int, height: int, problem: str = "") -> list[Text]:
    """Every run and sweep, as far as there is room around the selected one."""
    counts = Counter(row.state for row in rows if row.kind != "trial")
    words = ", ".join(f"{count} {state}" for state, count in counts.items()) or "no runs yet"
    row = selected_row(view, rows)
    heading, *lines = table(rows, width, selected=row.path if row else None)
    room = max(1, height - 3)
    at = next((index for index, one in enumerate(rows) if row and one.path == row.path), 0)
    first = max(0, min(at - room // 2, len(lines) - room))
    shown = lines[first : first + room]
    more = f"  rows {first + 1}-{first + len(shown)} of {len(lines)}" if len(shown) < len(lines) else ""
    title = f"raytune top · {printable(storage)} · {words}{more}{f' · {problem}' if problem else ''}"
    body = [Text(_fitted(title, width), style="bold"), heading, *shown]
    return _screen(body, view.message or LIST_KEYS, width, height)


def run_screen(row: Row, seen: FollowedRun, view: View, width: int, height: int) -> list[Text]:
    """One run: how it stands, its curves, its last events and how it was asked for."""
    title = Text(_fitted(f"{row.path} · {row.state}{f' · {row.note}' if row.note else ''}", width), style="bold")
    body = [title, *_wrapped(chain(_facts(row), _of_suites(seen)), width)]
    room = height - len(body) - 1
    body += _charts(seen, width, min(12, max(0, room // 2)))
    below = [*_events(seen, width), *_asked(seen, width)]
    room = max(0, height - len(body) - 1)
    first = min(view.offset, max(0, len(below) - room))
    return _screen([*body, *below[first : first + room]], view.message or RUN_KEYS, width, height)


def _screen(body: Sequence[Text], foot: str, width: int, height: int) -> list[Text]:
    """Exactly `height` lines, the last of which is the foot."""
    lines = list(body[: height - 1])
    lines += [Text(" " * width)] * (height - 1 - len(lines))
    for line in lines:
        line.no_wrap = True
        line.truncate(width, pad=True)
    return [*lines, Text(_fitted(foot, width), style="reverse", no_wrap=True)]


def _facts(row: Row) -> Iterator[str]:
    yield f"step {_steps(row)}"
    for label, text in (
        ("loss", _number(row.loss)),
        ("validation loss", _number(row.validation_loss)),
        ("tokens/s", _COLUMNS["speed"].text(row)),
        ("GiB of planned", _memory(row)),
        ("left", _left(row)),
        ("at work", format_seconds(row.at_work_s) if row.at_work_s else ""),
        ("cost so far", _COLUMNS["cost"].text(row)),
    ):
        if text:
            yield f"{label} {text}"


def _of_suites(seen: FollowedRun) -> Iterator[str]:
    """What suites came to while training goes on, and at which step."""
    for name in seen.metrics.suites[:MOST_SUITES]:
        if newest := seen.metrics.newest(name):
            step, value = newest
            yield f"{printable(name)} {_number(value)} (step {step})"


def _wrapped(words: Iterator[str], width: int) -> list[Text]:
    lines = [""]
    for word in words:
        if lines[-1] and cell_len(lines[-1]) + 3 + cell_len(word) > width:
            lines.append("")
        lines[-1] += (" · " if lines[-1] else "") + word
    return [Text(_fitted(line, width)) for line in lines]


def _charts(seen: FollowedRun, width: int, height: int) -> list[Text]:
    """Loss of training and, where it was measured, of validation; beside each other where there is room."""
    names = [name for name in ("train/loss", "validation/loss") if seen.metrics.newest(name)]
    if not names or height < 3:
        return []
    if len(names) == 2 and width < 100:
        if height < 6:
            return _chart(seen, names[0], width, height)
        return [*_chart(seen, names[0], width, height // 2), *_chart(seen, names[1], width, height // 2)]
    each = (width - GAP * (len(names) - 1)) // len(names)
    columns = [_chart(seen, name, each, height) for name in names]
    return [Text(" " * GAP).join(line) for line in zip(*columns)]


def _chart(seen: FollowedRun, name: str, width: int, height: int) -> list[Text]:
    label = 8
    series = series_of(seen.metrics.points, name, width - label - 1)
    if not series:  # a resume has just taken back all that there was
        return [Text(" " * width)] * height
    values = [value for _, value in series]
    finite = [value for value in values if abs(value) < float("inf")]
    bounds = {0: _number(max(finite, default=None)), height - 2: _number(min(finite, default=None))}
    heading = f"{name}, steps {series[0][0]} to {series[-1][0]}{', logarithmic' if is_logarithmic(values) else ''}"
    lines = [Text(_fitted(" " * (label + 1) + heading, width), style="dim")]
    for number, line in enumerate(chart(stretched(values, width - label - 1), width - label - 1, height - 1, lowest=1)):
        text = Text(f"{bounds.get(number, ''):>{label}} ", style="dim")
        lines.append(text.append(line, style="cyan"))
    return lines


def _events(seen: FollowedRun, width: int) -> Iterator[Text]:
    """What happened, the newest first."""
    if seen.events.events:
        yield Text("events, the newest first", style="dim")
    for event in reversed(seen.events.events):
        yield Text(_fitted(event_line(event), width))


def event_line(event: dict) -> str:
    """An event of a run in a line."""
    at = time.strftime("%m-%d %H:%M:%S", time.localtime(event["time"]))
    facts = ", ".join(
        f"{name} {value}" for name, value in event.items() if name not in ("event", "attempt", "time") and value is not None
    )
    return in_a_line(printable(f"{at}  {event['event'].replace('_', ' ')} (attempt {event['attempt']})  {facts}"))


def _asked(seen: FollowedRun, width: int) -> Iterator[Text]:
    if seen.record is None:
        return
    if text := asked_of(seen.record):
        yield Text("asked for", style="dim")
        yield from (Text(_fitted(f"  {printable(line)}", width)) for line in text.splitlines())
