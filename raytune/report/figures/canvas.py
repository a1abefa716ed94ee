"""What all figures share: colours of a light and a dark page, axes, legends, and text as it is."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from raytune.printable import in_a_line

DOTS_PER_INCH = 160
WIDTH_IN = 9.6
LOG_SPREAD = 8.0
"""A scale is logarithmic where the largest value is at least so many times the smallest."""
MOST_AXES = 12
MOST_LABEL = 18
MOST_TITLE = 24
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


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DOTS_PER_INCH, facecolor=figure.get_facecolor())
    return file.getvalue()


Shown = TypeVar("Shown")
Drawing = Callable[[Shown, Theme], Figure]


def drawn(draw: Mapping[str, Drawing[Shown]], shown: Shown) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """PNG files by figure, for readers whose pages are light, and for those whose pages are dark."""
    light, dark = ({name: png(figure(shown, theme)) for name, figure in draw.items()} for theme in (LIGHT, DARK))
    return light, dark


def is_log(values: Sequence[float]) -> bool:
    """Whether the values are spread so widely that equal factors, not equal differences, should look alike."""
    return min(values) > 0 and max(values) >= LOG_SPREAD * min(values)


def new_figure(theme: Theme, height_in: float) -> tuple[Figure, Axes]:
    """A figure of the page's width with one pair of axes in the theme's colours."""
    figure, (axes,) = new_panels(theme, [height_in])
    return figure, axes


def new_panels(theme: Theme, heights_in: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """A figure of the page's width with axes below each other, of heights in inches, that share their horizontal axis."""
    figure = Figure(figsize=(WIDTH_IN, sum(heights_in)), layout="constrained", facecolor=theme.paper)
    panels = figure.subplots(len(heights_in), sharex=True, squeeze=False, height_ratios=heights_in)[:, 0]
    for axes in panels:
        axes.set_facecolor(theme.paper)
        axes.grid(color=theme.faint, linewidth=0.7, zorder=0)
        axes.set_axisbelow(True)
        axes.tick_params(colors=theme.ink, labelsize=9, length=3, which="both")
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(theme.muted)
        axes.xaxis.label.set_color(theme.ink)
        axes.yaxis.label.set_color(theme.ink)
    return figure, list(panels)


def legend(axes: Axes, theme: Theme, handles: Sequence[Any]) -> None:
    """Right of the axes, where nothing lies below it."""
    if handles:
        axes.legend(
            handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9, labelcolor=theme.ink
        )


def empty(figure: Figure, axes: Axes, theme: Theme, reason: str) -> Figure:
    """A figure that says why there is nothing to see."""
    figure.set_figheight(0.6)
    axes.set_axis_off()
    axes.text(0, 0.5, reason, va="center", fontsize=11, color=theme.ink, transform=axes.transAxes)
    return finished(figure)


def finished(figure: Figure) -> Figure:
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


def log_ticks(axis: Any) -> None:
    """Round numbers along a logarithmic axis, written as they are."""
    axis.set_major_locator(LogLocator(subs=(1.0,), numticks=10))
    low, high = sorted(axis.get_view_interval())
    if math.log10(high / low) < 2:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=10))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def ramp(theme: Theme) -> Colormap:
    """Colours from a trial that ended early to one that was trained to the end."""
    return LinearSegmentedColormap.from_list("ramp", [theme.near, theme.far])


def hex_of(colour: tuple[float, float, float, float]) -> str:
    """`#rrggbb` of red, green, blue and opacity, each from 0 to 1."""
    return "#" + "".join(f"{round(255 * part):02x}" for part in colour[:3])


def wrapped(title: str) -> str:
    """A long key in two lines."""
    head, _, last = title.rpartition(".")
    return f"{head}.\n{in_a_line(last, MOST_TITLE)}" if head and len(title) > 16 else in_a_line(title, MOST_TITLE)
