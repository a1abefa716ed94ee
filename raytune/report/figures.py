"""Figures of a sweep, drawn with matplotlib. Values in, figures out; no pyplot, hence no state that two threads could share.

Colours stay apart for colour-blind readers and in grey: a ramp of one hue says how far a trial came, the winner is orange and
thick, failures are crosses. Text is drawn as it is: a value such as "$x$" is no formula.
"""

import io
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import AutoLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from raytune.sweeps.results import State, SweepResult, TrialResult, importance, is_number, rung_text, short_keys, value_text

DOTS_PER_INCH = 160
WIDTH_IN = 9.6
LOG_SPREAD = 8.0
"""A scale is logarithmic where the largest value is at least so many times the smallest."""
MOST_AXES = 12
MOST_LABEL = 18
MOST_CATEGORIES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Theme:
    """Colours of a figure: for a light or a dark page."""

    paper: str
    ink: str
    muted: str
    faint: str
    near: str
    """A trial that ended early."""
    far: str
    """A trial that was trained to the end."""
    best: str
    failed: str


LIGHT = Theme(
    paper="#ffffff",
    ink="#1a1d21",
    muted="#5c636b",
    faint="#dfe2e6",
    near="#86aed6",
    far="#0f4174",
    best="#d55e00",
    failed="#8a2f6b",
)
DARK = Theme(
    paper="#16191d",
    ink="#e8eaed",
    muted="#a0a7af",
    faint="#363c43",
    near="#436488",
    far="#a9d2ff",
    best="#ff9e3d",
    failed="#e58fc6",
)


Drawing = Callable[[SweepResult, Theme], Figure]


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DOTS_PER_INCH, facecolor=figure.get_facecolor())
    return file.getvalue()


# --- Learning curves ---------------------------------------------------------------------------------------------------------


def learning_curves(result: SweepResult, theme: Theme = LIGHT) -> Figure:
    """The metric over steps, a line per trial, coloured by how far it came; rungs are vertical lines."""
    figure, axes = _figure(theme, 4.6)
    best = result.best
    curves = [(trial, [(step, value) for step, value in trial.curve if math.isfinite(value)]) for trial in result.trials]
    values = [value for _, curve in curves for _, value in curve]
    if not values:
        return _empty(figure, axes, theme, f"No trial measured {result.metric}.")
    steps = [step for _, curve in curves for step, _ in curve]
    count = Counter(_fate(result, trial) for trial in result.trials)
    handles: dict[tuple[int, int, str], Line2D] = {}
    for trial, curve in reversed(curves):  # the best are drawn last, over the others
        if not curve:
            continue
        is_best = best is not None and trial.trial.number == best.trial.number
        colour = theme.best if is_best else _fate_colour(result, trial, theme)
        width = 2.6 if is_best else 1.2
        mark = _MARKS.get(trial.state, "." if len(curve) == 1 else "")
        axes.plot(*zip(*curve), color=colour, linewidth=width, zorder=4 if is_best else 2)
        axes.plot(*curve[-1], color=colour, marker=mark, **_MARK_STYLE, zorder=5)
        fate = _fate(result, trial)
        label = f"best: {trial.trial.name}" if is_best else f"{fate}: {count[fate]}"
        place = (-1, 0, label) if is_best else (_FATES.index(trial.state), -trial.num_rungs, label)
        handles[place] = Line2D([], [], color=colour, linewidth=width, marker=mark, label=label, **_MARK_STYLE)
    _step_axis(axes, theme, steps, result.rungs, max(trial.num_steps for trial in result.trials))
    if is_log(values):
        axes.set_yscale("log")
        _log_ticks(axes.yaxis)
    axes.set_xlabel("step")
    axes.set_ylabel(result.metric)
    _legend(axes, theme, [handles[place] for place in sorted(handles)])
    return _finished(figure)


_FATES: tuple[State, ...] = ("finished", "running", "waiting", "stopped", "failed")
_MARKS: dict[State, str] = {"stopped": "o", "failed": "x"}
_MARK_STYLE: dict[str, Any] = {"markersize": 5.5, "markeredgewidth": 1.5}


def _fate(result: SweepResult, trial: TrialResult) -> str:
    if trial.state == "stopped" and trial.rung is not None:
        return f"stopped at {rung_text(result, trial.rung)}"
    return {"stopped": "stopped early", "running": "still running", "waiting": "not started"}.get(trial.state, trial.state)


def _fate_colour(result: SweepResult, trial: TrialResult, theme: Theme) -> str:
    """Along the ramp by rung; what was trained to the end has its far end."""
    if trial.state == "failed":
        return theme.failed
    if trial.state == "finished":
        return theme.far
    place = (trial.num_rungs - 1) / max(1, len(result.rungs)) if trial.state == "stopped" and trial.num_rungs else 0.0
    return _hex(_ramp(theme)(min(1.0, place)))


def _step_axis(axes: Axes, theme: Theme, steps: Sequence[int], rungs: Sequence[int], budget: int) -> None:
    """Logarithmic where the first measurement lies far from the last, as rungs are spaced by a factor; rungs are named on top."""
    positive = [step for step in steps if step > 0]
    if positive and max(budget, *positive) >= 20 * min(positive):
        if 0 in steps:
            axes.set_xscale("symlog", linthresh=min(positive), linscale=0.4)
        else:
            axes.set_xscale("log")
        places = sorted({*((0,) if 0 in steps else ()), *(rungs or _decades(min(positive), budget)), budget})
        axes.set_xticks(_apart(places))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:g}"))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))
    axes.margins(x=0.02)
    for index, rung in enumerate(rungs):
        if rung <= budget:
            axes.axvline(rung, color=theme.muted, linewidth=0.9, linestyle=(0, (2, 3)), zorder=1)
            axes.text(
                rung,
                1.01,
                f"rung {index + 1}",
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="bottom",
                fontsize=8,
                color=theme.muted,
            )


def _apart(places: Sequence[int]) -> list[int]:
    """The places without those that would be written over the next one."""
    kept = [place for place, following in pairwise(places) if place == 0 or following >= 1.25 * place]
    return [*kept, places[-1]]


def _decades(low: float, high: float) -> list[int]:
    return [10**power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]


# --- Parallel coordinates ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Scale:
    """Where values lie on an axis of height 1, and what is written beside it."""

    title: str
    place: Callable[[Any], float]
    ticks: list[tuple[float, str]]
    is_discrete: bool = False
    """Few places, which many trials share."""


_BELOW = 0.09
"""Below a scale of numbers lie, so far apart, what is no number: `null` and not being set."""


def parallel_coordinates(result: SweepResult, theme: Theme = LIGHT) -> Figure:
    """One axis per key and one for the metric, a line per trial, coloured by its rank; the best lie on top of the others."""
    keys = _keys_that_vary(result)
    figure, axes = _figure(theme, 4.8)
    trials = [trial for trial in result.trials if trial.is_ranked]
    failed = [trial for trial in result.trials if trial.state == "failed"]
    if not trials or not keys:
        reason = f"No trial has a value of {result.metric}." if not trials else "No key varies among the trials."
        return _empty(figure, axes, theme, reason)
    scales = [
        _scale(title, [trial.trial.values.get(key, _NOT_SET) for trial in result.trials])
        for key, title in zip(keys, short_keys(keys))
    ]
    metric = _metric_scale(result, [trial.value for trial in trials if trial.value is not None])
    jitter = [_jitter(scale, key, trials) if scale.is_discrete else {} for scale, key in zip(scales, keys)]

    def line(trial: TrialResult) -> list[float]:
        return [
            scale.place(trial.trial.values.get(key, _NOT_SET)) + offsets.get(trial.trial.number, 0.0)
            for key, scale, offsets in zip(keys, scales, jitter)
        ]

    places = list(range(len(keys) + 1))
    for trial in failed:
        axes.plot(places[:-1], line(trial), color=theme.failed, linewidth=1, linestyle=(0, (4, 3)), zorder=1, alpha=0.8)
        axes.plot(places[-2], line(trial)[-1], color=theme.failed, marker="x", markersize=6, markeredgewidth=1.4, zorder=1)
    ramp, thin = _ramp(theme), 1.3 if len(trials) <= 40 else 0.8
    for index, trial in reversed(list(enumerate(trials))):
        colour = theme.best if index == 0 else ramp((1 - index / max(1, len(trials) - 1)) ** 2)
        heights = [*line(trial), metric.place(trial.value)]
        axes.plot(
            places,
            heights,
            color=colour,
            linewidth=2.6 if index == 0 else thin,
            zorder=4 if index == 0 else 2,
            solid_joinstyle="round",
        )
    for place, scale in enumerate([*scales, metric]):
        axes.plot([place, place], [0, 1], color=theme.ink, linewidth=1, zorder=3)
        for height, label in scale.ticks:
            axes.plot([place - 0.012, place + 0.012], [height, height], color=theme.ink, linewidth=1, zorder=3)
            axes.text(
                place + 0.025,
                height,
                _shortened(label),
                fontsize=8,
                va="center",
                color=theme.ink,
                zorder=6,
                bbox={"boxstyle": "round,pad=0.12", "facecolor": theme.paper, "edgecolor": "none", "alpha": 0.8},
            )
        axes.text(place, 1.045, _wrapped(scale.title), fontsize=9, ha="center", va="bottom", color=theme.ink, fontweight="bold")
    axes.set_xlim(-0.15, len(keys) + 0.35)
    axes.set_ylim(min(height for scale in scales for height, _ in scale.ticks) - 0.05, 1.16)
    axes.set_axis_off()
    return _finished(figure)


_NOT_SET = object()


def _keys_that_vary(result: SweepResult) -> list[str]:
    """In the order of the space; where there are more than can be drawn, the most important ones."""
    varying = [key for key in result.keys if len({_name(trial.trial.values.get(key, _NOT_SET)) for trial in result.trials}) > 1]
    if len(varying) <= MOST_AXES:
        return varying
    first = {item.key for item in importance(result.trials, varying, result.mode).keys[:MOST_AXES]}
    return [key for key in varying if key in first]


def _name(value: object) -> str:
    return "not set" if value is _NOT_SET else value_text(value)


def _scale(title: str, values: Sequence[Any]) -> _Scale:
    if any(is_number(value) for value in values) and all(is_number(value) or value in (None, _NOT_SET) for value in values):
        return _number_scale(title, values)
    names = sorted({_name(value) for value in values}, key=lambda name: (name != "not set", name))
    heights = {name: (index + 0.5) / len(names) for index, name in enumerate(names)}
    every = math.ceil(len(names) / MOST_CATEGORIES)
    ticks = [(heights[name], name) for name in names[::every]]
    return _Scale(title, lambda value: heights[_name(value)], ticks, is_discrete=True)


def _number_scale(title: str, values: Sequence[Any]) -> _Scale:
    numbers = sorted({value for value in values if is_number(value)})
    low, high, log = numbers[0], numbers[-1], is_log(numbers)
    place = _number_place(low, high, log)
    others = [value for value in (None, _NOT_SET) if value in values]
    below = {_name(value): -_BELOW * (index + 1) for index, value in enumerate(others)}
    labelled = numbers if len(numbers) <= 6 else _round_numbers(low, high, log)
    ticks = [*_ticks(place, labelled, low, high), *((height, name) for name, height in below.items())]
    return _Scale(title, lambda value: place(value) if is_number(value) else below[_name(value)], ticks, len(numbers) <= 6)


def _metric_scale(result: SweepResult, values: Sequence[float]) -> _Scale:
    """The best value is on top, whichever way better is."""
    low, high = min(values), max(values)
    upward = _number_place(low, high, is_log(values))

    def place(value: float) -> float:
        return 1 - upward(value) if result.mode == "min" else upward(value)

    return _Scale(result.metric, place, _ticks(place, _round_numbers(low, high, is_log(values)), low, high))


def _ticks(place: Callable[[float], float], numbers: Sequence[float], low: float, high: float) -> list[tuple[float, str]]:
    """Both ends of an axis, and of the numbers between them those that have room."""
    ends = [(place(end), value_text(end)) for end in dict.fromkeys((low, high))]
    inner = [(place(number), value_text(number)) for number in numbers if low < number < high]
    return [*ends, *(tick for tick in inner if all(abs(tick[0] - end) > 0.05 for end, _ in ends))]


def _number_place(low: float, high: float, log: bool) -> Callable[[float], float]:
    if low == high:
        return lambda value: 0.5
    if log:
        return lambda value: math.log(value / low) / math.log(high / low)
    return lambda value: (value - low) / (high - low)


def _round_numbers(low: float, high: float, log: bool) -> list[float]:
    """Round numbers from low to high, a handful."""
    if low == high:
        return [low]
    if log:
        for subs in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0)):
            ticks = [float(tick) for tick in LogLocator(subs=subs, numticks=20).tick_values(low, high) if low <= tick <= high]
            if len(ticks) >= 3:
                return ticks[:: math.ceil(len(ticks) / 8)]
        return [low, high]
    return [float(tick) for tick in MaxNLocator(nbins=5).tick_values(low, high) if low <= tick <= high]


def _jitter(scale: _Scale, key: str, trials: Sequence[TrialResult]) -> dict[int, float]:
    """Offsets by trial that fan out those of one place, best on top."""
    by_place: dict[float, list[int]] = {}
    for trial in trials:
        by_place.setdefault(scale.place(trial.trial.values.get(key, _NOT_SET)), []).append(trial.trial.number)
    gaps = [higher - lower for lower, higher in pairwise(sorted(by_place))]
    width = 0.5 * min([0.1, *gaps])
    return {
        number: width * (0.5 - (index + 0.5) / len(numbers))
        for numbers in by_place.values()
        for index, number in enumerate(numbers)
    }


# --- Importance and budget ---------------------------------------------------------------------------------------------------


def importance_bars(result: SweepResult, theme: Theme = LIGHT) -> Figure:
    """Share of the differences between trials that each key explains by itself; a line marks what chance reaches."""
    found = importance(result.trials, result.keys, result.mode)
    shown = [item for item in found.keys if item.share is not None][: 2 * MOST_AXES]
    figure, axes = _figure(theme, 1.3 + 0.34 * max(2, len(shown)))
    if not shown:
        return _empty(figure, axes, theme, "Too few trials, or too little difference between them, to tell.")
    heights = [-index for index in range(len(shown))]
    shares = [item.share or 0.0 for item in shown]
    axes.barh(heights, shares, height=0.62, color=theme.far, zorder=2)
    for height, item in zip(heights, shown):
        if item.chance is not None:
            axes.plot([item.chance] * 2, [height - 0.4, height + 0.4], color=theme.best, linewidth=2, zorder=3)
        axes.text(1.07, height, f"{item.share:.0%}", va="center", ha="right", fontsize=9, color=theme.ink)
    axes.set_yticks(heights, [_shortened(item.key, 40) for item in shown])
    axes.set_xlim(0, 1.08)
    axes.set_ylim(-len(shown) + 0.4, 0.6)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    axes.set_xlabel(f"share of the differences between {found.num_trials} trials at step {found.step}")
    handle = Line2D([], [], color=theme.best, linewidth=2, label="what chance stays below 19 times in 20")
    figure.legend(handles=[handle], loc="outside lower right", frameon=False, fontsize=9, labelcolor=theme.ink, handlelength=1)
    axes.grid(axis="y", visible=False)
    return _finished(figure)


def budget_bars(result: SweepResult, theme: Theme = LIGHT) -> Figure:
    """Worker seconds of the full grid, and what was spent in its place on trials that ended in each way."""
    figure, axes = _figure(theme, 2.5)
    if result.spent_worker_s <= 0 and result.full_worker_s <= 0:
        return _empty(figure, axes, theme, "Nothing was spent.")
    is_long = max(result.spent_worker_s, result.full_worker_s) >= 2 * 3600
    scale, unit, digits = (3600.0, "hours", 2) if is_long else (1.0, "seconds", 0)
    axes.barh(
        1,
        result.full_worker_s / scale,
        height=0.55,
        facecolor="none",
        edgecolor=theme.muted,
        linewidth=1.2,
        hatch="///",
        zorder=2,
    )
    left = 0.0
    for label, seconds, colour in _spending(result, theme):
        text = f"{label}: {seconds / scale:,.{digits}f} {unit}"
        axes.barh(
            0, seconds / scale, left=left, height=0.55, color=colour, edgecolor=theme.paper, linewidth=0.8, label=text, zorder=2
        )
        left += seconds / scale
    if result.is_complete and result.saved_share > 0.02:
        axes.annotate(
            "",
            (result.full_worker_s / scale, 0),
            (left, 0),
            arrowprops={"arrowstyle": "<->", "color": theme.muted, "shrinkA": 2, "shrinkB": 0},
        )
        axes.text(
            (left + result.full_worker_s / scale) / 2,
            0.06,
            f"{result.saved_share:.0%} saved",
            ha="center",
            va="bottom",
            fontsize=9,
            color=theme.ink,
        )
    axes.set_yticks([0, 1], ["spent", "full grid"])
    axes.set_ylim(-0.5, 1.5)
    axes.set_xlabel(f"{'GPU' if result.device == 'cuda' else 'CPU-worker'} {unit}")
    axes.xaxis.set_major_locator(AutoLocator())
    axes.grid(axis="y", visible=False)
    _legend(axes, theme, axes.get_legend_handles_labels()[0])
    return _finished(figure)


def _spending(result: SweepResult, theme: Theme) -> list[tuple[str, float, str]]:
    """(what, worker seconds, colour), in the order in which trials end; the last is what no trial accounts for."""
    parts: dict[str, tuple[float, str]] = {}
    order = {"stopped": 0, "waiting": 1, "running": 2, "finished": 3, "failed": 4}
    for trial in sorted(result.trials, key=lambda trial: (order[trial.state], trial.num_rungs)):
        fate = _fate(result, trial)
        seconds, colour = parts.get(fate, (0.0, _fate_colour(result, trial, theme)))
        parts[fate] = seconds + trial.worker_s, colour
    listed = [(fate, seconds, colour) for fate, (seconds, colour) in parts.items() if seconds > 0]
    rest = result.spent_worker_s - sum(seconds for _, seconds, _ in listed)
    return [*listed, ("between trials", rest, theme.muted)] if rest > 0.01 * result.spent_worker_s else listed


# --- What all figures share --------------------------------------------------------------------------------------------------


def is_log(values: Sequence[float]) -> bool:
    """Whether the values are spread so widely that equal factors, not equal differences, should look alike."""
    return min(values) > 0 and max(values) >= LOG_SPREAD * min(values)


def _figure(theme: Theme, height_in: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained", facecolor=theme.paper)
    axes = figure.add_subplot(facecolor=theme.paper)
    axes.grid(color=theme.faint, linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.ink, labelsize=9, length=3, which="both")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.muted)
    axes.xaxis.label.set_color(theme.ink)
    axes.yaxis.label.set_color(theme.ink)
    return figure, axes


def _legend(axes: Axes, theme: Theme, handles: Sequence[Any]) -> None:
    """Right of the axes, where nothing lies below it."""
    if handles:
        axes.legend(
            handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9, labelcolor=theme.ink
        )


def _empty(figure: Figure, axes: Axes, theme: Theme, reason: str) -> Figure:
    """A figure that says why there is nothing to see."""
    figure.set_figheight(0.6)
    axes.set_axis_off()
    axes.text(0, 0.5, reason, va="center", fontsize=11, color=theme.ink, transform=axes.transAxes)
    return _finished(figure)


def _finished(figure: Figure) -> Figure:
    """Text as it is: no formulas, and a box for what the font cannot draw."""
    known = _drawable()
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_parse_math(False)
        text.set_text("".join(letter if letter == "\n" or ord(letter) in known else "□" for letter in text.get_text()))
    return figure


@cache
def _drawable() -> frozenset[int]:
    """Every character of the font that comes with matplotlib."""
    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


def _log_ticks(axis: Any) -> None:
    axis.set_major_locator(LogLocator(subs=(1.0,), numticks=10))
    low, high = sorted(axis.get_view_interval())
    if math.log10(high / low) < 2:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=10))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _ramp(theme: Theme) -> Colormap:
    return LinearSegmentedColormap.from_list("ramp", [theme.near, theme.far])


def _hex(colour: tuple[float, float, float, float]) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in colour[:3])


def _shortened(text: str, most: int = MOST_LABEL) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def _wrapped(title: str) -> str:
    """A long key in two lines."""
    head, _, last = title.rpartition(".")
    return f"{head}.\n{_shortened(last, 24)}" if head and len(title) > 16 else _shortened(title, 24)
