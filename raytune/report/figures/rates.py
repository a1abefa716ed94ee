"""The curve of a range test of learning rates."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raytune.launch.rates.found_rate import FoundRate
from raytune.plan.rates.rate_advice import opening_of, trend
from raytune.report.figures.canvas import LIGHT, Theme, empty, finished, legend, log_ticks, new_figure

HEADROOM = 0.4
"""Of the loss at the beginning above the lowest, that is shown above it: an explosion would flatten what there is to see."""
LEAST_HEADROOM = 0.05
"""Of the loss at the beginning."""


def rate_curve(found: FoundRate, theme: Theme = LIGHT) -> Figure:
    """Loss over rates: of each step, smoothed as the steepest descent is read, and from both sides as the lowest is."""
    figure, axes = new_figure(theme, 4.6)
    losses = [loss for loss in found.losses if math.isfinite(loss)]
    if not losses:
        return empty(figure, axes, theme, "No loss was finite.")
    rates = found.rates[: len(losses)]
    both_sides = trend(losses, found.tried.smoothing)
    axes.plot(rates, losses, color=theme.near, linewidth=0, marker="o", markersize=3, label="loss of a step", zorder=2)
    axes.plot(rates, found.smoothed[: len(losses)], color=theme.far, linewidth=2.2, label="smoothed (lags behind)", zorder=3)
    both = "smoothed from both sides"
    axes.plot(rates, both_sides, color=theme.far, linewidth=1.2, linestyle=(0, (5, 3)), label=both, zorder=3)
    _marks(axes, found, theme)
    if found.tried.shape == "exponential":
        axes.set_xscale("log")
        axes.set_xlim(found.tried.low, found.tried.high)
        log_ticks(axes.xaxis)
    else:
        axes.set_xlim(found.tried.low, found.tried.high)
    if len(found.losses) < found.tried.num_steps:
        axes.axvspan(found.rates[-1], found.tried.high, color=theme.faint, alpha=0.5, linewidth=0, zorder=0, label="not tried")
    axes.set_ylim(*_shown(losses, both_sides))
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss")
    legend(axes, theme, axes.get_legend_handles_labels()[0])
    return finished(figure)


def _marks(axes: Axes, found: FoundRate, theme: Theme) -> None:
    """A line at each rate that is named, and at that of the run."""
    advice, low, high = found.advice, found.tried.low, found.tried.high
    named = [
        ("steepest", advice.steepest, theme.best, "-", 1.8),
        ("safe", advice.safe, theme.best, (0, (4, 2)), 1.4),
        ("lowest", advice.lowest, theme.failed, (0, (1, 2)), 1.6),
        ("the run's", found.rate, theme.muted, (0, (2, 3)), 1.2),
    ]
    for words, rate, colour, style, width in named:
        if rate is not None and low <= rate <= high:
            axes.axvline(rate, color=colour, linestyle=style, linewidth=width, label=f"{words}: {rate:.1e}", zorder=4)


def _shown(losses: Sequence[float], curve: Sequence[float]) -> tuple[float, float]:
    """Ends of the axis of the loss: all that lies below its beginning, and a bit above it."""
    first, lowest = max(losses[: opening_of(losses)]), min(min(losses), min(curve))
    room = max(HEADROOM * (first - lowest), LEAST_HEADROOM * abs(first), 1e-6)
    return lowest - room / 4, min(max(losses) + room / 4, first + room)
