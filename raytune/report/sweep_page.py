"""The page that a sweep leaves: one HTML file that needs neither network nor server, and the figures beside it as PNG files.

Nothing on the page can run but its own few lines of JavaScript, and nothing can be fetched (see `page`).
"""

import math
import shlex
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from urllib.parse import quote

from raytune.printable import plain_text, shortened
from raytune.report.at_end import leave_page
from raytune.report.figures.bars import budget_bars, importance_bars
from raytune.report.figures.canvas import Drawing, drawn
from raytune.report.figures.coordinates import parallel_coordinates
from raytune.report.figures.curves import learning_curves
from raytune.report.page import PAGE, page, page_figure, write_page
from raytune.run_folder import RunFolder
from raytune.storage import exists
from raytune.sweeps.importance import KeyImportance, importance
from raytune.sweeps.results import SweepResult, TrialResult
from raytune.sweeps.tables import short_keys
from raytune.sweeps.words import is_number, metric_text, state_text, summary, value_text, worker_time
from raytune.units import format_seconds
from raytune.versions import library_versions

MOST_TRIED = 12
MOST_PAGES = 10
"""Of the best trials, and of those that failed; `raytune report` writes others."""
LONG_CAUSE = 160
LONG_VALUE = 24

_FIGURES: tuple[tuple[str, Drawing[SweepResult], str, str], ...] = (
    (
        "learning_curves",
        learning_curves,
        "Learning curves.",
        "Each line is a trial; it ends in a dot where it was stopped and in a cross where it failed. At a dotted line (a rung) a "
        "trial had to be among the best so far to go on. Lines that cross after a rung are a sign that it came too early.",
    ),
    (
        "parallel_coordinates",
        parallel_coordinates,
        "Parallel coordinates.",
        "Each line is a trial, from its values on the left to its metric on the right, where better is higher; the darker (on a "
        "dark page: the brighter) the better its rank. Trials that share a value are fanned out, the best on top. Look where the "
        "strong lines gather: at the end of an axis the range was too narrow; all over an axis the key does not matter. Dashed "
        "lines failed.",
    ),
    (
        "importance",
        importance_bars,
        "Importance of each key.",
        "How much of the differences in rank between trials each key explains by itself, at the last step that most of them "
        "reached. A bar that does not pass its orange mark may be chance. Derived keys share the credit of what they follow.",
    ),
    (
        "budget",
        budget_bars,
        "Where the budget went.",
        "Time of workers, by what became of the trials, against the time that training every trial to the end would take.",
    ),
)


def write_sweep_page(result: SweepResult, config_text: str, folder: str) -> str:
    """Write the page and its figures into a folder, local or on an object store, and pages of its trials that have none.

    Args:
        config_text: the sweep as the user asked for it, YAML.

    Returns:
        The path of the page.
    """
    pages = _pages_of_trials(result)
    light, dark = drawn({name: draw for name, draw, _, _ in _FIGURES}, result)
    return write_page(folder, sweep_page(result, config_text, library_versions(), light, dark, pages), light)


def _pages_of_trials(result: SweepResult) -> set[str]:
    """Folders of trials that have a page, written now where they have none: of the best ones, and of those that failed."""
    ranked = [trial for trial in result.trials if trial.is_ranked]
    shown = [*ranked[:MOST_PAGES], *[trial for trial in result.trials if trial.state == "failed"][:MOST_PAGES]]
    with_page = set()
    for trial in shown:
        run = RunFolder(*trial.folder.rstrip("/").rsplit("/", 1))
        is_told = result.finished_before and exists(run.report)
        if not is_told and exists(run.plan):
            leave_page(run)
        if exists(run.report):
            with_page.add(trial.folder)
    return with_page


def sweep_page(
    result: SweepResult,
    config_text: str,
    versions: Mapping[str, str],
    light: Mapping[str, bytes],
    dark: Mapping[str, bytes],
    pages: Set[str] = frozenset(),
) -> str:
    """The page as HTML.

    Args:
        pages: folders of trials that have a page of their own.
        light, dark: PNG files by figure, for readers whose pages are light or dark.
    """
    best = result.best
    winner, states, cost = summary(result)
    found = importance(result.trials, result.keys, result.mode)
    headings, rows = _table(result, pages)
    return page(
        "sweep_page.html",
        script="sweep_page.js",
        result=result,
        best=best,
        winner=winner,
        states=states,
        cost=cost,
        command=f"raytune train --from-sweep {shlex.quote(result.folder)}",
        facts=_facts(result),
        searched=_searched(result, {item.key: item for item in found.keys}),
        compared_at=found.step,
        num_compared=found.num_trials,
        headings=headings,
        rows=rows,
        figures=[page_figure(title, caption, light[name], dark[name]) for name, _, title, caption in _FIGURES]
        if result.trials
        else [],
        failures=[_failure(trial) for trial in result.trials if trial.state == "failed"],
        config_text=config_text,
        versions=versions,
    )


# --- Facts and keys ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Fact:
    label: str
    value: str
    note: str


def _facts(result: SweepResult) -> list[_Fact]:
    """What is to be seen first."""
    best = result.best
    to_the_end = sum(trial.state == "finished" and not trial.ended_early for trial in result.trials)
    saved = f"{result.saved_share:.0%}" if result.is_complete and result.full_worker_s > 0 else "–"
    return [
        _Fact(
            f"best {result.metric}",
            metric_text(best.value if best else None),
            best.trial.name if best else "no trial has a value",
        ),
        _Fact("trials", str(len(result.trials)), f"{to_the_end} trained to the end"),
        _Fact("spent", format_seconds(result.wall_s), worker_time(result.spent_worker_s, result.device)),
        _Fact("saved", saved, f"of {worker_time(result.full_worker_s, result.device)} for the full grid"),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Searched:
    """A key of the space as a row."""

    key: str
    tried: str
    set_in: str
    winner: str
    share: str
    chance: str


def _searched(result: SweepResult, found: Mapping[str, KeyImportance]) -> list[_Searched]:
    best = result.best
    rows = []
    for key in result.keys:
        values = [trial.trial.values[key] for trial in result.trials if key in trial.trial.values]
        item = found[key]
        rows.append(
            _Searched(
                key=key,
                tried=_tried(values),
                set_in=f"{len(values)} of {len(result.trials)}",
                winner=shortened(value_text(best.trial.values[key]), LONG_VALUE) if best and key in best.trial.values else "–",
                share="–" if item.share is None else f"{item.share:.0%}",
                chance="–" if item.chance is None else f"{item.chance:.0%}",
            )
        )
    return rows


def _tried(values: Sequence[object]) -> str:
    """The values, or from where to where they reach if they are many numbers."""
    numbers = sorted({value for value in values if is_number(value)})
    others = list(dict.fromkeys(shortened(value_text(value), LONG_VALUE) for value in values if not is_number(value)))
    if len(numbers) > MOST_TRIED:
        texts = [f"{value_text(numbers[0])} to {value_text(numbers[-1])} ({len(numbers)} values)", *others]
    else:
        texts = [*map(value_text, numbers), *others]
    more = f" and {len(texts) - MOST_TRIED} more" if len(texts) > MOST_TRIED else ""
    return (", ".join(texts[:MOST_TRIED]) or "–") + more


# --- Ranked table ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Heading:
    text: str
    is_number: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cell:
    text: str
    sort: str = ""
    """What the column is sorted by; empty comes last."""
    is_number: bool = False
    is_long: bool = False
    link: str | None = None


@dataclass(frozen=True, slots=True)
class _Row:
    kind: str
    cells: list[_Cell]


def _table(result: SweepResult, pages: Set[str]) -> tuple[list[_Heading], list[_Row]]:
    numeric = {
        key: all(value is None or is_number(value) for value in (trial.trial.values.get(key) for trial in result.trials))
        for key in result.keys
    }
    facts = [_Heading("#", True), _Heading("trial"), _Heading(result.metric, True), _Heading("steps", True), _Heading("state")]
    keys = [_Heading(title, numeric[key]) for key, title in zip(result.keys, short_keys(result.keys))]
    headings = [*facts, *keys, _Heading("worker time", True), _Heading("cause")]
    best = result.best
    rows = []
    for rank, trial in enumerate(result.trials, start=1):
        kind = "best" if trial is best else "failed" if trial.state == "failed" else "other"
        rows.append(_Row(kind, _cells(result, rank, trial, numeric, pages)))
    return headings, rows


def _cells(result: SweepResult, rank: int, trial: TrialResult, numeric: Mapping[str, bool], pages: Set[str]) -> list[_Cell]:
    place = str(rank) if trial.is_ranked else ""
    cause = plain_text(trial.cause).partition("\n")[0]
    values = trial.trial.values
    return [
        _Cell(text=place, sort=place, is_number=True),
        _Cell(text=trial.trial.name, sort=trial.trial.name, link=_link(result, trial, pages)),
        _Cell(text=metric_text(trial.value), sort="" if trial.value is None else _sort(trial.value), is_number=True),
        _Cell(text=f"{trial.step}/{trial.num_steps}", sort=str(trial.step), is_number=True),
        _Cell(text=state_text(trial), sort=state_text(trial)),
        *(
            _Cell(text=shortened(value_text(values[key]), LONG_VALUE), sort=_sort(values[key]), is_number=numeric[key])
            if key in values
            else _Cell(text="")
            for key in result.keys
        ),
        _Cell(text=format_seconds(trial.worker_s), sort=str(trial.worker_s), is_number=True),
        _Cell(text=shortened(cause, LONG_CAUSE), sort=cause, is_long=True),
    ]


def _sort(value: object) -> str:
    if is_number(value):
        return repr(value) if math.isfinite(value) else ""
    return value_text(value)


def _link(result: SweepResult, trial: TrialResult, pages: Set[str]) -> str | None:
    """The trial's page, or else its folder, as seen from this page, where it lies below the sweep's."""
    root = result.folder.rstrip("/") + "/"
    page = PAGE if trial.folder in pages else ""
    return f"./{quote(trial.folder.removeprefix(root))}/{page}" if trial.folder.startswith(root) else None


# --- Failures ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failure:
    name: str
    step: int
    num_steps: int
    cause: str
    values: str
    folder: str


def _failure(trial: TrialResult) -> _Failure:
    return _Failure(
        name=trial.trial.name,
        step=trial.step,
        num_steps=trial.num_steps,
        cause=plain_text(trial.cause) or "No cause was recorded.",
        values=", ".join(f"{key} {shortened(value_text(value), 80)}" for key, value in trial.trial.values.items()),
        folder=trial.folder,
    )
