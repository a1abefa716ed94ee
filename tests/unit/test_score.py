"""What `raytune score` says and writes, without workers: tests/numerics has its losses, tests/ray its way through a cluster."""

import csv
import json
import time
from io import StringIO
from pathlib import Path

import pytest
import ray
from click.testing import CliRunner

from raytune.cli import cli
from raytune.config.sections.data import DataSource
from raytune.config.sections.run import RunConfig
from raytune.errors import DataError, UserError
from raytune.evaluation.scored_rows import ScoredRow, csv_table, jsonl_table, read_jsonl_table
from raytune.launch.asking.score import Scores, _table_for, run_to_score, score
from raytune.launch.data.rows_to_score import columns_of, look_at_rows, sources_of
from raytune.launch.state.record import RunRecord, write_plan
from raytune.plan.data.data_report import COUNTS, SourceReport, StoreReport
from raytune.run_folder import RunFolder
from tests.tiny import tiny_plan

ROWS = (
    ScoredRow(file="a, b.jsonl", row=1, targets=3, loss=1.0),
    ScoredRow(file="a, b.jsonl", row=3, targets=1, loss=800.0),
)


def report(**counts: int) -> StoreReport:
    source = SourceReport(
        name="rows",
        format="messages",
        too_long="truncate",
        unread_columns={},
        unread_keys={},
        examples={"bad": ["a, b.jsonl:2: 'messages' is null"]},
        **(dict.fromkeys(COUNTS, 0) | counts),
    )
    return StoreReport(row_length=64, num_rows=2, sources=[source])


def test_a_table_is_read_as_it_was_written_in_both_forms() -> None:
    lines = [json.loads(line) for line in jsonl_table(ROWS).splitlines()]
    assert lines[0] == {"file": "a, b.jsonl", "row": 1, "targets": 3, "loss": 1.0, "perplexity": 2.718281828459045}
    assert lines[1]["perplexity"] == "Infinity", "strict JSON has no word for it"
    assert read_jsonl_table(jsonl_table(ROWS)) == ROWS
    cells = list(csv.DictReader(StringIO(csv_table(ROWS).decode())))
    assert [list(row.values()) for row in cells] == [[str(value) for value in line.values()] for line in lines]


def test_the_mean_is_over_targets_and_lost_rows_are_told_with_the_first() -> None:
    scores = Scores(run="runs/x", weights="the final model", output="t.csv", rows=ROWS, report=report(rows=3, used=2, bad=1))
    assert scores.loss == pytest.approx((3 * 1.0 + 800.0) / 4)
    assert scores.num_lost == 1
    text = "\n".join(scores.lines)
    assert "2 rows scored under the final model: loss 200.7500" in text
    assert "; 1 row without a score" in text
    assert "the first is a, b.jsonl:2: 'messages' is null" in text


def run_of(folder: Path, state: str) -> RunFolder:
    run = RunFolder(str(folder), "tiny")
    config = RunConfig().model_dump(mode="json")
    RunRecord(name="tiny", state=state, attempts=1, created=time.time(), config=config, versions={}).write(run)  # pyright: ignore[reportArgumentType]
    write_plan(run, tiny_plan(storage=str(folder)))
    return run


def test_what_cannot_be_scored_is_refused_before_anything_starts(tmp_path: Path) -> None:
    rows = [DataSource(path="demo:test")]
    with pytest.raises(UserError, match=r"none is no run folder: it holds no run\.json"):
        run_to_score(str(tmp_path / "none"))
    run = run_of(tmp_path, "running")
    with pytest.raises(UserError, match=r"'tiny' .* has neither finished nor saved a checkpoint yet"):
        score(run_to_score(run.path), rows)
    with pytest.raises(UserError, match=r"--output is t\.txt, expected a name that ends in \.jsonl or \.csv"):
        score(run_to_score(run.path), rows, output="t.txt")


def test_a_table_takes_neither_the_place_of_its_rows_nor_that_of_another_table(tmp_path: Path) -> None:
    run = run_of(tmp_path, "finished")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    for path in (str(rows), f"{tmp_path}/*.jsonl"):
        with pytest.raises(UserError, match="holds the rows that are to be scored"):
            score(run_to_score(run.path), [DataSource(path=path)], output=str(rows))
    names = []
    for path in (str(rows), "elsewhere/rows.jsonl", f"{tmp_path}/*.jsonl"):
        names.append(_table_for([DataSource(path=path)], run, None).removeprefix(f"{run.scores}/"))
        Path(run.scores).mkdir(exist_ok=True)
        Path(run.scores, names[-1]).touch()
    assert names == ["rows.jsonl", "rows-2.jsonl", "jsonl.jsonl"]


def test_rows_without_a_format_are_refused_without_a_cluster_and_columns_give_them_one(tmp_path: Path) -> None:
    run = run_of(tmp_path, "finished")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"frage": "1 + 1?", "antwort": "2"}\n')
    with pytest.raises(DataError, match=r"'frage', 'antwort' fit no format"):
        score(run_to_score(run.path), sources_of([str(rows)], "auto", None))
    assert not ray.is_initialized()
    look_at_rows(sources_of([str(rows)], "auto", None, columns_of("prompt=frage, completion=antwort")))
    with pytest.raises(UserError, match=r"--columns is 'question', expected names as in prompt=question"):
        columns_of("question")


def test_the_verb_refuses_as_json_too(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["score", str(tmp_path / "none"), "demo:test", "--json"])
    assert done.exit_code == 2
    assert json.loads(done.stdout)["message"].endswith("Name the folder of a run.")
