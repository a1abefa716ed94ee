"""Bars: importance of each key, and where the budget went."""

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import AutoLocator

from raytune.printable import in_a_line
from raytune.report.figures.canvas import LIGHT, MOST_AXES, Theme, empty, finished, legend, new_figure
from raytune.report.figures.curves import fate_colour, fate_of
from raytune.sweeps.importance import importance
from raytune.sweeps.results import SweepResult


def importance_bars(result: SweepResult, theme: Theme = LIGHT) -> Figure:
    """Share of the differences between trials that each key explains by itself; a line marks what chance reaches."""
    found = importance(result.trials, result.keys, result.mode)
    shown = [item for item in found.keys if item.share is not None][: 2 * MOST_AXES]
    figure, axes = new_figure(theme, 1.3 + 0.34 * max(2, len(shown)))
    if not shown:
        return empty(figure, axes, theme, "Too few trials, or too little difference between them, to tell.")
    heights = [-index for index in range(len(shown))]
    shares = [item.share or 0.0 for item in shown]
    axes.barh(heights, shares, height=0.62, color=theme.far, zorder=2)
    for height, item in zip(heights, shown):
        if item.chance is not None:
            axes.plot([item.chance] * 2, [height - 0.4, height + 0.4], color=theme.best, linewidth=2, zorder=3)
        axes.text(1.07, height, f"{item.share:.0%}", va="center", ha="right", fontsize=9, color=theme.ink)
    axes.set_yticks(heights, [in_a_line(item.key, 40) for item in shown])
    axes.set_xlim(0, 1.08)
    axes.set_ylim(-len(shown) + 0.4, 0.6)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    axes.set_xlabel(f"share of the differences between {found.num_trials} trials at step {found.step}")
    handle = Line2D([], [], color=theme.best, linewidth=2, label="what chance stays below 19 times in 20")
    figure.legend(handles=[handle], loc="outside lower right", frameon=False, fontsize=9, labelcolor=theme.ink, handlelength=1)
    axes.grid(axis="y", visible=False)
    return finished(figure)


def budget_bars(result: SweepResult, theme: Theme = LIGHT) -> Figure:
    """Worker seconds of the full grid, and what was spent in its place on trials that ended in each way."""
    figure, axes = new_figure(theme, 2.5)
    if result.spent_worker_s <= 0 and result.full_worker_s <= 0:
        return empty(figure, axes, theme, "Nothing was spent.")
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
    legend(axes, theme, axes.get_legend_handles_labels()[0])
    return finished(figure)


def _spending(result: SweepResult, theme: Theme) -> list[tuple[str, float, str]]:
    """(what, worker seconds, colour), in the order in which trials end; the last is what no trial accounts for."""
    parts: dict[str, tuple[float, str]] = {}
    order = {"stopped": 0, "waiting": 1, "running": 2, "finished": 3, "failed": 4}
    for trial in sorted(result.trials, key=lambda trial: (order[trial.state], trial.num_rungs)):
        fate = fate_of(result, trial)
        seconds, colour = parts.get(fate, (0.0, fate_colour(result, trial, theme)))
        parts[fate] = seconds + trial.worker_s, colour
    listed = [(fate, seconds, colour) for fate, (seconds, colour) in parts.items() if seconds > 0]
    rest = result.spent_worker_s - sum(seconds for _, seconds, _ in listed)
    return [*listed, ("between trials", rest, theme.muted)] if rest > 0.01 * result.spent_worker_s else listed
