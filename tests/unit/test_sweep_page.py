"""The page of a sweep: it shows what there is, runs nothing that it was given, and needs nothing but itself."""

import base64
import io
import re
import uuid
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from raytune.report.figures.bars import budget_bars, importance_bars
from raytune.report.figures.canvas import DARK, LIGHT, Drawing, Theme, png
from raytune.report.figures.coordinates import parallel_coordinates
from raytune.report.figures.curves import learning_curves
from raytune.report.sweep_page import sweep_page, write_sweep_page
from raytune.storage import read_bytes
from raytune.sweeps.results import SweepResult
from tests.pages import Page, assert_needs_nothing_else
from tests.run_cases import left_run
from tests.sweep_cases import cases, halved_sweep, odd_values, sweep_result, trial_result
from tests.variants import chequered, variants

CONFIG = "name: quickstart-sweep\nsweep:\n  space:\n    adapter.rank: [4, 8]  # <b>&amp;</b>\n"
CASES = list(cases())
DRAWINGS: list[Drawing[SweepResult]] = [learning_curves, parallel_coordinates, importance_bars, budget_bars]
FIGURES = ["learning_curves", "parallel_coordinates", "importance", "budget"]


def page_of(result: SweepResult) -> Page:
    """The page without its figures, which others look at."""
    blank = png(budget_bars(sweep_result([], spent_worker_s=0.0, full_worker_s=0.0)))
    images = dict.fromkeys(FIGURES, blank)
    return Page(sweep_page(result, CONFIG, {"raytune": "0.1", "ray": "2.60.0"}, images, images))


def pixels(image: bytes) -> np.ndarray:
    return imread(io.BytesIO(image), format="png")[..., :3]


# --- Files -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", variants(["remote"], ["local"]))
def test_page_and_figures_are_written_where_the_sweep_lies(place: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "a sweep") if place == "local" else f"memory://{uuid.uuid4().hex}/sweep"
    path = write_sweep_page(halved_sweep(), CONFIG, folder + "/")
    assert path == f"{folder}/report.html"
    page = Page(read_bytes(path).decode())
    embedded = [attributes["src"] or "" for attributes in page.attributes("img")]
    assert len(embedded) == len(FIGURES)
    for name, source in zip(FIGURES, embedded):
        file = read_bytes(f"{folder}/figures/{name}.png")
        assert source == f"data:image/png;base64,{base64.b64encode(file).decode()}"
        assert file.startswith(b"\x89PNG\r\n")
    assert all((attributes["srcset"] or "").startswith("data:image/png;base64,") for attributes in page.attributes("source"))


def test_a_trial_leads_to_its_page_which_is_written_with_that_of_the_sweep(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    run = left_run(folder / "trials", name="trial-000")
    left_run(folder / "trials", name="trial-001", state="failed", failure="<b>boom</b>", until=12)
    made = [trial_result(0, {}, ((20, 0.2),)), trial_result(1, {}, state="failed"), trial_result(2, {}, state="waiting")]
    trials = [replace(trial, folder=str(folder / f"trials/trial-00{number}")) for number, trial in enumerate(made)]
    page = Page(Path(write_sweep_page(sweep_result(trials, folder=str(folder)), CONFIG, str(folder))).read_text())
    links = {attributes["href"] for attributes in page.attributes("a")}
    assert {"./trials/trial-000/report.html", "./trials/trial-001/report.html", "./trials/trial-002/"} <= links
    assert "finished after 20 steps" in Path(run.report).read_text()
    written = Path(run.report).stat().st_mtime_ns
    write_sweep_page(sweep_result(trials, folder=str(folder), finished_before=True), CONFIG, str(folder))
    assert Path(run.report).stat().st_mtime_ns == written, "a sweep that is only read leaves pages as they are"


# --- Safety ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_page_fetches_nothing_and_runs_only_its_own_script(name: str) -> None:
    page = page_of(cases()[name])
    assert_needs_nothing_else(page, has_script=True)


def test_what_looks_like_markup_is_shown_and_not_obeyed() -> None:
    page = page_of(odd_values())
    assert len(page.attributes("script")) == 1
    assert len(page.attributes("img")) == len(FIGURES)
    assert not page.attributes("b")
    cells = [cell for row in page.rows for cell in row]
    assert "<script>alert(1)</scrip…" in cells
    assert page.text["pre"].count("</pre><img src=x onerror=alert(1)>") == 2
    assert CONFIG in page.text["pre"]
    assert "exact_match <b>" in page.text["code"]


def test_colours_of_a_terminal_are_not_on_the_page() -> None:
    page = page_of(sweep_result([trial_result(0, {}, state="failed", cause="\x1b[31mboom\x1b[0m \udcff")]))
    assert page.text["pre"][0] == "boom ?"


def test_a_hostile_name_and_folder_stay_text() -> None:
    trials = [trial_result(0, {"adapter.rank": 8}, ((60, 1.0),))]
    folder = "/runs/$(rm -rf ~)'\"><script>"
    page = page_of(sweep_result(trials, name="</title><script>alert(1)</script>", folder=folder, keys=("adapter.rank",)))
    assert page.text["title"] == ["</title><script>alert(1)</script>: sweep report"]
    assert len(page.attributes("script")) == 1
    assert page.text["pre"][0] == "raytune train --from-sweep '/runs/$(rm -rf ~)'\"'\"'\"><script>'"
    links = {link["href"] for link in page.attributes("a")}
    assert links == {"#trials", "#figures", "#config", "#versions", "./trials.csv", "./trials.jsonl"}  # no trial lies below it


# --- Content -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_every_trial_has_a_row_and_every_failure_its_cause(name: str) -> None:
    result = cases()[name]
    page = page_of(result)
    listed = [row for row in page.rows if len(row) == len(result.keys) + 7][1:]
    assert [row[1] for row in listed] == [trial.trial.name for trial in result.trials]
    failed = [trial for trial in result.trials if trial.state == "failed"]
    assert len(page.text.get("article", [])) == len(failed)
    for article, trial in zip(page.text.get("article", []), failed):
        assert trial.trial.name in article
        assert (trial.cause or "").strip() in article
        assert trial.folder in article


def test_the_winner_stands_out_with_the_command_that_trains_it_again() -> None:
    result = halved_sweep()
    page = page_of(result)
    assert page.text["pre"][0] == "raytune train --from-sweep /runs/quickstart-sweep"
    assert result.best is not None
    best = [attributes for tag, attributes in page.tags if tag == "tr" and attributes.get("class") == "best"]
    assert len(best) == 1
    assert f"./trials/{result.best.trial.name}/" in [link["href"] for link in page.attributes("a")]
    assert not page.text.get("strong", [""])[0].startswith("It was not trained")


def test_a_winner_that_was_stopped_is_said_to_be_unfinished() -> None:
    page = page_of(cases()["no rungs"])
    assert page.text["strong"][0] == "It was not trained to the end:"


@pytest.mark.parametrize("name", ["none", "all failed", "never measured", "all NaN"])
def test_a_sweep_without_a_winner_says_so_and_offers_no_command(name: str) -> None:
    page = page_of(cases()[name])
    assert any("there is no winner" in text for text in page.text["p"])
    assert not any("--from-sweep" in text for text in page.text["pre"])


def test_every_key_is_listed_with_what_was_tried() -> None:
    rows = {row[0]: row for row in page_of(halved_sweep(200)).rows}
    assert rows["adapter.rank"][1:3] == ["4, 8, 16, 32", "200 of 200"]
    assert re.fullmatch(r"0\.000\d+ to 0\.0\d+ \(200 values\)", rows["training.learning_rate"][1])
    assert rows["adapter.lora_plus_ratio"][1] == "4, 16"
    odd = {row[0]: row for row in page_of(odd_values()).rows}
    assert odd["training.max_grad_norm"][1:3] == ["0.5, 1, null", "4 of 5"]


# --- Figures -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shown", "draw"), chequered([*((name, LIGHT) for name in CASES), ("sixteen", DARK), ("odd values", DARK)], DRAWINGS)
)
def test_every_figure_can_be_drawn_of_every_sweep(shown: tuple[str, Theme], draw: Drawing[SweepResult]) -> None:
    name, theme = shown
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a letter without a glyph, a layout that does not fit
        image = pixels(png(draw(cases()[name], theme)))
    assert image.shape[1] == 1536
    paper = np.array([int(theme.paper[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    inked = (np.abs(image - paper) > 0.1).any(axis=-1)
    assert 0.002 < inked.mean() < 0.7  # neither blank nor filled
    assert inked[:, :3].sum() == inked[:, -3:].sum() == 0  # nothing is cut off at the sides


def colours(figure_bytes: bytes, colour: str) -> int:
    """How many pixels have exactly this colour."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.round(pixels(figure_bytes) * 255) == wanted).all(axis=-1).sum())


def test_the_winner_and_failures_are_seen_in_the_curves() -> None:
    image = png(learning_curves(halved_sweep()))
    assert colours(image, LIGHT.best) > 1000
    assert colours(image, LIGHT.failed) > 20
    assert colours(png(learning_curves(halved_sweep(with_failures=False))), LIGHT.failed) == 0


def test_curves_of_one_trial_and_of_a_wide_range_of_steps_are_drawn() -> None:
    trials = [
        trial_result(0, {}, ((0, 5.0), (1, 4.0), (10, 2.0), (1000, 0.01)), num_steps=1000, rungs=(1, 10, 100, 1000)),
        trial_result(1, {}, ((0, 5.0), (1, 4.5)), state="stopped", num_steps=1000, rungs=(1, 10, 100, 1000)),
    ]
    axes = learning_curves(sweep_result(trials, rungs=(1, 10, 100, 1000))).axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("symlog", "log")
    assert [text.get_text() for text in axes.texts] == ["rung 1", "rung 2", "rung 3", "rung 4"]


def test_parallel_coordinates_put_the_better_value_on_top() -> None:
    for mode, best in (("min", 0), ("max", 3)):
        trials = [trial_result(n, {"adapter.rank": 2**n}, ((60, 1.0 + n),), mode=mode) for n in range(4)]  # type: ignore[arg-type]
        axes = parallel_coordinates(sweep_result(trials, keys=("adapter.rank",), mode=mode)).axes[0]  # type: ignore[arg-type]
        lines = [line for line in axes.lines if line.get_linewidth() == 2.6]
        assert len(lines) == 1
        assert list(lines[0].get_ydata()) == pytest.approx([best / 3, 1.0])  # rank 1, 2, 4, 8 is a scale of factors


def test_the_budget_adds_up_to_what_was_spent() -> None:
    result = halved_sweep()
    axes = budget_bars(result).axes[0]
    full, *parts = axes.patches
    assert full.get_width() == pytest.approx(result.full_worker_s)  # type: ignore[attr-defined]
    assert sum(part.get_width() for part in parts) == pytest.approx(result.spent_worker_s)  # type: ignore[attr-defined]


def test_of_many_keys_the_most_important_ones_are_drawn() -> None:
    trials = [
        trial_result(n, {f"data.k{i}": (n if i == 19 else (n * (i + 3)) % 7) for i in range(20)}, ((60, float(n)),))
        for n in range(24)
    ]
    axes = parallel_coordinates(sweep_result(trials, keys=tuple(f"data.k{i}" for i in range(20)))).axes[0]
    titles = [text.get_text() for text in axes.texts if text.get_fontweight() == "bold"]
    assert len(titles) == 13
    assert {"k19", "validation/loss"} <= set(titles)


def test_no_control_character_of_a_value_reaches_the_page():
    result = odd_values()
    evil = "\x1b[2J\x00\x9b\u202e\u2066\u2028\x7fend"
    result.trials[1].trial.values["adapter.method"] = evil
    images = dict.fromkeys(FIGURES, png(budget_bars(sweep_result([], spent_worker_s=0.0, full_worker_s=0.0))))
    html = sweep_page(result, f"name: {evil}\n", {"raytune": "0.1"}, images, images)
    assert "\\u202e" in html
    assert not [character for character in html if character not in "\n\t" and not character.isprintable()]
