"""The page of a run: it shows what the folder has at any time, runs nothing that it was given, and needs nothing but itself."""

import base64
import json
import logging
import math
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from raytune.cli import cli
from raytune.launch.state.record import RunRecord
from raytune.metrics.history import History
from raytune.metrics.points import Point
from raytune.plan.data.data_report import DataReport
from raytune.plan.data.row_lengths import length_lines
from raytune.report.at_end import leave_page
from raytune.report.figures.canvas import DARK, LIGHT, png
from raytune.report.figures.run_curves import Curves, Mark, run_curves, set_losses
from raytune.report.marks import marked
from raytune.report.run_page import curves_of, write_run_page
from raytune.report.run_seen import RunSeen
from raytune.run_folder import RunFolder
from tests.pages import Page, assert_needs_nothing_else
from tests.run_cases import left_run, planned, sample, score
from tests.tiny import store_plan, tiny_store
from tests.variants import chequered

MARKUP = "</pre></script><script>alert(1)</script><img src=x onerror=alert(2)>"
HOSTILE = MARKUP + ("\x1b[31m\x00 \u202egnirts\u2066 \udcff &amp; {{ 7*7 }}")


def page_at(folder: RunFolder) -> Page:
    return Page(Path(write_run_page(folder.path)).read_text())


def text_of(page: Page) -> str:
    return " ".join(" ".join(page.text["main"]).split())


# --- What it shows -----------------------------------------------------------------------------------------------------------


def test_a_finished_run_shows_what_it_came_to_says_that_its_rows_are_elsewhere_and_needs_nothing_else(tmp_path: Path) -> None:
    answers = [
        sample(0, "yes", "no", "yes"),
        sample(1, "yes", "yes", "no"),
        sample(2, "yes", "no", "maybe"),
        sample(3, "yes", "yes", "yes"),
    ]
    folder = left_run(tmp_path, samples=answers, comparisons={"generation": score(0.5, 0.75)})
    page = page_at(folder)
    assert_needs_nothing_else(page, has_script=False)
    (image,) = page.attributes("img")
    file = (Path(folder.path) / "figures/curves.png").read_bytes()
    assert image["src"] == f"data:image/png;base64,{base64.b64encode(file).decode()}"
    text = text_of(page)
    for words in (
        "is no complete store of tokenised rows",
        "finished after 20 steps",
        "in 2 attempts",
        "validation loss from 5.0000 to 0.2381 (95.24 % lower)",
        "exact match from 50.0% to 75.0% (+25.0 points)",
        "3 of 4 answers changed",
        "cause rank 0: WorkerDied: killed",
        f"raytune score {folder.path} rows.jsonl",
    ):
        assert words in text, words
    assert ["training.learning_rate", "0.003"] in page.rows
    assert ["exact match", "50.0%", "75.0%", "+25.0%", "+15.0% to +35.0%", "+50.0%", "4"] in page.rows
    assert ["all", "5.0000", "0.2381", "20", "0.2381", "1.269"] in page.rows
    headings = [heading for heading in page.text["h3"] if heading in ("Gained most", "Became worse", "Still worst", "The same")]
    assert headings == ["Gained most", "Became worse", "Still worst", "The same"]
    assert [heading.split(" exact")[0] for heading in page.text["h4"]] == ["Row 0", "Row 1", "Row 2", "Row 3"]


def test_a_running_run_says_so_and_has_what_there_is(tmp_path: Path) -> None:
    text = text_of(page_at(left_run(tmp_path, state="running", until=12)))
    assert "running, at step 12 of 20; last sign of life" in text
    assert "Go on from its newest checkpoint" in text
    assert "Answers, base against tuned" not in text


def test_a_failed_run_says_what_ended_it_and_which_key_to_change(tmp_path: Path) -> None:
    cause = "rank 0: TrainingError: The loss of step 13 is not finite"
    page = page_at(left_run(tmp_path, state="failed", failure=cause, until=12))
    assert page.text["pre"][0] == cause
    assert "Change training.learning_rate" in text_of(page)
    assert "failed at step 12 of 20" in text_of(page)


def test_a_run_without_a_step_has_a_page(tmp_path: Path) -> None:
    folder = left_run(tmp_path, state="running", until=0)
    text = text_of(page_at(folder))
    assert "Nothing was measured yet." in text
    assert "running, at step 0 of 20" in text


def test_suites_are_told_apart_and_samples_of_earlier_runs_are_of_the_main_one(tmp_path: Path) -> None:
    answers = [sample(0, "a", "b", "a"), sample(0, "c", "b", "d", suite="gsm8k")]
    scores = {"generation": score(0.0, 1.0), "gsm8k": score(0.5, 0.0)}
    run = RunSeen.read(left_run(tmp_path, samples=answers, comparisons=scores).path)
    assert {suite: len(rows) for suite, rows in run.samples.items()} == {"generation": 1, "gsm8k": 1}
    text = text_of(page_at(run.folder))
    assert "gsm8k: exact match" in text
    assert "Change strategy.replay" in text, "a suite whose answers became worse is a thing forgotten"


def test_what_happened_is_marked_in_the_curves(tmp_path: Path) -> None:
    curves = curves_of(RunSeen.read(left_run(tmp_path, state="failed", failure="x", until=17).path))
    assert Mark(5, "saved") in curves.marks
    assert Mark(5, "restarted") in curves.marks
    assert Mark(17, "failed") in curves.marks
    assert [point.step for point in curves.history.points] == list(range(18))


# --- Safety ------------------------------------------------------------------------------------------------------------------


def test_hostile_texts_are_shown_and_not_obeyed(tmp_path: Path) -> None:
    long = HOSTILE + "x" * 1_000_000
    folder = left_run(
        tmp_path,
        samples=[sample(0, HOSTILE, long, HOSTILE), sample(1, "a", HOSTILE, long)],
        sets=["<b>set</b>", "two"],
        config={"data": {"train": {"path": "</script><script>alert(3)</script>.jsonl"}}},
    )
    record = RunRecord.read(folder)
    assert record
    text = HOSTILE.replace("\udcff", "")  # which no file of ours holds
    replace(record, failure=text, versions={"<i>v</i>": text}).write(folder)
    page = page_at(folder)
    assert_needs_nothing_else(page, has_script=False)
    assert len(page.attributes("img")) == 2, "the curves, and those of sets"
    for tag in ("script", "b", "i"):
        assert not page.attributes(tag)
    shown = [text for text in page.text["pre"] if "alert(1)" in text]
    assert any(MARKUP in text for text in shown)
    assert any("{{ 7*7 }}" in text for text in shown)
    everything = "".join("".join(texts) for texts in page.text.values())
    assert not set(everything) & set("\x1b\x00\u202e\u2066\udcff")
    assert (Path(folder.path) / "report.html").stat().st_size < 3_000_000


def test_credentials_are_not_on_the_page(tmp_path: Path) -> None:
    cause = "rank 0: ClusterError: https://user:hunter2hunter2@example.com/rows.jsonl does not answer"
    page = page_at(left_run(tmp_path, state="failed", failure=cause, until=12))
    assert "does not answer" in text_of(page)
    assert "hunter2hunter2" not in text_of(page)


def test_a_page_that_cannot_be_written_is_said_and_fails_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = left_run(tmp_path)
    (Path(folder.path) / "figures").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        leave_page(folder)
    (said,) = [record.getMessage() for record in caplog.records]
    assert f"The page of {folder.path} was not written (raytune report {folder.path} tries again)" in said
    leave_page(RunFolder(str(tmp_path), "nothing"))
    assert not (tmp_path / "nothing").exists()


# --- Verbs -------------------------------------------------------------------------------------------------------------------


def test_report_writes_the_page_and_says_what_looks_wrong(tmp_path: Path) -> None:
    folder = left_run(tmp_path, state="failed", failure="rank 0: OutOfMemoryError: CUDA", until=12)
    done = CliRunner().invoke(cli, ["report", folder.path, "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["report"] == folder.report
    assert told["state"] == "failed"
    assert [symptom["key"] for symptom in told["symptoms"]] == ["training.per_device_train_batch_size"]
    assert Path(folder.report).exists()
    plain = CliRunner().invoke(cli, ["report", folder.path])
    assert "Change training.per_device_train_batch_size" in plain.stdout
    nothing = CliRunner().invoke(cli, ["report", str(tmp_path / "nothing")])
    assert nothing.exit_code == 2
    assert "is no run folder" in nothing.stderr


# --- Rows --------------------------------------------------------------------------------------------------------------------


def test_the_marks_of_a_row_are_the_targets_of_its_store(tmp_path: Path) -> None:
    info = tiny_store(tmp_path / "store", max_rows=12)
    plan = planned(tmp_path, data={"train": store_plan(info)})
    rows = marked(plan, str(tmp_path / "model"))
    assert not isinstance(rows, str), rows
    assert len(rows.lengths) == info.num_documents
    assert sum(rows.lengths) == info.num_tokens
    for document in rows.documents:
        assert [piece.kind.is_target for piece in document.pieces] == [index % 2 == 1 for index in range(len(document.pieces))]
        target = "".join(piece.text for piece in document.pieces if piece.kind.is_target)
        assert json.loads(target.removesuffix("<|im_end|>"))["who"]
        assert target.endswith("<|im_end|>"), "the end of the answer is learnt"
        assert "Reply in JSON." in document.pieces[0].text
    folder = left_run(tmp_path / "runs", plan=plan.model_copy(update={"storage": str(tmp_path / "runs")}))
    page = page_at(folder)
    pieces = [piece for document in rows.documents for piece in document.pieces]
    assert page.text["mark"][1:] == [piece.text for piece in pieces if piece.kind.is_target]
    assert "before data.max_length" not in text_of(page), "the report of an earlier raytune has no lengths"
    report = DataReport(template=[], train=info.report, validation={})
    told = left_run(tmp_path / "told", plan=plan.model_copy(update={"storage": str(tmp_path / "told"), "data_report": report}))
    lines = [" ".join(line.split()) for line in length_lines(info.report.sources[0].lengths)]
    assert sum(int(line.split()[3]) for line in lines) == 12
    text = text_of(page_at(told))
    assert all(line in text for line in lines)


# --- Figures -----------------------------------------------------------------------------------------------------------------


def curves(values: Mapping[str, Sequence[float]], *, sets: Sequence[str] = (), marks: Sequence[Mark] = ()) -> Curves:
    points = []
    for step in range(max(map(len, values.values()), default=0)):
        known = {name: series[step] for name, series in values.items() if step < len(series)}
        points.append(Point(step=step, time=float(step), attempt=1, values=known))
    return Curves(history=History(tuple(points)), num_steps=10, best_step=None, marks=marks, sets=sets)


WIDE = {"train/loss": [0.0, -1.0, 2.0], "validation/loss": [1e-9, 1e9]}
SETS = [f"$x_{index}" for index in range(14)]


SHOWN = {
    "nothing": curves({}),
    "one": curves({"train/loss": [1.0]}),
    "no number": curves({"train/loss": [math.nan] * 4, "train/grad_norm": [math.inf, 1.0]}),
    "wide": curves(WIDE, marks=[Mark(1, "rolled back"), Mark(2, "not finite")]),
    "many sets": curves({f"validation/{name}/loss": [1.0, 2.0] for name in SETS}, sets=SETS),
}
THEMES = {"light": LIGHT, "dark": DARK}


@pytest.mark.parametrize(("name", "theme"), chequered([*SHOWN], [*THEMES]))
def test_every_curve_can_be_drawn(name: str, theme: str) -> None:
    for draw in (run_curves, set_losses):
        assert png(draw(SHOWN[name], THEMES[theme])).startswith(b"\x89PNG\r\n")


def test_the_curves_are_what_was_measured() -> None:
    shown = curves({"train/loss": [3.0, 2.0, 1.5], "validation/loss": [2.5, 2.2], "train/learning_rate": [0.1, 0.2, 0.3]})
    top, rate = run_curves(replace(shown, best_step=1)).axes
    lines = {str(line.get_label()): list(line.get_ydata()) for line in top.lines}  # pyright: ignore
    assert lines["training loss"] == [3.0, 2.0, 1.5]
    assert lines["validation loss"] == [2.5, 2.2]
    assert [list(line.get_xdata()) for line in top.lines if line.get_marker() == "*"] == [[1]]  # pyright: ignore
    assert list(rate.lines[0].get_ydata()) == [0.1, 0.2, 0.3]  # pyright: ignore


# --- In a browser ------------------------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium")
WIDTHS = (320, 800, 1400)
LOOK = """<!DOCTYPE html><title>look</title><body><script>
const widths = %s, told = [];
const next = () => {
  if (!widths.length) { document.body.textContent = JSON.stringify(told); return; }
  const frame = document.createElement("iframe"), width = widths.shift();
  frame.width = width; frame.height = 900; frame.src = "report.html";
  frame.onload = () => {
    const page = frame.contentDocument, root = page.documentElement;
    const over = root.scrollWidth - root.clientWidth, loaded = [...page.images].every(image => image.naturalWidth > 0);
    const mark = getComputedStyle(page.querySelector("mark")).textDecorationLine;
    told.push({width, over, loaded, mark, scripts: page.scripts.length});
    frame.remove(); next();
  };
  document.body.append(frame);
};
next();
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_in_a_browser_nothing_is_wider_than_the_window(tmp_path: Path) -> None:
    assert CHROMIUM
    info = tiny_store(tmp_path / "store", max_rows=12)
    plan = planned(tmp_path, data={"train": store_plan(info)})
    folder = left_run(tmp_path, plan=plan, samples=[sample(0, "y" * 5000, HOSTILE, "a b " * 4000)], sets=["a" * 200, "two"])
    write_run_page(folder.path)
    (Path(folder.path) / "look.html").write_text(LOOK % json.dumps(WIDTHS))
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update "
    flags += "disable-sync allow-file-access-from-files virtual-time-budget=20000 dump-dom"
    options = [f"--{flag}" for flag in flags.split()]
    command = [CHROMIUM, *options, f"--user-data-dir={tmp_path / 'chromium'}", f"file://{folder.path}/look.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    told = json.loads(done.stdout.split("<body>")[1].split("</body>")[0])
    assert [look["width"] for look in told] == list(WIDTHS)
    for look in told:
        assert look["over"] <= 0, look
        assert look["loaded"], look
        assert look["scripts"] == 0, look
        assert "underline" in look["mark"], look
