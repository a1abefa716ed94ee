"""The curves of a run: loss, learning rate, gradient norm and speed over its steps, with what happened on the way."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from raytune.metrics.history import History
from raytune.printable import in_a_line
from raytune.report.figures.canvas import LIGHT, Theme, empty, finished, is_log, legend, log_ticks, new_figure, new_panels
from raytune.units import format_count

Happening = Literal["saved", "restarted", "failed", "rolled back", "not finite", "ended early"]
MOST_SETS = 10
"""Validation sets with a line of their own."""
LINES = [(0, ()), (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1))]
"""By which lines are told apart in grey."""


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened after a step."""

    step: int
    kind: Happening


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """What is drawn of a run."""

    history: History
    num_steps: int
    best_step: int | None
    marks: Sequence[Mark]
    sets: Sequence[str]
    """Names of validation sets that have a loss of their own."""
    shares: Sequence[str] = ()
    """Names of metrics of suites, of those that lie in 0..1."""


_PANELS = (
    ("learning rate", "train/learning_rate", 1.2),
    ("gradient norm", "train/grad_norm", 1.4),
    ("tokens per second", "train/tokens_per_s", 1.2),
)


def run_curves(shown: Curves, theme: Theme = LIGHT) -> Figure:
    """Training and validation loss on top; rate, gradient norm and speed below, over the same steps."""
    history = shown.history
    below = [panel for panel in _PANELS if history.series(panel[1])]
    if not history.points:
        return empty(*new_figure(theme, 1.0), theme, "Nothing was measured yet.")
    figure, (top, *panels) = new_panels(theme, [3.2, *(height for _, _, height in below)])
    handles = [
        *curve_line(top, history.series("train/loss"), theme.near, "training loss", zorder=2),
        *curve_line(top, history.series("validation/loss"), theme.far, "validation loss", marker="o", linewidth=1.8, zorder=4),
    ]
    fit_scale(top, [value for name in ("train/loss", "validation/loss") for _, value in history.series(name)])
    best = dict(history.series("validation/loss")).get(shown.best_step or 0)
    if shown.best_step and best is not None:
        top.plot(shown.best_step, best, color=theme.best, marker="*", markersize=13, zorder=7, linewidth=0, clip_on=False)
        label = f"the model: step {shown.best_step}"
        handles.append(Line2D([], [], color=theme.best, marker="*", markersize=11, linewidth=0, label=label))
    for axes, (label, name, _) in zip(panels, below):
        series = history.series(name)
        curve_line(axes, series, theme.far, label, linewidth=1.2)
        axes.set_ylabel(label, fontsize=9)
        fit_scale(axes, [value for _, value in series] if name == "train/grad_norm" else [])
        if name == "train/tokens_per_s":
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    top.set_ylabel("loss (nats per target)", fontsize=9)
    for axes in (top, *panels):
        _mark(axes, shown.marks, theme)
    handles += _mark_handles(shown.marks, theme)
    last = (top, *panels)[-1]
    _steps(last, shown)
    legend(top, theme, handles)
    figure.align_ylabels()
    return finished(figure)


def set_losses(shown: Curves, theme: Theme = LIGHT) -> Figure:
    """The validation loss of each data set."""
    return _each(shown, {name: f"validation/{name}/loss" for name in shown.sets}, "loss (nats per target)", theme)


def suite_scores(shown: Curves, theme: Theme = LIGHT) -> Figure:
    """What suites came to while training went on."""
    return _each(shown, {name: name for name in shown.shares}, "score (1: all)", theme)


def _each(shown: Curves, names: Mapping[str, str], label: str, theme: Theme) -> Figure:
    """A line for each of some metrics, by what it is called."""
    figure, axes = new_figure(theme, 3.2)
    handles = []
    for index, (words, name) in enumerate(list(names.items())[:MOST_SETS]):
        colour = (theme.far, theme.best, theme.failed, theme.near, theme.muted)[index % 5]
        style = LINES[(index // 5 + index) % len(LINES)]
        series = shown.history.series(name)
        handles += curve_line(axes, series, colour, in_a_line(words, 28), marker="o", linewidth=1.5, linestyle=style)
    fit_scale(axes, [value for name in names.values() for _, value in shown.history.series(name)])
    axes.set_ylabel(label, fontsize=9)
    _steps(axes, shown)
    legend(axes, theme, handles)
    return finished(figure)


def curve_line(axes: Axes, series: Sequence[tuple[int, float]], colour: str, label: str, **style: Any) -> list[Line2D]:
    """A line through what is finite; nothing of a metric that was not measured."""
    finite = [(step, value) for step, value in series if math.isfinite(value)]
    if not finite:
        return []
    dense = len(finite) > 60
    options: dict[str, Any] = {"linewidth": 1.0 if dense else 1.4, "markersize": 3.5} | style
    if len(finite) == 1:
        options |= {"marker": "o"}
    return axes.plot(*zip(*finite), color=colour, label=label, **options)


def fit_scale(axes: Axes, values: Sequence[float]) -> None:
    """Make the vertical axis logarithmic where values are spread widely."""
    finite = [value for value in values if math.isfinite(value)]
    if finite and is_log(finite):
        axes.set_yscale("log")
        log_ticks(axes.yaxis)


def _steps(axes: Axes, shown: Curves) -> None:
    axes.set_xlim(0, max(shown.num_steps, shown.history.last_step, 1))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, steps=[1, 2, 5, 10], integer=True))
    axes.set_xlabel("step")
    axes.margins(x=0.02)


def _mark(axes: Axes, marks: Sequence[Mark], theme: Theme) -> None:
    saved = [mark.step for mark in marks if mark.kind == "saved"]
    axes.plot(saved, [0.0] * len(saved), transform=axes.get_xaxis_transform(), **_style("saved", theme), clip_on=False, zorder=6)
    for mark in marks:
        if mark.kind != "saved":
            style = _style(mark.kind, theme)
            axes.axvline(mark.step, color=style["color"], linestyle=style["linestyle"], linewidth=1.2, zorder=3)


def _mark_handles(marks: Sequence[Mark], theme: Theme) -> list[Line2D]:
    """One for each kind that there is."""
    words: dict[Happening, str] = {"saved": "checkpoint", "restarted": "goes on from here", "failed": "an attempt failed"}
    kinds: list[Happening] = list(dict.fromkeys(mark.kind for mark in marks))
    return [Line2D([], [], label=words.get(kind, kind), **_style(kind, theme)) for kind in kinds]


def _style(kind: Happening, theme: Theme) -> dict[str, Any]:
    if kind == "saved":
        return {"color": theme.muted, "marker": "^", "markersize": 6, "linewidth": 0, "linestyle": "none"}
    colour = theme.failed if kind in ("failed", "not finite") else theme.best if kind == "rolled back" else theme.muted
    dashes = {"restarted": (0, (4, 3)), "rolled back": (0, (4, 2)), "ended early": (0, (6, 2, 1, 2)), "not finite": (0, (1, 1.5))}
    return {"color": colour, "linestyle": dashes.get(kind, (0, ())), "linewidth": 1.2}
