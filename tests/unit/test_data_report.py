"""What becomes of rows is counted, each row once, and told before anything is trained."""

import json
from collections import Counter
from io import StringIO
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from raytune.config.load import config_from
from raytune.config.sections.data import DataSource, measured_sets, named_sources
from raytune.config.sections.data_limits import LimitsSection
from raytune.config.sections.run import RunConfig
from raytune.data.store.store import StoreInfo
from raytune.data.templates.text import resolve_template
from raytune.errors import DataError
from raytune.launch.planning import plan_run
from raytune.launch.state.progress import show_result
from raytune.launch.state.record import write_plan
from raytune.launch.state.result import RunResult
from raytune.plan.data.data_report import COUNTS, DataReport, SourceReport, losses_text, report_table, store_text
from raytune.plan.describe import plan_text
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import RunFolder
from raytune.sweeps.describe import dry_run_facts, sweep_text
from raytune.sweeps.sweep_plan import plan_sweep
from tests.tiny import PATIENT, tiny_plan, tiny_split, tiny_store, tiny_tokenizer

CASES = Path(__file__).parents[1] / "cases"
CHATML = resolve_template("chatml", tiny_tokenizer())  # without markers: answers are found by its prompts
OUTCOMES = ("used", "bad", "no_target", "cut_off", "dropped", "other_side", "test_side", "origin_held_out", "filtered")


def build(folder: Path, path: Path | str, **changes: Any) -> StoreInfo:
    return tiny_store(folder / "stores", str(path), max_rows=None, **({"template": CHATML, "too_long": "auto"} | changes))


def only(info: StoreInfo) -> SourceReport:
    (report,) = info.report.sources
    return report


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat(*texts: str, **last: Any) -> dict[str, Any]:
    turns = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]
    turns[-1] |= last
    return {"messages": turns}


def config(folder: Path, **data: Any) -> RunConfig:
    return config_from(
        {
            "name": "told",
            "storage": str(folder),
            "data": {"packing": "none", "limits": dict.fromkeys(LimitsSection.model_fields, 1.0)} | data,
            "adapter": {"method": "lora", "rank": 4},
            "training": {"max_steps": 1, "global_batch_size": 1},
            "cluster": {"workers": 1},
        }
    )


# --- Cases from reports --------------------------------------------------------------------------------------------------------


def test_parquet_rows_train_as_many_tokens_as_the_same_json_lines(tmp_path: Path) -> None:
    qwen = resolve_template("qwen", tiny_tokenizer())
    for name in ("rows.jsonl", "rows.parquet"):
        assert build(tmp_path, CASES / "5" / name, template=qwen, max_length=2048).num_targets == 148


def test_a_turn_of_weight_0_is_not_trained(tmp_path: Path) -> None:
    info = build(tmp_path, CASES / "7" / "rows.jsonl")
    assert info.num_targets == len("Lima.") + 1
    assert only(info).skipped_turns == 1
    info = build(tmp_path, CASES / "rows" / "train_false.jsonl")
    assert info.num_targets == len("GOOD answer") + 1


def test_only_turns_that_would_be_trained_are_counted_as_excepted(tmp_path: Path) -> None:
    """A question of weight 0 is not trained anyway, nor is an earlier answer where only the last is meant."""
    rows = [
        {
            "messages": [
                {"role": "system", "content": "S", "weight": 0},
                {"role": "user", "content": "Q", "weight": 0},
                {"role": "assistant", "content": "A", "weight": 0},
                {"role": "user", "content": "Q", "train": False},
                {"role": "assistant", "content": "B"},
            ]
        }
    ]
    path = write(tmp_path / "a.jsonl", rows)
    counts = {
        targets: only(build(tmp_path, path, targets=targets)).skipped_turns
        for targets in ("assistant", "completion", "last", ("user", "assistant"))
    }
    assert counts == {"assistant": 1, "completion": 1, "last": 0, ("user", "assistant"): 3}


def test_lost_rows_of_a_file_are_told_by_plan_with_the_first_of_each(tmp_path: Path) -> None:
    path = CASES / "8" / "rows.jsonl"
    plan = plan_run(config(tmp_path, train=str(path), max_length=512, on_bad_row="skip"))
    text = plan_text(plan)
    assert "5 read as messages, 3 used: 2 answers cut, 1 row without targets, 1 bad row skipped; 1.07k tokens" in text
    assert f"1 bad row of 5 rows skipped (data.on_bad_row: skip); the first is {path}:5: 'messages' is null" in text
    assert f"(data.too_long: truncate); the first is {path}:2: 841 tokens" in text
    assert f"nothing in them is to be trained (data.targets); the first is {path}:4" in text
    assert RunPlan.model_validate_json(plan.model_dump_json()).data_report == plan.data_report


def test_half_of_a_file_is_lost_and_each_row_is_counted_once(tmp_path: Path) -> None:
    report = only(build(tmp_path, CASES / "rows" / "half_bad.jsonl", max_length=64, on_bad_row="skip"))
    assert (report.rows, report.bad, report.cut, report.no_target) == (50, 20, 20, 10)
    assert (report.cut_off, report.used) == (17, 3), "17 of the 20 that are cut lose all that they would train"


def test_a_label_is_refused_and_history_and_sharegpt_are_trained_as_chats(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'label' would be left unread"):
        build(tmp_path, CASES / "rows" / "text_and_label.jsonl")
    path = CASES / "rows" / "text_and_label.jsonl"
    info = tiny_store(tmp_path, sources=(DataSource(path=str(path), format="text"),))
    assert only(info).unread_columns == {"label": 1}
    assert build(tmp_path, CASES / "rows" / "alpaca_history.jsonl").num_targets == len("A1") + 1 + len("O") + 1
    assert build(tmp_path, CASES / "rows" / "sharegpt.jsonl").num_targets == len("A") + 1


# --- Counting ------------------------------------------------------------------------------------------------------------------

ROWS = st.sampled_from(
    [
        chat("Q", "A"),
        chat("Q", "A" * 100),
        chat("Q" * 100, "A"),
        chat("Q", "A" * 100, "Q", "B"),
        chat("Q"),
        chat("Q", ""),
        chat("Q", " \n"),
        chat("Q", "A", weight=0),
        chat("Q", "A", weight=0.5),
        {"messages": None},
    ]
)


@PATIENT
@given(rows=st.lists(ROWS, min_size=1, max_size=12), too_long=st.sampled_from(["truncate", "drop", "split"]))
def test_every_row_has_one_outcome_and_tokens_are_those_of_the_store(
    rows: list[Any], too_long: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    path = write(folder / "a.jsonl", [chat("Q", "always used"), *rows])
    split = tiny_split(validation_fraction=1e-9)
    info = build(folder, path, max_length=64, on_bad_row="skip", too_long=too_long, side="train", split=split)
    report = only(info)
    assert report.rows == len(rows) + 1 == sum(getattr(report, outcome) for outcome in OUTCOMES)
    assert (report.tokens, report.targets, report.documents) == (info.num_tokens, info.num_targets, info.num_documents)
    assert info.report.fill == pytest.approx(info.num_tokens / (64 * info.num_rows))
    assert report.bad == sum(row["messages"] is None for row in rows)
    assert report.weighted_turns == sum(row["messages"] is not None and row["messages"][-1].get("weight") == 0.5 for row in rows)
    longest = {"truncate": report.cut, "drop": report.dropped, "split": report.split}
    assert all(count == 0 for policy, count in longest.items() if policy != too_long)


def test_a_cut_is_counted_whichever_answer_it_falls_into(tmp_path: Path) -> None:
    rows = [chat("Q", "A" * 100, "Q", "B"), chat("Q", "A", "Q", "B" * 100), chat("Q", "A", "Q" * 100)]
    report = only(build(tmp_path, write(tmp_path / "a.jsonl", rows), max_length=64))
    assert (report.cut, report.used) == (2, 3), "the third loses only a question"


def test_answers_of_nothing_but_white_space_are_counted(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    rows = [chat("Q", text) for text in ("", " ", "\n\t", "\u00a0", "A")]
    rows += [chat("Q", "", tool_calls=[call]), chat("Q", "", weight=0), chat("Q", "A", " ")]
    path = write(tmp_path / "a.jsonl", rows)
    report = only(build(tmp_path, path, template=resolve_template("qwen", tiny_tokenizer())))
    assert report.blank_answers == 4
    assert report.examples["blank_answers"][0] == f"{path}:1: turn 2"
    assert only(build(tmp_path, write(tmp_path / "b.jsonl", [{"text": "\n "}, {"text": "a"}]))).blank_answers == 1


def test_plain_text_is_split_and_chats_are_truncated_and_both_is_said(tmp_path: Path) -> None:
    book = "".join(chr(97 + index % 26) for index in range(1000))
    (tmp_path / "book.txt").write_text(book)
    chats = write(tmp_path / "chats.jsonl", [chat("Q", "A" * 100)])
    sources = tuple(DataSource(path=str(path)) for path in (tmp_path / "book.txt", chats))
    info = build(tmp_path, "demo:train", sources=sources, max_length=64)
    text, talk = info.report.sources  # nothing predicts the first letter; the end is a target
    assert (text.format, text.too_long, text.split, text.cut, text.targets) == ("text", "split", 1, 0, len(book))
    assert (talk.format, talk.too_long, talk.split, talk.cut, talk.documents) == ("messages", "truncate", 0, 1, 1)
    said = losses_text(DataReport(template=[], train=info.report, validation={}))
    assert said[0].startswith("training (book.txt): 1 document split at data.max_length, 64 tokens (data.too_long: split)")
    assert said[1].startswith("training (chats.jsonl): 1 answer cut at data.max_length, 64 tokens (data.too_long: truncate)")


def test_weights_of_turns_do_not_go_with_targets_that_are_all_of_the_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [chat("Q", "A"), chat("Q", "A", weight=0)])
    with pytest.raises(DataError, match=rf"{path}:2: has turns that are not to be trained .* Name roles instead"):
        build(tmp_path, path, targets="all")
    path = write(tmp_path / "b.jsonl", [chat("Q", "A"), chat("Q", "A", weight=0.5)])
    with pytest.raises(DataError, match=rf"{path}:2: has turns that have a weight, but data.targets: all"):
        build(tmp_path, path, targets="all")
    assert build(tmp_path, path, targets=("user", "assistant")).num_targets > 0


def test_unknown_keys_and_columns_are_said_once_with_their_rows(tmp_path: Path) -> None:
    rows = [chat("Q", "A", mood="good") | {"id": index} for index in range(3)] + [chat("Q", "A")]
    info = build(tmp_path, write(tmp_path / "a.jsonl", rows))
    assert (only(info).unread_keys, only(info).unread_columns) == ({"mood": 3}, {"id": 3})
    assert losses_text(DataReport(template=[], train=info.report, validation={})) == [
        "a.jsonl: columns that the format messages does not read: 'id' (3 rows)",
        "a.jsonl: keys of turns that raytune does not know, or reads otherwise: 'mood' (3 rows)",
    ]


# --- Arrow ---------------------------------------------------------------------------------------------------------------------


def tool_rows() -> list[dict[str, Any]]:
    """Two calls with different arguments and schemas, which Arrow unites in one struct."""

    def row(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        schema = {"name": name, "parameters": {"type": "object", "properties": {key: {"type": "x"} for key in arguments}}}
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        return {
            "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "", "tool_calls": [call]}],
            "tools": [{"type": "function", "function": schema}],
        }

    return [
        row("one", {"a": 1, "list": [{"x": "y"}]}),
        row("two", {"b": "c", "deep": {"d": 2}}),
        row("three", {"deep": {"e": 3}}),
    ]


def test_nulls_that_arrow_fills_in_are_in_no_text_and_those_of_json_lines_stay(tmp_path: Path) -> None:
    qwen = resolve_template("qwen", tiny_tokenizer())
    rows = tool_rows()
    lines = build(tmp_path, write(tmp_path / "a.jsonl", rows), template=qwen, max_length=2048)
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    for other in ("a.parquet", "saved"):
        info = build(tmp_path, tmp_path / other, template=qwen, max_length=2048)
        assert (info.num_tokens, info.num_targets) == (lines.num_tokens, lines.num_targets)
    rows[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]["none"] = None
    with_null = build(tmp_path, write(tmp_path / "b.jsonl", rows), template=qwen, max_length=2048)
    assert with_null.num_targets == lines.num_targets + len(', "none": null')


def test_weights_of_turns_are_obeyed_in_columns_where_arrow_made_them_floats_and_nulls(tmp_path: Path) -> None:
    rows = [chat("Q", "A", weight=0), chat("Q", "A", weight=1), chat("Q", "A", train=False, mood="good"), chat("Q", "A")]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    info = build(tmp_path, tmp_path / "a.parquet")
    assert (only(info).used, only(info).no_target, only(info).skipped_turns, only(info).unread_keys) == (2, 2, 2, {"mood": 1})


def test_a_weight_is_told_as_unread_exactly_where_its_turn_is_not_trained(tmp_path: Path) -> None:
    row = chat("Q", "A", weight=0.5)
    row["messages"][0]["weight"] = 3
    path = write(tmp_path / "a.jsonl", [row])
    told = {targets: only(build(tmp_path, path, targets=targets)) for targets in ("assistant", ("user", "assistant"))}
    assert told["assistant"].unread_keys == {"weight of user, which is not trained": 1}
    assert told["user", "assistant"].unread_keys == {}
    assert [source.weighted_turns for source in told.values()] == [1, 2]


# --- Telling -------------------------------------------------------------------------------------------------------------------


def test_sources_are_told_apart_and_validation_rows_are_told_too(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    one = write(tmp_path / "a" / "rows.jsonl", [chat("Q", "A"), chat("Q")])
    other = write(tmp_path / "b" / "rows.jsonl", [chat("Q", "A" * 3), chat("Q", "A"), chat("Q", "A")])
    held_out = write(tmp_path / "held_out.jsonl", [chat("Q"), chat("Q", "A")])
    plan = plan_run(config(tmp_path, train=[str(one), str(other)], validation=str(held_out), template="chatml"))
    report = plan.data_report
    assert report is not None
    assert [(source.name, source.rows, source.used) for source in report.train.sources] == [("rows", 2, 1), ("rows-2", 3, 3)]
    assert report.validation["held_out"].total("no_target") == 1
    labels = Counter(label for label, _ in report_table(report))
    assert labels == {"training rows": 3, "validation rows": 1}
    assert [line.split(":")[0] for line in losses_text(report)] == ["training (rows)", "validation (held_out)"]


def test_both_sides_of_a_split_are_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [chat(f"Q{index}", "A") for index in range(40)])
    report = plan_run(config(tmp_path, train=str(path), validation_fraction=0.3)).data_report
    assert report is not None
    train, held_out = report.train, report.validation["validation"]
    assert train.total("used") == held_out.total("other_side") > 0 < held_out.total("used") == train.total("other_side")


def test_a_finished_run_still_tells_what_it_lost_in_its_folder_in_python_and_in_words(tmp_path: Path) -> None:
    report = DataReport(template=[], train=build(tmp_path, CASES / "8" / "rows.jsonl", on_bad_row="skip").report, validation={})
    folder = RunFolder(str(tmp_path), "tiny")
    write_plan(folder, tiny_plan(storage=folder.storage, data_report=report))
    outcome = {"metrics": {}, "best_step": 4, "held_bytes": [], "median_step_s": None, "comparisons": {}}
    Path(folder.result).write_text(json.dumps(outcome))
    result = RunResult.read(folder)
    assert result.data_report == report
    assert DataReport.model_validate(json.loads(json.dumps(result.to_json()))["data_report"]) == report
    console = Console(file=StringIO(), width=200)
    show_result(result, console)
    told = "5 read as messages, 3 used: 2 answers cut, 1 row without targets, 1 bad row skipped"
    assert told in console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert told in str(report)


def test_a_store_that_is_found_again_tells_the_same(tmp_path: Path) -> None:
    path = CASES / "8" / "rows.jsonl"
    first = build(tmp_path, path, on_bad_row="skip")
    assert build(tmp_path, path, on_bad_row="skip").report == first.report


def test_the_trials_of_a_sweep_tell_once_what_they_all_lose(tmp_path: Path) -> None:
    report = DataReport(template=[], train=build(tmp_path, CASES / "8" / "rows.jsonl", on_bad_row="skip").report, validation={})
    section = config_from({"sweep": {"space": {"training.seed": [1, 2]}}, "data": {"validation_fraction": 0.1}}).sweep
    assert section is not None
    plans = [tiny_plan(data_report=report, seed=seed, optimization={"num_steps": 81}) for seed in (1, 2)]
    plan = plan_sweep(section, "s", num_trials=2, plans=plans, slots=1)
    assert sweep_text(plan).count("1 bad row skipped") == 1
    assert sweep_text(plan).count("bad row of 5 rows skipped") == 1
    facts = json.loads(json.dumps(dry_run_facts(plan, [], [])))
    assert [DataReport.model_validate(one) for one in facts["data_reports"]] == [report]


def test_every_count_is_explained_and_what_is_lost_has_a_sentence() -> None:
    nothing = {"name": "n", "format": "messages", "too_long": "truncate", "unread_columns": {}, "unread_keys": {}, "examples": {}}
    measured = {"rows", "augmented", "used", "other_side", "test_side", "documents", "tokens", "targets", "prompts_compared"}
    for lost in set(COUNTS) - measured:
        source = SourceReport.model_validate(nothing | dict.fromkeys(COUNTS, 0) | {lost: 2})
        report = DataReport.model_validate(
            {"template": [], "train": {"row_length": 8, "num_rows": 1, "sources": [source]}, "validation": {}}
        )
        assert len(losses_text(report)) == 1, lost


def test_of_a_folder_the_files_are_named_and_of_a_file_nothing_is_said_of_it(tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    rows.mkdir()
    for number in range(6):
        write(rows / f"train-{number}.jsonl", [{"sentence": "fine", "label": "good"}])
    write(rows / "test.jsonl", [{"sentence": "bad", "label": "bad"}])
    info = build(tmp_path, rows)
    assert info.num_targets == 6 * (len("good") + 1), "the name of the class and the end of the turn"
    (line,) = store_text(info.report)
    assert line.startswith(
        "6 read as classification of 6 files (train-0.jsonl, train-1.jsonl, train-2.jsonl, train-3.jsonl, and 2 more), 6 used"
    )
    assert only(build(tmp_path, rows / "test.jsonl")).files == []


def test_a_validation_set_is_not_called_like_the_metrics_over_all_of_them() -> None:
    sources = [DataSource(path=path) for path in ("demo:validation", "news.jsonl", "a/main.jsonl", "b/validation.jsonl")]
    assert list(measured_sets(sources)) == ["main", "news", "main-2", "main-3"]
    assert list(measured_sets(sources[:1])) == ["validation"], "alone it is measured as validation/loss only"


def test_a_turn_that_asks_for_what_the_targets_do_is_not_read_otherwise(tmp_path: Path) -> None:
    asking = [
        {"messages": [{"role": "user", "content": "Q"} | asked, {"role": "assistant", "content": "A"}]}
        for asked in ({"weight": 1}, {"train": True})
    ]
    path = write(tmp_path / "a.jsonl", asking)
    assert set(only(build(tmp_path, path)).unread_keys) == {"weight: 1 of user", "train: true of user"}
    for targets in (("user",), ("user", "assistant"), "all"):
        assert not only(build(tmp_path, path, targets=targets)).unread_keys


def test_every_source_has_a_name_of_its_own_whatever_the_others_are_called() -> None:
    for names in (["a-2", "a", "a"], ["a", "a", "a-2"], ["a", "a-b", "a"], ["a", "a", "a"]):
        named = named_sources([DataSource(path="rows.jsonl", name=name) for name in names])
        assert [source.name for source in named.values()] == names
        assert next(iter(named)) == names[0]
    assert list(named_sources([DataSource(path=path) for path in ("x/rows.jsonl", "y/rows.jsonl")])) == ["rows", "rows-2"]


def test_a_file_for_validation_that_is_called_like_the_test_is_not_taken_for_it(tmp_path: Path) -> None:
    held_out = write(tmp_path / "test.jsonl", [chat("Q"), chat("Q", "A")])
    train = write(tmp_path / "rows.jsonl", [chat("Q", "A")])
    report = plan_run(config(tmp_path, train=str(train), validation=str(held_out), template="chatml")).data_report
    assert report is not None
    assert [line.split(":")[0] for line in losses_text(report)] == ["validation (test)"]
    other = write(tmp_path / "more.jsonl", [chat("Q"), chat("Q", "A")])
    several = plan_run(config(tmp_path, train=str(train), validation=[str(held_out), str(other)], template="chatml")).data_report
    assert several is not None
    assert [line.split(":")[0] for line in losses_text(several)] == ["validation (test)", "validation (more)"]
    assert [label for label, _ in report_table(several)] == ["training rows", "validation (test) rows", "validation (more) rows"]
