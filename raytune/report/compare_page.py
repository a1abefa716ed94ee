"""The page of runs side by side: one HTML file that needs neither network nor server."""

from pathlib import Path

from raytune.report.comparison import RunComparison
from raytune.report.figures.canvas import drawn
from raytune.report.figures.compared_runs import compared_losses
from raytune.report.page import page, page_figure
from raytune.storage import absolute, write_bytes

LOSSES = "losses"
_CAPTION = (
    "On the rows of each run's own validation sets: losses of runs with other rows or other templates cannot be compared. A run "
    "that goes on ends where it is now."
)


def write_compare_page(compared: RunComparison, path: str | Path) -> str:
    """Write the page to a file, local or on an object store.

    Returns:
        Where it lies.
    """
    curves = [(name, run.history) for name, run in zip(compared.names, compared.runs)]
    light, dark = drawn({LOSSES: compared_losses}, curves)
    target = absolute(path)
    write_bytes(target, compare_page(compared, light[LOSSES], dark[LOSSES]).encode())
    return target


def compare_page(compared: RunComparison, light: bytes, dark: bytes) -> str:
    """The page as HTML.

    Args:
        light, dark: PNG files of the losses, for readers whose pages are light or dark.
    """
    return page(
        "compare_page.html", compared=compared, figure=page_figure("Losses.", _CAPTION, light, dark), num_runs=len(compared.names)
    )
