"""Runs side by side: what was asked otherwise comes first, and what is best of a row is marked."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from raytune.cli import cli
from raytune.errors import UserError
from raytune.report.comparison import RunComparison
from raytune.report.figures.canvas import LIGHT
from raytune.report.figures.compared_runs import compared_losses
from tests.pages import Page, assert_needs_nothing_else
from tests.run_cases import left_run, score


def three_runs(storage: Path) -> list[str]:
    lora = {"adapter": {"method": "lora", "rank": 4}}
    return [
        left_run(storage, name="a", comparisons={"generation": score(0.5, 0.75)}).path,
        left_run(storage, name="b", config=lora, comparisons={"generation": score(0.5, 1.0)}).path,
        left_run(storage, name="<b>c", state="running", until=12, config={"training": {"seed": 7}}).path,
    ]


def test_keys_that_differ_come_first_and_the_best_is_marked(tmp_path: Path) -> None:
    compared = RunComparison.read(three_runs(tmp_path))
    differences = {row.label: row.cells for row in compared.differences}
    assert differences["training.seed"] == ("42", "42", "7")
    assert differences["adapter.rank"][1] == "4"
    assert "name" not in differences
    outcomes = {row.label: row for row in compared.outcomes}
    assert outcomes["exact match"].cells == ("75.0%", "100.0%", "–")
    assert outcomes["exact match"].best == 1
    assert outcomes["validation loss"].cells == ("0.2381", "0.2381", "0.4545")
    assert outcomes["validation loss"].best is None, "two are as good as each other"
    assert outcomes["state"].cells == ("finished", "finished", "running")
    lines = compared.text.splitlines()
    assert lines[0].split() == ["a", "b", "<b>c"]
    assert lines.index("Asked otherwise:") < lines.index("Came to:")
    assert any(line.split() == ["exact", "match", "75.0%", "100.0%", "*", "–"] for line in lines)


def test_runs_that_were_asked_alike_say_so(tmp_path: Path) -> None:
    same = [left_run(tmp_path / folder, name="r").path for folder in ("one", "two")]
    compared = RunComparison.read(same)
    assert compared.names == tuple(same), "names alone would not tell them apart"
    assert "nothing: the same keys with the same values" in compared.text


def test_the_verb_prints_json_and_leaves_a_page(tmp_path: Path) -> None:
    runs, page = three_runs(tmp_path), tmp_path / "compared.html"
    done = CliRunner().invoke(cli, ["compare", *runs, "--output", str(page), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["runs"] == runs
    assert told["page"] == str(page)
    assert told["outcomes"]["exact match"] == [0.75, 1.0, None]
    read = Page(page.read_text())
    assert_needs_nothing_else(read, has_script=False)
    assert not read.attributes("b"), "a name stays text"
    assert ["training.seed", "42", "42", "7"] in read.rows


def test_one_run_alone_and_what_is_no_run_are_refused(tmp_path: Path) -> None:
    folder = left_run(tmp_path).path
    with pytest.raises(UserError, match="at least two runs"):
        RunComparison.read([folder, f"{folder}/"])
    with pytest.raises(UserError, match="is no run folder"):
        RunComparison.read([folder, str(tmp_path)])
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(UserError, match=r"is a sweep. Name its trials, which are runs: .*/trials/\*"):
        RunComparison.read([folder, str(tmp_path)])


def test_all_runs_of_a_storage_are_compared_though_their_data_lies_beside_them(tmp_path: Path) -> None:
    three_runs(tmp_path)
    (tmp_path / "stores").mkdir()
    (tmp_path / "rates").mkdir()
    assert len(RunComparison.read([str(path) for path in tmp_path.iterdir()]).runs) == 3


def test_the_figure_has_a_line_for_each_run(tmp_path: Path) -> None:
    compared = RunComparison.read(three_runs(tmp_path))
    (axes,) = compared_losses([(name, run.history) for name, run in zip(compared.names, compared.runs)], LIGHT).axes
    assert [len(line.get_xdata()) for line in axes.lines] == [5, 5, 3]  # pyright: ignore
