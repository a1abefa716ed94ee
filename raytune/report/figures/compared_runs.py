"""The losses of several runs over their steps."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from raytune.metrics.history import History
from raytune.printable import in_a_line
from raytune.report.figures.canvas import LIGHT, Theme, empty, finished, legend, new_figure
from raytune.report.figures.run_curves import LINES, curve_line, fit_scale

MOST_RUNS = 15


def compared_losses(runs: Sequence[tuple[str, History]], theme: Theme = LIGHT) -> Figure:
    """The validation loss of each run, or its training loss where none has one; the first ones where there are many."""
    name = "validation/loss" if any(history.series("validation/loss") for _, history in runs) else "train/loss"
    figure, axes = new_figure(theme, 4.2)
    shown = [(label, history.series(name)) for label, history in runs[:MOST_RUNS] if history.series(name)]
    if not shown:
        return empty(figure, axes, theme, "Nothing was measured yet.")
    handles = []
    for index, (label, series) in enumerate(shown):
        colour = (theme.far, theme.best, theme.failed, theme.near, theme.muted)[index % 5]
        style = LINES[(index // 5 + index) % len(LINES)]
        mark = "o" if name.startswith("validation") else ""
        handles += curve_line(axes, series, colour, in_a_line(label, 28), marker=mark, linewidth=1.6, linestyle=style)
    fit_scale(axes, [value for _, series in shown for _, value in series])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, steps=[1, 2, 5, 10], integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss" if name.startswith("validation") else "training loss", fontsize=9)
    legend(axes, theme, handles)
    return finished(figure)
