"""Parallel coordinates: an axis per key, a line per trial."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from raytune.printable import in_a_line
from raytune.report.figures.canvas import (
    LIGHT,
    MOST_AXES,
    MOST_CATEGORIES,
    MOST_LABEL,
    Theme,
    empty,
    finished,
    is_log,
    new_figure,
    ramp,
    wrapped,
)
from raytune.sweeps.importance import importance
from raytune.sweeps.results import SweepResult, TrialResult
from raytune.sweeps.tables import short_keys
from raytune.sweeps.words import is_number, value_text


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
    figure, axes = new_figure(theme, 4.8)
    trials = [trial for trial in result.trials if trial.is_ranked]
    failed = [trial for trial in result.trials if trial.state == "failed"]
    if not trials or not keys:
        reason = f"No trial has a value of {result.metric}." if not trials else "No key varies among the trials."
        return empty(figure, axes, theme, reason)
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
    colours, thin = ramp(theme), 1.3 if len(trials) <= 40 else 0.8
    for index, trial in reversed(list(enumerate(trials))):
        colour = theme.best if index == 0 else colours((1 - index / max(1, len(trials) - 1)) ** 2)
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
                in_a_line(label, MOST_LABEL),
                fontsize=8,
                va="center",
                color=theme.ink,
                zorder=6,
                bbox={"boxstyle": "round,pad=0.12", "facecolor": theme.paper, "edgecolor": "none", "alpha": 0.8},
            )
        axes.text(place, 1.045, wrapped(scale.title), fontsize=9, ha="center", va="bottom", color=theme.ink, fontweight="bold")
    axes.set_xlim(-0.15, len(keys) + 0.35)
    axes.set_ylim(min(height for scale in scales for height, _ in scale.ticks) - 0.05, 1.16)
    axes.set_axis_off()
    return finished(figure)


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
