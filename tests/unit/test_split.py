"""On which side of a split rows lie: by their content, a group, strata or time; folds; and a test that decides nothing."""

import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune.config.load import config_from
from raytune.config.sections.data import DataSection, DataSource
from raytune.config.sections.split import FoldSection, SplitSection, overrides_of
from raytune.data.conversations.conversation import RowError
from raytune.data.rows.split import Split, side_of, split_by_hash, text_of, time_of
from raytune.data.store.borders import measured
from raytune.errors import DataError, PlanError, UserError
from raytune.launch.check import check_run
from raytune.launch.folds import Spread, config_of_fold, train_folds
from raytune.launch.planning import plan_run
from raytune.plan.data.split import asked_split, check_test
from raytune.plan.identity.identity import differences, identity_of
from raytune.sweeps.planner import plan_of_sweep
from tests.tiny import PATIENT, tiny_split

SHARES = st.floats(0.01, 0.49)
VALUES = st.one_of(st.integers(0, 3), st.text("ab", min_size=1, max_size=2))
ROW = st.fixed_dictionaries({"text": st.text(max_size=3), "user": VALUES, "label": st.sampled_from("abc")})
ROWS = st.lists(ROW, min_size=1, max_size=60)


def split_of(folder: Path, rows: Sequence[Any], name: str = "rows.jsonl", **data: Any) -> Split:
    """The split that keys of `data` make of the rows of a file."""
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return measured(asked_split(DataSection(**data)), [DataSource(path=str(path))], folder / "stores")[0]


def split_if_any(folder: Path, rows: Sequence[Any], **data: Any) -> Split | None:
    """The same; None where a side would have no row, which is refused."""
    try:
        return split_of(folder, rows, **data)
    except DataError as error:
        if "leaves no row for" not in str(error):
            raise
        return None


def sides(rows: Sequence[Any], split: Split) -> list[str]:
    return [side_of(row, split) for row in rows]


def labelled(count: int, *labels: str) -> list[dict[str, str]]:
    return [{"text": f"row {number}", "label": labels[number % len(labels)]} for number in range(count)]


# --- By the hash of a row, or of its group -----------------------------------------------------------------------------------


@PATIENT
@given(st.dictionaries(st.text(max_size=3), st.one_of(st.none(), st.text(max_size=3), st.integers())), SHARES, SHARES, SHARES)
def test_a_row_keeps_its_side_whatever_the_order_of_its_columns_and_however_large_the_others_are(
    row: dict[str, Any], one: float, other: float, test: float
) -> None:
    low, high = sorted((one, other))
    reordered = dict(reversed(row.items()))
    found = side_of(row, tiny_split(validation_fraction=low))
    assert found == side_of(reordered, tiny_split(validation_fraction=low))
    assert found == "train" or side_of(row, tiny_split(validation_fraction=high)) == "validation"
    beside_test = side_of(row, tiny_split(validation_fraction=low, test_fraction=test))
    assert (beside_test == "validation") == (found == "validation"), "a test takes from the training rows alone"


def test_about_the_asked_shares_are_held_out_and_those_of_an_earlier_raytune_stay() -> None:
    rows = [{"text": f"row {index}"} for index in range(5000)]
    count = Counter(sides(rows, tiny_split(validation_fraction=0.2, test_fraction=0.1)))
    assert 900 < count["validation"] < 1100, "standard deviation 28"
    assert 400 < count["test"] < 600, "standard deviation 21"
    held_out = [index for index, side in enumerate(sides(rows, tiny_split(validation_fraction=0.2))) if side == "validation"]
    assert (held_out[:8], len(held_out)) == EARLIER


EARLIER = ([0, 16, 26, 35, 42, 43, 47, 53], 1002)


@PATIENT
@given(rows=ROWS, num_folds=st.integers(2, 6), test=st.sampled_from([0.0, 0.25]), by=st.sampled_from(["hash", "group", "strata"]))
def test_each_row_is_in_exactly_one_fold_or_in_the_test_of_all(
    rows: list[Any], num_folds: int, test: float, by: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, split = tmp_path_factory.mktemp("rows"), {"group": {"group": "user"}, "strata": {"strata": "label"}}.get(by, {})
    found = []
    for index in range(num_folds):
        data = {"fold": {"index": index, "of": num_folds}, "test_fraction": test, "split": split}
        divided = split_if_any(folder, rows, **data)
        if divided is None:
            assert by == "strata"
            return
        found.append(sides(rows, divided))
    for of_row in zip(*found, strict=True):
        assert Counter(of_row) in (
            Counter(validation=1, train=num_folds - 1),
            Counter(test=num_folds),
        )


def test_folds_of_small_strata_are_alike_in_size(tmp_path: Path) -> None:
    rows = [{"text": f"{stratum} {number}", "label": stratum} for stratum in range(200) for number in range(3)]
    folds = [
        sides(rows, split_of(tmp_path, rows, fold={"index": index, "of": 5}, split={"strata": "label"})) for index in range(5)
    ]
    assert all(Counter(of_row) == Counter(validation=1, train=4) for of_row in zip(*folds, strict=True))
    sizes = [fold.count("validation") for fold in folds]
    assert all(120 - 40 < size < 120 + 40 for size in sizes), "of 200 draws of 0 or 1: standard deviation at most 10"


@PATIENT
@given(rows=ROWS, validation=SHARES, test=SHARES)
def test_a_group_lies_on_one_side(rows: list[Any], validation: float, test: float) -> None:
    split = tiny_split(validation_fraction=validation, test_fraction=test, split=SplitSection(group="user"))
    by_group: dict[str, set[str]] = {}
    for row in rows:
        by_group.setdefault(str(row["user"]), set()).add(side_of(row, split))
    assert all(len(found) == 1 for found in by_group.values())


@pytest.mark.parametrize("by", [{}, {"group": "label"}])
@pytest.mark.parametrize("held_out", [{"validation_fraction": 0.3, "test_fraction": 0.2}, {"fold": {"index": 1, "of": 3}}])
def test_rows_that_are_added_move_none(by: dict[str, str], held_out: dict[str, Any], tmp_path: Path) -> None:
    rows, more = labelled(60, "a", "b", "c"), labelled(90, "c", "d")
    before, after = (split_of(tmp_path, some, split=by, **held_out) for some in (rows, more + rows))
    assert sides(rows, before) == sides(rows, after)
    assert before == after, "it is a function of the row alone"


def test_groups_are_held_out_by_about_their_share() -> None:
    rows = [{"text": f"row {index}", "user": index % 2000} for index in range(6000)]
    found = sides(rows, tiny_split(validation_fraction=0.2, split=SplitSection(group="user")))
    assert 1200 - 4 * 54 < found.count("validation") < 1200 + 4 * 54, "2,000 groups of 3: standard deviation 18 groups"


def test_a_value_is_the_same_in_files_of_all_kinds() -> None:
    for row in ({"id": 1}, {"id": 1.0}, {"id": "1"}, {"meta.id": "1", "id": 1}):
        assert text_of(row, "id", "data.split.group") == "1"
    assert text_of({"meta": {"id": [1, "a"]}}, "meta.id", "data.split.group") == '[1, "a"]'
    assert text_of({"meta": '{"id": 7}'}, "meta.id", "data.split.group") == "7", "JSON in a text is read"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "has no 'user', only 'text'"),
        ({"user": None}, "'user' is null"),
        ({"user": " "}, "'user' is empty"),
        ({"user": math.nan}, "'user' is nan"),
    ],
)
def test_a_row_without_the_value_that_decides_is_a_bad_row(row: dict[str, Any], message: str) -> None:
    split = tiny_split(validation_fraction=0.2, split=SplitSection(group="user"))
    with pytest.raises(RowError, match=f"{message}.*data.split.group"):
        side_of(row, split)


# --- By strata ---------------------------------------------------------------------------------------------------------------


@PATIENT
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    validation=SHARES,
    test=SHARES,
)
def test_each_stratum_has_its_share_to_within_a_row(
    sizes: list[int], validation: float, test: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = [{"text": f"{stratum} {number}", "label": stratum} for stratum, size in enumerate(sizes) for number in range(size)]
    data = {"validation_fraction": validation, "test_fraction": test, "split": {"strata": "label"}}
    split = split_if_any(tmp_path_factory.mktemp("rows"), rows, **data)
    if split is None:
        return
    found = sides(rows, split)
    for stratum, size in enumerate(sizes):
        count = Counter(side for row, side in zip(rows, found, strict=True) if row["label"] == stratum)
        assert abs(count["validation"] - validation * size) < 1
        assert abs(count["test"] - test * size) < 1


def test_many_small_strata_have_their_share_together(tmp_path: Path) -> None:
    rows = [{"text": f"{stratum} {number}", "label": stratum} for stratum in range(500) for number in range(3)]
    found = sides(rows, split_of(tmp_path, rows, validation_fraction=0.1, split={"strata": "label"}))
    assert 150 - 40 < found.count("validation") < 150 + 40, "of 500 draws with probability 0.3: standard deviation 10"


def test_rows_that_are_added_move_few_of_a_stratum_and_none_of_others(tmp_path: Path) -> None:
    rows = labelled(2000, "a", "b")
    more = [{"text": f"new {number}", "label": "a"} for number in range(100)]
    data: dict[str, Any] = {"validation_fraction": 0.2, "split": {"strata": "label"}}
    before, after = sides(rows, split_of(tmp_path, rows, **data)), sides(rows, split_of(tmp_path, rows + more, **data))
    moved = Counter(row["label"] for row, was, now in zip(rows, before, after, strict=True) if was != now)
    assert moved["b"] == 0
    assert moved["a"] <= 20, "the border lies at the 220th of 1,100 rows instead of the 200th of 1,000"


def test_rows_of_one_content_lie_on_one_side_however_rows_are_divided(tmp_path: Path) -> None:
    rows = [{"text": f"{number % 50}", "label": number % 2, "day": number % 50} for number in range(200)]
    for by in ({}, {"strata": "label"}, {"time": "day"}, {"group": "day"}, {"group": "day", "strata": "label"}):
        found: dict[str, set[str]] = {}
        split = split_of(tmp_path, rows, validation_fraction=0.3, test_fraction=0.2, split=by)
        for row in rows:
            found.setdefault(row["text"], set()).add(side_of(row, split))
        assert all(len(of_row) == 1 for of_row in found.values())


def test_groups_are_divided_by_strata_if_each_has_one(tmp_path: Path) -> None:
    rows = [{"text": f"{number}", "user": number % 60, "label": number % 60 % 2} for number in range(240)]
    found = sides(rows, split_of(tmp_path, rows, validation_fraction=0.2, split={"group": "user", "strata": "label"}))
    groups = {(row["user"], row["label"]): side for row, side in zip(rows, found, strict=True)}
    assert Counter(label for (_, label), side in groups.items() if side == "validation") == {0: 6, 1: 6}
    assert all(groups[row["user"], row["label"]] == side for row, side in zip(rows, found, strict=True))
    rows[90] = rows[90] | {"label": 1}
    with pytest.raises(DataError, match=r"'user' have several values of 'label': '0' \(.*:31\) and '1' \(.*:91\)"):
        split_of(tmp_path, rows, validation_fraction=0.2, split={"group": "user", "strata": "label"})


def test_a_column_of_too_many_values_is_no_label(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": number} for number in range(10_001)]
    with pytest.raises(DataError, match="'label' has more than 10,000 values"):
        split_of(tmp_path, rows, validation_fraction=0.2, split={"strata": "label"})


# --- By time -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("1970-01-02", ("a date", 86400.0)),
        ("1970-01-02T00:00:00Z", ("a date", 86400.0)),
        ("1970-01-02T01:00:00+01:00", ("a date", 86400.0)),
        (" 1970-01-01 00:00:00.25 ", ("a date", 0.25)),
        (datetime(1970, 1, 2, tzinfo=UTC), ("a date", 86400.0)),
        (date(1970, 1, 2), ("a date", 86400.0)),
        (1_700_000_000, ("a number", 1.7e9)),
        ("1700000000.5", ("a number", 1_700_000_000.5)),
    ],
)
def test_times_are_dates_or_numbers(value: Any, found: Any) -> None:
    assert time_of({"at": value}, "at") == found


@pytest.mark.parametrize("value", ["last week", "2026-13-01", True, [], math.inf, "nan"])
def test_what_is_no_time_is_a_bad_row(value: Any) -> None:
    with pytest.raises(RowError, match=r"'at' is .*data\.split\.time"):
        time_of({"at": value}, "at")


@PATIENT
@given(times=st.lists(st.integers(0, 20), min_size=2, max_size=40), validation=SHARES, test=SHARES)
def test_the_latest_rows_are_the_test_and_those_before_them_validation(
    times: list[int], validation: float, test: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = [{"text": str(number), "at": at} for number, at in enumerate(times)]
    data = {"validation_fraction": validation, "test_fraction": test, "split": {"time": "at"}}
    split = split_if_any(tmp_path_factory.mktemp("rows"), rows, **data)
    if split is None:
        return
    of_side = {side: [row["at"] for row in rows if side_of(row, split) == side] for side in ("train", "validation", "test")}
    assert max(of_side["train"]) < min(of_side["validation"])
    assert max(of_side["validation"]) < min(of_side["test"])
    most = max(Counter(times).values())
    assert abs(len(of_side["test"]) - test * len(rows)) <= most / 2
    assert abs(len(of_side["test"]) + len(of_side["validation"]) - (test + validation) * len(rows)) <= most / 2


def test_dates_and_numbers_are_not_compared(tmp_path: Path) -> None:
    rows = [{"text": "a", "at": "2026-01-01"}, {"text": "b", "at": 1_700_000_000}]
    with pytest.raises(DataError, match=r"'at' is a date \(.*:1\) and a number \(.*:2\), which cannot be compared"):
        split_of(tmp_path, rows, validation_fraction=0.5, split={"time": "at"})


def test_a_time_that_most_rows_have_leaves_nothing_to_hold_out(tmp_path: Path) -> None:
    rows = [{"text": str(number), "at": 7} for number in range(10)]
    with pytest.raises(DataError, match="no row for validation: rows of the same 'at' lie on one side, and up to 10 of 10"):
        split_of(tmp_path, rows, validation_fraction=0.2, split={"time": "at"})


# --- As a config asks for it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"fold": {"index": 5, "of": 5}}, "index must be from 0 to 4"),
        ({"fold": {"index": 0, "of": 1}}, "must be an integer >= 2"),
        ({"fold": {"index": 0, "of": 5}, "validation_fraction": 0.1}, "and so does data.validation_fraction"),
        ({"fold": {"index": 0, "of": 5}, "validation": "a.jsonl"}, "and so does data.validation"),
        ({"fold": {"index": 0, "of": 5}, "split": {"time": "at"}}, "folds are not of times"),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, "must leave rows to train on"),
        ({"test_fraction": 1.0}, "must leave rows to train on"),
        ({"test": "a.jsonl", "test_fraction": 0.1}, "data.test or data.test_fraction, not both"),
        ({"validation_fraction": 0.1, "split": {"time": "at", "group": "user"}}, "time and group do not go together"),
        ({"split": {"group": "user"}}, "no training row is held out"),
    ],
)
def test_what_cannot_be_divided_so_is_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_from({"model": {"base": "demo"}, "data": {"train": "demo:train"} | data})


@pytest.mark.parametrize("section", ["checkpoint", "training.early_stopping", "sweep"])
def test_the_test_decides_nothing(section: str) -> None:
    asked: dict[str, Any] = {"model": {"base": "demo"}, "data": {"validation_fraction": 0.1, "test_fraction": 0.1}}
    asked |= {"sweep": {"space": {"training.seed": [1, 2]}}} if section == "sweep" else {}
    with pytest.raises(UserError, match=r"test/loss.*(decides nothing|trials are compared by)"):
        config_from(asked, [f"{section}.metric=test/loss"])


def test_a_suite_is_not_called_as_the_test_is() -> None:
    config = config_from(
        {
            "model": {"base": "demo"},
            "data": {"test_fraction": 0.1},
            "evaluation": {"suites": [{"rows": "demo:test"}], "while_training": {}},
        }
    )
    with pytest.raises(PlanError, match=r"evaluation\.suites\.0 is called 'test'"):
        check_test(config)


def config(folder: Path, **data: Any) -> Any:
    rows = [{"prompt": f"say {n}", "completion": str(n), "created": f"2026-01-{n % 28 + 1:02d}"} for n in range(60)]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(path), "format": "prompt_completion"}
    return config_from(
        {
            "storage": str(folder / "runs"),
            "model": {"base": "demo"},
            "training": {"max_steps": 2},
            "data": {"train": source, "packing": "none", "max_length": 64} | data,
        }
    )


def test_a_plan_says_what_is_held_out_and_a_test_of_other_rows_is_no_part_of_a_run(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"validation_fraction": 0.2, "test_fraction": 0.2, "split": {"time": "created"}}
    plan = plan_run(config(tmp_path, **asked))
    report = plan.data_report
    assert report is not None
    assert report.split == [
        "validation by 'created': 12 of 60 rows, from 2026-01-17 to 2026-01-22",
        "test by 'created': 12 of 60 rows, from 2026-01-23 to 2026-01-28",
    ]
    (train,), (tested,) = report.train.sources, report.test["test"].sources
    assert train.used + train.other_side + train.test_side == train.rows == 60
    assert tested.used == train.test_side == plan.data.test[0].num_rows
    without = plan_run(config(tmp_path, validation_fraction=0.2, split={"time": "created"}))
    assert "data.train" in differences(identity_of(plan), identity_of(without)), "the test takes from the training rows"
    named = [
        plan_run(config(tmp_path, test=f"demo:{name}", validation_fraction=0.2, max_length=256))
        for name in ("test", "validation")
    ]
    assert not differences(identity_of(named[0]), identity_of(named[1]))
    assert named[0].data.test != named[1].data.test


def test_each_source_is_tested_by_itself(tmp_path: Path) -> None:
    asked = config(tmp_path, validation_fraction=0.2, test_fraction=0.2)
    more = tmp_path / "more.jsonl"
    more.write_text("".join(json.dumps({"prompt": f"more {n}", "completion": "x"}) + "\n" for n in range(40)))
    sources = [*asked.data.train, {"path": str(more), "loss_weight": 0.5}]
    plan = plan_run(config(tmp_path, train=sources, validation_fraction=0.2, test_fraction=0.2))
    assert [(store.name, store.weight) for store in plan.data.test] == [("rows", 1.0), ("more", 0.5)]
    assert plan.data_report is not None
    for number, name in enumerate(("rows", "more")):
        assert plan.data_report.test[name].total("used") == plan.data_report.train.sources[number].test_side > 0


@pytest.mark.parametrize("by", ["time", "strata", "group"])
def test_a_check_needs_the_columns_that_decide(by: str, tmp_path: Path) -> None:
    asked = config(tmp_path, validation_fraction=0.2, split={by: "created"})
    assert check_run(asked).errors == []
    (error,) = check_run(config(tmp_path, validation_fraction=0.2, split={by: "made"})).errors
    assert f"rows.jsonl:1: has no 'made', only 'prompt', 'completion', 'created' (data.split.{by})" in str(error)


def test_a_file_that_is_measured_and_trained_or_trained_twice_is_told_by_check_and_plan(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    for name in ("a.jsonl", "held.jsonl"):
        (folder / name).write_text('{"prompt": "Q", "completion": "A"}\n')
    held_out = f"{folder}/../parts/held.jsonl"
    told = f"{held_out} of data.validation is trained too, so that its loss is none of held-out rows"
    again = f"{folder}/a.jsonl is read by more than one source of data.train, each of which has its rows in an epoch"
    for train, said in (
        (f"{folder}/*.jsonl", [told]),
        (f"{folder}/a.jsonl", []),
        ([f"{folder}/*.jsonl", f"{folder}/a.jsonl"], [again, told]),
    ):
        asked = config(tmp_path, train=train, validation=held_out)
        assert check_run(asked).losses == said
        report = plan_run(asked).data_report
        assert report is not None
        assert report.split == said


def test_a_folder_whose_files_say_that_they_are_a_tests_is_trained_with_a_word(tmp_path: Path) -> None:
    folder = tmp_path / "rows-2026"
    folder.mkdir()
    for name in ("gsm8k-test-0.jsonl", "gsm8k_test_1.jsonl"):
        (folder / name).write_text('{"prompt": "Q", "completion": "A"}\n')
    told = (
        f"{folder} of data.train has files of the split test alone, by their names, and they are trained (split: test beside "
        "its path says that this is meant)"
    )
    for train, said in ((str(folder), [told]), ({"path": str(folder), "split": "test"}, []), (f"{folder}/gsm8k*.jsonl", [])):
        assert check_run(config(tmp_path, train=train)).losses == said
    folder = folder.rename(tmp_path / "test")
    assert check_run(config(tmp_path, train=str(folder))).losses == []


def test_trials_of_a_sweep_are_not_measured_on_the_test(tmp_path: Path) -> None:
    asked = config(tmp_path, validation_fraction=0.2, test_fraction=0.2)
    sweep = config_from(asked, ["sweep.space={training.seed: [1, 2]}"])
    plans = plan_of_sweep(sweep).plans
    assert plans
    assert all(plan.data.test == [] for plan in plans)
    (train,) = {plan.data.train.num_targets for plan in plans}
    assert train == plan_run(asked).data.train.num_targets, "its rows are held out all the same"


def test_a_split_by_hash_needs_no_look_at_the_rows() -> None:
    with pytest.raises(AssertionError, match="borders"):
        split_by_hash(asked_split(DataSection(validation_fraction=0.1, split=SplitSection(strata="label"))))


# --- Folds together ----------------------------------------------------------------------------------------------------------


def test_a_fold_is_a_run_in_the_folder_of_all_with_the_stores_of_other_runs(tmp_path: Path) -> None:
    asked = config_from({"name": "all", "storage": str(tmp_path), "model": {"base": "demo"}}, overrides_of(5))
    one = config_of_fold(asked, 3)
    assert (one.storage, one.name) == (f"{tmp_path}/all", "fold-3")
    assert one.data.store == f"{tmp_path}/stores"
    assert (one.data.fold, asked.data.fold) == (FoldSection(index=3, of=5), FoldSection(index=0, of=5))


@pytest.mark.parametrize("file", ["run.json", "sweep.json"])
def test_folds_do_not_go_into_the_folder_of_a_run_or_a_sweep(file: str, tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / file).write_text("{}")
    asked = config_from({"name": "all", "storage": str(tmp_path), "model": {"base": "demo"}}, overrides_of(5))
    with pytest.raises(UserError, match=f"holds a {file.removesuffix('.json')}"):
        train_folds(asked)


def test_the_spread_of_folds_is_that_of_a_sample() -> None:
    spread = Spread(values=(1.0, 2.0, 4.0))
    assert (spread.mean, spread.deviation) == (7 / 3, pytest.approx(statistics.stdev([1, 2, 4]), rel=1e-15))
    assert spread.to_json()["values"] == [1.0, 2.0, 4.0]
    assert math.isnan(Spread(values=(1.0, math.nan)).deviation)
