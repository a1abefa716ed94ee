"""The page of a range test of learning rates: it shows what was found, runs nothing, and needs nothing but itself."""

import base64
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest

from raytune.launch.rates.found_rate import FoundRate
from raytune.plan.rates.rate_advice import advise_rate
from raytune.plan.rates.rate_range import RateRange, cautions
from raytune.report.figures.canvas import LIGHT, png
from raytune.report.figures.rates import rate_curve
from raytune.report.rate_page import rate_page, write_rate_page
from tests.variants import chequered

TRIED = RateRange(low=1e-6, high=1.0, num_steps=60)
FALLS = [6 - 4 / (1 + math.exp(-4 * (math.log10(TRIED.rate(step)) + 3.5))) for step in range(60)]
CURVES = {
    "found": [*FALLS[:50], *(loss + 0.05 * step**2 for step, loss in enumerate(FALLS[50:]))],
    "flat": [2.0] * 60,
    "exploded at once": [6.0, 40.0],
    "not finite": [6.0, 6.1, math.nan],
    "nothing finite": [math.nan],
}


def found_rate(
    losses: list[float], *, folder: str = "/runs/rates/a", tried: RateRange = TRIED, failure: str | None = None
) -> FoundRate:
    return FoundRate(
        name="<script>a</script>",
        folder=folder,
        key="training.learning_rate",
        rate=2e-4,
        tried=tried,
        losses=tuple(losses),
        failure=failure,
        advice=advise_rate(losses, tried),
        num_epochs=4.0,
        cautions=cautions(tried, num_epochs=4.0, num_steps_of_run=1000),
    )


class Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize(("name", "shape"), chequered([*CURVES], ["exponential", "linear"]))
def test_every_curve_can_be_drawn(name: str, shape) -> None:
    tried = TRIED.model_copy(update={"shape": shape})
    assert png(rate_curve(found_rate(CURVES[name], tried=tried))).startswith(b"\x89PNG\r\n")


def test_the_picture_marks_the_rates_that_are_named_and_shows_no_more_than_the_beginning_of_an_explosion() -> None:
    found = found_rate([*CURVES["found"][:56], 500.0])
    assert found.advice.is_found
    (axes,) = rate_curve(found, LIGHT).axes
    marks = {str(line.get_label()).partition(":")[0]: next(iter(line.get_xdata())) for line in axes.lines}  # pyright: ignore
    advice = found.advice
    assert [marks[name] for name in ("steepest", "safe", "lowest", "the run's")] == [
        advice.steepest,
        advice.safe,
        advice.lowest,
        found.rate,
    ]
    low, high = axes.get_ylim()
    assert low < min(found.losses)
    assert max(found.losses[:6]) < high < 10


def test_the_page_holds_its_picture_and_all_that_was_found(tmp_path: Path) -> None:
    found = found_rate(CURVES["found"], folder=str(tmp_path / "rates/a"))
    path = write_rate_page(found)
    assert path == f"{found.folder}/report.html"
    page = Page(Path(path).read_text())
    (image,) = [attributes for tag, attributes in page.tags if tag == "img"]
    file = (tmp_path / "rates/a/figures/rate_curve.png").read_bytes()
    assert image["src"] == f"data:image/png;base64,{base64.b64encode(file).decode()}"
    assert f"training.learning_rate={found.suggestion:.1e}" in page.text
    for words in (found.advice.words, *found.cautions, f"{found.advice.safe:.1e}", "<script>a</script>: learning rates"):
        assert words in page.text
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [], "nothing runs"
    fetched = [url for _, attributes in page.tags for key in ("src", "srcset") if (url := attributes.get(key))]
    assert all(url.startswith("data:image/png;base64,") for url in fetched)


def test_a_page_without_a_suggestion_says_why_and_where_the_loss_was_not_finite() -> None:
    found = found_rate(CURVES["not finite"], failure="The loss of step 3 is not finite (rank 0: nan on rows 4).")
    image = png(rate_curve(found))
    page = Page(rate_page(found, {"raytune": "0.1"}, image, image))
    assert "no longer finite" in page.text
    assert "nan on rows 4" in page.text
    assert "training.learning_rate=" not in page.text
    assert any("nan on rows 4" in line for line in found.lines)
