"""Learning curves, and the words and colours for what became of a trial."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from raytune.report.figures.canvas import LIGHT, Theme, empty, finished, hex_of, is_log, legend, log_ticks, new_figure, ramp
from raytune.sweeps.results import State, SweepResult, TrialResult
from raytune.sweeps.words import rung_text


def learning_curves(result: SweepResult, theme: Theme = LIGHT) -> Figure:
    """The metric over steps, a line per trial, coloured by how far it came; rungs are vertical lines."""
    figure, axes = new_figure(theme, 4.6)
    best = result.best
    curves = [(trial, [(step, value) for step, value in trial.curve if math.isfinite(value)]) for trial in result.trials]
    values = [value for _, curve in curves for _, value in curve]
    if not values:
        return empty(figure, axes, theme, f"No trial measured {result.metric}.")
    steps = [step for _, curve in curves for step, _ in curve]
    count = Counter(fate_of(result, trial) for trial in result.trials)
    handles: dict[tuple[int, int, str], Line2D] = {}
    for trial, curve in reversed(curves):  # the best are drawn last, over the others
        if not curve:
            continue
        is_best = best is not None and trial.trial.number == best.trial.number
        colour = theme.best if is_best else fate_colour(result, trial, theme)
        width = 2.6 if is_best else 1.2
        mark = _MARKS.get(trial.state, "." if len(curve) == 1 else "")
        axes.plot(*zip(*curve), color=colour, linewidth=width, zorder=4 if is_best else 2)
        axes.plot(*curve[-1], color=colour, marker=mark, **_MARK_STYLE, zorder=5)
        fate = fate_of(result, trial)
        label = f"best: {trial.trial.name}" if is_best else f"{fate}: {count[fate]}"
        place = (-1, 0, label) if is_best else (_FATES.index(trial.state), -trial.num_rungs, label)
        handles[place] = Line2D([], [], color=colour, linewidth=width, marker=mark, label=label, **_MARK_STYLE)
    _step_axis(axes, theme, steps, result.rungs, max(trial.num_steps for trial in result.trials))
    if is_log(values):
        axes.set_yscale("log")
        log_ticks(axes.yaxis)
    axes.set_xlabel("step")
    axes.set_ylabel(result.metric)
    legend(axes, theme, [handles[place] for place in sorted(handles)])
    return finished(figure)


_FATES: tuple[State, ...] = ("finished", "running", "waiting", "stopped", "failed")
_MARKS: dict[State, str] = {"stopped": "o", "failed": "x"}
_MARK_STYLE: dict[str, Any] = {"markersize": 5.5, "markeredgewidth": 1.5}


def fate_of(result: SweepResult, trial: TrialResult) -> str:
    if trial.state == "stopped" and trial.rung is not None:
        return f"stopped at {rung_text(result, trial.rung)}"
    return {"stopped": "stopped early", "running": "still running", "waiting": "not started"}.get(trial.state, trial.state)


def fate_colour(result: SweepResult, trial: TrialResult, theme: Theme) -> str:
    """Along the ramp by rung; what was trained to the end has its far end."""
    if trial.state == "failed":
        return theme.failed
    if trial.state == "finished":
        return theme.far
    place = (trial.num_rungs - 1) / max(1, len(result.rungs)) if trial.state == "stopped" and trial.num_rungs else 0.0
    return hex_of(ramp(theme)(min(1.0, place)))


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
