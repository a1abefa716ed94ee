"""The page that a range test of learning rates leaves: what it says, its curve, and what it was."""

from collections.abc import Mapping

from raytune.launch.rates.found_rate import FoundRate
from raytune.report.figures.canvas import drawn
from raytune.report.figures.rates import rate_curve
from raytune.report.page import page, page_figure, write_page
from raytune.versions import library_versions

CURVE = "rate_curve"
_CAPTION = (
    "Loss of each step before its update. The steepest descent is read off the smoothed loss, which lags behind the rate; the "
    "lowest loss off the one that is smoothed from both sides, and the safe rate is at most a tenth of its. The axis of the loss "
    "ends a bit above where it began: explosions lie outside."
)
_ADVICE = {
    "steepest": "where the loss falls fastest; what --apply writes",
    "safe": "at most a tenth of the rate with the lowest loss",
    "lowest": "where the loss is lowest: too high to train with",
}


def write_rate_page(found: FoundRate) -> str:
    """Write the page and its figure into the folder of the range test, local or on an object store.

    Returns:
        The path of the page.
    """
    light, dark = drawn({CURVE: rate_curve}, found)
    return write_page(found.folder, rate_page(found, library_versions(), light[CURVE], dark[CURVE]), light)


def rate_page(found: FoundRate, versions: Mapping[str, str], light: bytes, dark: bytes) -> str:
    """The page as HTML.

    Args:
        light, dark: PNG files of the curve, for readers whose pages are light or dark.
    """
    advice = found.advice
    named = [(name, getattr(advice, name), words) for name, words in _ADVICE.items()]
    facts = [(name, "–" if rate is None else f"{rate:.1e}", words) for name, rate, words in named]
    return page(
        "rate_page.html",
        found=found,
        facts=[*facts, ("the run's", f"{found.rate:.1e}", "without this test")],
        apply=f"{found.key}={found.suggestion:.1e}" if found.suggestion is not None else None,
        points=[(f"{rate:.2e}", f"{loss:.4f}", f"{average:.4f}") for rate, loss, average in found.points],
        figure=page_figure("Loss over learning rates.", _CAPTION, light, dark),
        versions=versions,
    )
