"""Duplicates, leaks, copies of benchmarks and contradictions are found, told by line, and left out where that is asked for."""

import json
import multiprocessing
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, get_args

import pytest

from raytune.config.load import config_from
from raytune.config.problems import ConfigError
from raytune.config.sections.data import DataSource, QualitySection
from raytune.config.sections.quality import FINDINGS, Policy, QualityPolicies
from raytune.data.files import sources
from raytune.data.quality.quality import ParallelMap
from raytune.data.store.build import build_store
from raytune.data.store.same_rows import have_same_rows
from raytune.data.store.store import Store, StoreInfo
from raytune.errors import DataError
from raytune.launch.planning import plan_run
from raytune.model.demo import demo_base_path
from raytune.plan.data.data_report import losses_text
from raytune.plan.describe import plan_text
from tests.tiny import tiny_request, tiny_split, tiny_store
from tests.unit.test_data_report import CHATML, OUTCOMES

_draw = random.Random(5)
WORDS = [f"word{number}" for number in range(200)]


def text(num_words: int) -> str:
    return " ".join(_draw.choices(WORDS, k=num_words))


def chat(*turns: str, system: str | None = None, **columns: Any) -> dict[str, Any]:
    messages = [{"role": ("user", "assistant")[place % 2], "content": turn} for place, turn in enumerate(turns)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + messages, **columns}


def write(path: Path, rows: Iterable[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def turns(row: dict[str, Any]) -> list[str]:
    return [message["content"] for message in row["messages"]]


NEW = [chat(text(30), text(20), text(10), text(15)) for _ in range(12)]
EQUAL = NEW[0] | {"id": 7}
QUESTION, ANSWER, NEXT, LAST = turns(NEW[1])
NEAR = chat(QUESTION.upper(), f"  {ANSWER}!", NEXT.replace(" ", "\n"), LAST)
OTHER_ANSWER = chat(*turns(NEW[2])[:3], text(15))
DAMAGED = chat(text(30), "caf\ufffd")
ROWS = [*NEW, EQUAL, NEAR, OTHER_ANSWER, DAMAGED]
"""Line 13 is equal to line 1, line 14 nearly so to line 2, line 15 contradicts line 3, and line 16 is damaged."""
HELD_OUT = [chat(text(5), "unlike all"), NEW[3], chat(*turns(NEW[4])[:3], "another"), chat(*map(str.title, turns(NEW[5])))]
"""Lines 2 to 4 leak into lines 4 to 6 of the rows."""
BENCHMARK = [{"question": text(12)}, {"question": f"Asked: {turns(NEW[6])[0]}"}]
"""Line 2 is in line 7 of the rows; line 1 is too short to be found."""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    write(tmp_path / "rows.jsonl", ROWS)
    write(tmp_path / "held_out.jsonl", HELD_OUT)
    write(tmp_path / "benchmark.jsonl", BENCHMARK)
    return tmp_path


def quality_of(files: Path, **policies: Any) -> QualitySection:
    benchmark = DataSource(path=str(files / "benchmark.jsonl"), columns={"text": "question"})
    fields: dict[str, Any] = {"benchmarks": [benchmark]} | policies
    return QualitySection(**fields)


def build(files: Path, quality: QualitySection | None, **changes: Any) -> StoreInfo:
    held_out = (DataSource(path=str(files / "held_out.jsonl")),) if quality else ()
    fields = {"template": CHATML, "quality": quality, "held_out": held_out, "max_length": 2048} | changes
    return tiny_store(files / "stores", str(files / "rows.jsonl"), max_rows=None, **fields)


def lines_of(info: StoreInfo) -> list[int]:
    """Lines of the rows that are in a store."""
    store = Store.open(info.path)
    return sorted(line for row in range(store.num_rows) for _, line in store.sources(row))


FOUND = {"damaged_text": 1, "exact_duplicates": 1, "near_duplicates": 1, "leaks": 3, "contradictions": 2, "benchmark_overlaps": 1}
LEFT_OUT = {
    "damaged_text": [16],
    "exact_duplicates": [13],
    "near_duplicates": [14],
    "leaks": [4, 5, 6],
    "contradictions": [3, 15],
    "benchmark_overlaps": [7],
}


def test_each_finding_is_counted_with_the_place_of_both_rows_and_nothing_is_changed(files: Path) -> None:
    info = build(files, quality_of(files))
    (source,) = info.report.sources
    rows, held_out, benchmark = (files / f"{name}.jsonl" for name in ("rows", "held_out", "benchmark"))
    assert {name: getattr(source, name) for name in FINDINGS} == FOUND
    assert {name: source.examples[name] for name in FINDINGS} == {
        "damaged_text": [f"{rows}:16: has U+FFFD"],
        "exact_duplicates": [f"{rows}:13: equal to {rows}:1"],
        "near_duplicates": [f"{rows}:14: 100% like {rows}:2"],
        "leaks": [
            f"{rows}:4: equal to {held_out}:2",
            f"{rows}:5: the turns before its last answer are those of {held_out}:3",
            f"{rows}:6: 100% like {held_out}:4",
        ],
        "contradictions": [
            f"{rows}:3: another answer to the turns of {rows}:15",
            f"{rows}:15: another answer to the turns of {rows}:3",
        ],
        "benchmark_overlaps": [f"{rows}:7: 18 of its 29 passages of 13 words are in {benchmark}:2"],
    }
    assert info.report.notes == [
        "training rows were compared with 2 rows of benchmarks (data.quality.benchmarks); 1 of them has no turn of 13 words, "
        "and cannot be found"
    ]
    assert (source.used, source.filtered) == (len(ROWS), 0)
    assert have_same_rows(Path(info.path), Path(build(files, None).path))


@pytest.mark.parametrize("name", FINDINGS)
def test_a_policy_leaves_out_what_it_names_and_nothing_else(name: str, files: Path) -> None:
    info = build(files, quality_of(files, **{name: "drop"}))
    (source,) = info.report.sources
    assert lines_of(info) == [line for line in range(1, len(ROWS) + 1) if line not in LEFT_OUT[name]]
    assert source.filtered == len(LEFT_OUT[name])
    assert source.rows == sum(getattr(source, outcome) for outcome in OUTCOMES)


def test_all_policies_together_leave_out_each_row_once(files: Path) -> None:
    info = build(files, quality_of(files, **dict.fromkeys(FINDINGS, "drop")))
    assert lines_of(info) == [line for line in range(1, len(ROWS) + 1) if all(line not in lines for lines in LEFT_OUT.values())]


@pytest.mark.parametrize("name", FINDINGS)
def test_what_is_not_looked_for_is_neither_counted_nor_said(name: str, files: Path) -> None:
    benchmarks = {"benchmarks": []} if name == "benchmark_overlaps" else {}
    (source,) = build(files, quality_of(files, **benchmarks, **{name: "ignore"})).report.sources
    assert {other: getattr(source, other) for other in FINDINGS} == FOUND | {name: 0}
    assert name not in source.policies


@pytest.mark.parametrize("name", FINDINGS)
def test_a_finding_that_is_an_error_stops_before_anything_is_tokenised(name: str, files: Path) -> None:
    with pytest.raises(DataError) as caught:
        build(files, quality_of(files, **{name: "error"}), tokenizer_fingerprint="that no process has")
    first, *examples, fix = str(caught.value).splitlines()
    assert first.endswith(f"among the {name.replace('_', ' ')} (data.quality.{name}: error):")
    assert [int(line.split(":")[1]) for line in examples] == LEFT_OUT[name] if name != "contradictions" else [3, 15]
    assert f"set data.quality.{name} to drop or keep" in fix
    assert caught.value.keys == (f"data.quality.{name}",)


def test_every_policy_has_a_count() -> None:
    policies = {name for name, field in QualityPolicies.model_fields.items() if field.annotation == Policy}
    assert policies == set(FINDINGS) == set(FOUND)
    assert set(get_args(Policy)) == {"keep", "drop", "error", "ignore"}


# --- What is alike -------------------------------------------------------------------------------------------------------------


def near(folder: Path, *rows: dict[str, Any], **policies: Any) -> list[int]:
    """Lines of near duplicates."""
    path = write(folder / "few.jsonl", rows)
    info = tiny_store(
        folder / "stores",
        path,
        max_rows=None,
        template=CHATML,
        max_length=4096,
        quality=QualitySection(near_duplicates="drop", **policies),
    )
    return [line for line in range(1, len(rows) + 1) if line not in lines_of(info)]


def test_rows_that_share_what_is_not_theirs_are_no_duplicates(tmp_path: Path) -> None:
    long, short = text(200), text(12)
    assert near(tmp_path, chat(short, "yes", system=long), chat(text(12), "yes", system=long)) == [], "a system prompt"
    passage = [chat(f"{long} {text(6)}?", text(4)) for _ in range(2)]
    assert near(tmp_path, *passage) == [], "questions about one passage"
    assert near(tmp_path, chat("What is 5 - 3?", "2"), chat("What is 5 + 3?", "8")) == [], "sums"
    assert near(tmp_path, chat(long, "positive"), chat(long, "negative")) == [], "that is a contradiction"
    assert near(tmp_path, chat("...", "?!"), chat("!!", "--")) == [], "rows without words"


def test_rows_that_differ_in_writing_are_duplicates_and_how_alike_they_must_be_is_asked_for(tmp_path: Path) -> None:
    words = text(100).split()
    changed = [*words[:50], "other", *words[51:]]  # 5 of 101 runs on either side: 96 of 106
    rows = [chat(" ".join(one), "the same answer") for one in (words, changed)]
    assert near(tmp_path, *rows) == [2]
    assert near(tmp_path, *rows, near_similarity=0.98) == []
    assert near(tmp_path, chat("東京は日本の首都です。", "はい"), chat("東京は、日本の首都です", "はい。")) == [2]
    texts = [{"text": text(40)}, {"text": text(40)}]
    path = write(tmp_path / "texts.jsonl", [*texts, {"text": texts[1]["text"] + "!"}])
    info = tiny_store(tmp_path / "stores", path, max_rows=None, quality=QualitySection(near_duplicates="drop"))
    assert lines_of(info) == [1, 2]


def test_an_equal_row_of_a_near_duplicate_goes_with_it_and_the_first_of_all_stays(tmp_path: Path) -> None:
    row = chat(text(30), text(20))
    again = chat(*(turn.upper() for turn in turns(row)))
    assert near(tmp_path, row, again, again, row, exact_duplicates="keep") == [2, 3]


def test_near_duplicates_are_those_of_comparing_the_words_of_all_rows(tmp_path: Path) -> None:
    """Far from the limit, where an estimate does not decide."""
    draw = random.Random(1)
    new = [draw.choices(WORDS, k=120) for _ in range(30)]
    rows = [*new, *(list(draw.choice(new)) for _ in range(50))]
    for row in rows[30:]:
        for _ in range(draw.choice([0, 1, 14])):
            row[draw.randrange(120)] = f"new{draw.random()}"
    draw.shuffle(rows)
    runs = [{tuple(row[start : start + 5]) for start in range(len(row) - 4)} for row in rows]
    shares = [[len(one & other) / len(one | other) for other in runs] for one in runs]
    kept: list[int] = []
    for number in range(len(rows)):
        kept += [] if any(shares[number][other] >= 0.7 for other in kept) else [number]
    assert all(share > 0.82 or share < 0.58 for row in shares for share in row), "3 standard deviations"
    found = near(tmp_path, *(chat("Go on.", " ".join(row)) for row in rows), exact_duplicates="drop", near_similarity=0.7)
    equal = [number for number in range(len(rows)) if rows[number] in rows[:number]]
    assert found == [number + 1 for number in range(len(rows)) if number not in kept]
    assert len(equal) < len(found) < 60


@pytest.mark.parametrize(("damage", "name"), [("\ufffd", "FFFD"), ("\0", "0000"), ("\x92", "0092")])
def test_characters_that_stand_for_lost_text_are_found_in_each_turn(damage: str, name: str, tmp_path: Path) -> None:
    rows = [chat("one", f"two{damage}"), chat("fine \x85", "fine"), chat("three", "four", system=f"five {damage}")]
    path = write(tmp_path / "few.jsonl", rows)
    (source,) = tiny_store(tmp_path, path, max_rows=None, template=CHATML, quality=QualitySection()).report.sources
    assert source.examples["damaged_text"] == [f"{path}:1: has U+{name}", f"{path}:3: has U+{name}"]


def test_of_several_sources_the_later_one_has_the_duplicates(files: Path) -> None:
    other = write(files / "other.jsonl", [chat("hello", "there"), NEW[9], NEW[9]])
    quality = QualitySection(exact_duplicates="drop")
    two = tuple(DataSource(path=path) for path in (str(files / "rows.jsonl"), other))
    first, second = build(files, quality, sources=two).report.sources
    assert (first.exact_duplicates, first.filtered, second.exact_duplicates, second.filtered) == (1, 1, 2, 2)
    assert second.examples["exact_duplicates"][0] == f"{other}:2: equal to {files / 'rows.jsonl'}:10"


def test_both_sides_of_a_split_are_compared(tmp_path: Path) -> None:
    """Equal rows share a side; those that differ in a column that is not read do not."""
    rows = [row | {"id": number} for row in NEW for number in range(4)]
    path = write(tmp_path / "rows.jsonl", rows)
    split: dict[str, Any] = {
        "template": CHATML,
        "side": "train",
        "split": tiny_split(validation_fraction=0.3),
        "max_length": 2048,
    }
    leaking = tiny_store(tmp_path / "stores", path, max_rows=None, quality=QualitySection(), **split)
    assert leaking.report.total("leaks") > 5
    clean = tiny_store(tmp_path / "stores", path, max_rows=None, quality=QualitySection(leaks="drop"), **split)
    held_out = tiny_store(tmp_path / "stores", path, max_rows=None, **(split | {"side": "validation"}))
    read = [{turns(rows[line - 1])[0] for line in lines_of(info)} for info in (clean, held_out)]
    assert not read[0] & read[1]
    assert clean.report.total("filtered") == leaking.report.total("leaks")


# --- Benchmarks ----------------------------------------------------------------------------------------------------------------


def overlaps(folder: Path, benchmark: Sequence[dict[str, Any]], *rows: dict[str, Any], **policies: Any) -> StoreInfo:
    name, ending = ("benchmark", "jsonl")
    source = DataSource(path=write(folder / f"{name}.{ending}", benchmark), **policies.pop("source", {}))
    quality = QualitySection(benchmarks=[source], **policies)
    return tiny_store(
        folder / "stores", write(folder / "few.jsonl", rows), max_rows=None, template=CHATML, max_length=4096, quality=quality
    )


def test_a_passage_is_found_wherever_it_stands_and_whatever_its_case(tmp_path: Path) -> None:
    passage = text(13)
    rows = [chat(text(20), f"{text(9)} {passage.upper().replace(' ', ', ')}."), chat(text(20), passage.rsplit(" ", 1)[0])]
    report = overlaps(tmp_path, [chat(f"{text(4)} {passage}", "a")], *rows).report
    assert report.total("benchmark_overlaps") == 1
    assert report.sources[0].examples["benchmark_overlaps"] == [
        f"{tmp_path / 'few.jsonl'}:1: 1 of its 18 passages of 13 words are in {tmp_path / 'benchmark.jsonl'}:1"
    ]
    assert overlaps(tmp_path, [chat(passage, "a")], *rows, ngram_words=12).report.total("benchmark_overlaps") == 2


def test_how_a_benchmark_asks_is_no_passage_of_it_and_answers_may_be_missing(tmp_path: Path) -> None:
    wording = text(20)
    row = chat(f"{wording} {text(5)}", "x")
    asked = [{"messages": [{"role": "user", "content": f"{wording} {number}"}]} for number in range(11)]
    assert overlaps(tmp_path, asked, row).report.total("benchmark_overlaps") == 0
    assert overlaps(tmp_path, asked[:10], row).report.total("benchmark_overlaps") == 1


def test_rows_of_choices_are_a_benchmark_by_their_question(tmp_path: Path) -> None:
    question = text(20)
    rows = [{"question": question, "choices": ["a", "b"], "answer": 1}]
    report = overlaps(tmp_path, rows, chat(question, "a"), source={"columns": {"text": "question"}}).report
    assert report.total("benchmark_overlaps") == 1


# --- Where it is told, and stored ----------------------------------------------------------------------------------------------


def backwards(function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterable[Any]:
    return [function(task) for task in reversed(tasks)][::-1]


def in_processes(function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterable[Any]:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(function, tasks))


@pytest.mark.parametrize("parallel_map", [backwards, pytest.param(in_processes, marks=pytest.mark.slow)])
def test_findings_do_not_depend_on_how_the_rows_were_divided_or_by_whom_they_were_read(
    parallel_map: ParallelMap, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policies = quality_of(files, near_duplicates="drop", leaks="drop")
    whole = build(files, policies)
    monkeypatch.setattr(sources, "SEGMENT_BYTES", 600)
    request = tiny_request(
        str(files / "rows.jsonl"),
        max_rows=None,
        template=CHATML,
        max_length=2048,
        quality=policies,
        held_out=(DataSource(path=str(files / "held_out.jsonl")),),
    )
    divided = build_store(request, tokenizer_path=str(demo_base_path()), folder=files / "again", parallel_map=parallel_map)
    assert have_same_rows(Path(divided.path), Path(whole.path))
    assert divided.report == whole.report


@pytest.mark.parametrize(
    "change",
    [*({name: "drop"} for name in FINDINGS), {"near_similarity": 0.9}, {"ngram_words": 8}, {"benchmarks": []}],
    ids=lambda change: next(iter(change)),
)
def test_whatever_decides_what_is_left_out_is_of_the_address(change: dict[str, Any], files: Path) -> None:
    def address(quality: QualitySection | None, compared: Any = ()) -> str:
        return tiny_request(quality=quality).address([["f"]], ["truncate"], compared)

    assert address(quality_of(files)) == address(quality_of(files))
    assert len({address(None), address(quality_of(files)), address(quality_of(files, **change))}) == 3
    assert address(quality_of(files), [[["a"]], []]) != address(quality_of(files), [[["b"]], []])


def config(files: Path, **data: Any) -> dict[str, Any]:
    return {
        "name": "told",
        "storage": str(files),
        "data": {"train": str(files / "rows.jsonl"), "template": "chatml"} | data,
        "adapter": {"method": "lora", "rank": 4},
        "training": {"max_steps": 1, "global_batch_size": 1},
        "cluster": {"workers": 1},
    }


def test_a_plan_tells_what_was_found_and_what_was_not(files: Path) -> None:
    asked = config(files, validation=str(files / "held_out.jsonl"), quality={"leaks": "drop"})
    plan = plan_run(config_from(asked))
    assert plan.data_report is not None
    said = plan_text(plan)
    rows, held_out = files / "rows.jsonl", files / "held_out.jsonl"
    assert "16 read as messages, 13 used: 3 rows left out by data.quality, 3 rows held out for validation too;" in said
    told = [line.removeprefix("training (rows): ") for line in losses_text(plan.data_report) if line.startswith("training")]
    assert told == [
        f"3 rows of 16 rows that are held out for validation too, whose loss is then too low (data.quality.leaks: drop); the "
        f"first is {rows}:4: equal to {held_out}:2",
        f"1 row of 16 rows with text that was damaged where it was decoded (data.quality.damaged_text: keep); the first is "
        f"{rows}:16: has U+FFFD",
        f"2 rows of 16 rows with the turns of another row but another last answer (data.quality.contradictions: keep); the first "
        f"is {rows}:3: another answer to the turns of {rows}:15",
        f"1 row of 16 rows equal to an earlier one (data.quality.exact_duplicates: keep); the first is {rows}:13: equal to "
        f"{rows}:1",
        f"1 row of 16 rows nearly equal to an earlier one (data.quality.near_duplicates: keep); the first is {rows}:14: 100% "
        f"like {rows}:2",
        "3 rows of 16 rows left out by data.quality",
        "rows by script: Latin 100.0%; by words of an answer or text: 15 in the middle, 15 at most",
        "columns that the format messages does not read: 'id' (1 row)",
    ]


def test_the_balance_of_classes_and_scripts_is_told(tmp_path: Path) -> None:
    rows = [{"sentence": text(8), "label": "good"} for _ in range(9)] + [{"sentence": "Привет всем", "label": "bad"}]
    info = tiny_store(tmp_path, write(tmp_path / "a.jsonl", rows), max_rows=None, template=CHATML, quality=QualitySection())
    balance = info.report.sources[0].balance
    assert balance is not None
    assert (balance.labels, balance.scripts) == ({"good": 9, "bad": 1}, {"Latin": 9, "Cyrillic": 1})
    assert (balance.median_words, balance.most_words) == (1, 1)


def test_if_all_rows_are_left_out_that_is_the_reason_given(files: Path) -> None:
    write(files / "rows.jsonl", HELD_OUT)
    with pytest.raises(DataError, match=r"(?s)can be trained on. Of 4 rows\n  4 are left out by data.quality"):
        build(files, QualitySection(leaks="drop"))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "leaks without held-out rows": ({"leaks": "drop"}, "nothing is evaluated"),
    "overlaps without benchmarks": ({"benchmark_overlaps": "error"}, "data.quality.benchmarks names no rows"),
    "words without benchmarks": ({"ngram_words": 8}, "data.quality.benchmarks names no rows"),
    "benchmarks that are ignored": (
        {"benchmarks": "demo:test", "benchmark_overlaps": "ignore"},
        "so that nothing reads the benchmarks",
    ),
    "similarity of nothing": (
        {"near_similarity": 0.9, "near_duplicates": "ignore", "leaks": "ignore"},
        "looks neither for near duplicates nor for leaks",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_key_that_nothing_reads_is_refused(case: str) -> None:
    quality, reason = REFUSED[case]
    with pytest.raises(ConfigError, match=reason):
        config_from({"data": {"quality": quality}})


def test_without_the_package_the_extra_is_named(files: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules['rensa'] = None\n"
        "from raytune.data.quality.signatures import signatures_of\n"
        "from raytune.missing import missing_package\n"
        "import numpy as np\n"
        "try:\n    signatures_of([np.ones(1, np.uint64)], 8)\n"
        "except ModuleNotFoundError as error:\n    print(missing_package(error))\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "The package rensa is missing" in said
    assert "[quality]" in said
