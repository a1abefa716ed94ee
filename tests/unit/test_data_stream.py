"""A stream has every row of its files once per pass, in an order that files, window and seed decide, from whatever place on."""

import bz2
import csv
import gzip
import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from raytune.config.load import config_from
from raytune.config.sections.augment import AugmentSection
from raytune.config.sections.data import TokenWeightsSection, TrainSource
from raytune.config.sections.data_limits import LimitsSection
from raytune.data.conversations.shaping import Shape
from raytune.data.formats.augmenting import augmentation_of
from raytune.data.formats.origins import MADE_BY, ORIGIN, content_of
from raytune.data.store.store import Store
from raytune.data.stream.recipe import Recipe, with_files
from raytune.data.stream.stream import Position, Stream, windows_from
from raytune.errors import DataError, PlanError
from raytune.launch.data.data_check import check_data
from raytune.launch.data.data_preview import preview_data
from raytune.launch.data.first_window import first_window
from raytune.model.demo import demo_base_path
from raytune.plan.costs.memory import STREAM_BYTES, STREAMED_TOKEN_BYTES
from raytune.plan.data.augmenting import code_of
from raytune.plan.data.streaming import StreamedSource, StreamPlan, check_streaming
from raytune.units import MIB
from tests.tiny import tiny_request, tiny_rows, tiny_store, tiny_tokenizer

SEED, BATCH = 3, 4
ROOT = Path(__file__).parents[2]


def recipe(path: object, window: int, **changes: Any) -> Recipe:
    request = tiny_request()
    fields: dict[str, Any] = {
        "sources": source(str(path)),
        "read_ahead_mib": 64,
        "system": None,
        "system_when": "missing",
        "max_turns": None,
        "reasoning": "keep",
        "targets": "assistant",
        "train_empty_thought": True,
        "token_weights": TokenWeightsSection(),
        "augment": AugmentSection(),
        "augment_code": None,
        "too_long": "auto",
        "packing": "best_fit",
        "num_virtual": 0,
        "on_bad_row": "error",
        "on_prompt_mismatch": "error",
        "limits": LimitsSection(),
        "tokenizer_fingerprint": request.tokenizer_fingerprint,
    }
    planned = with_files(StreamPlan(**(fields | {"window": window} | changes)))
    return Recipe.of(
        StreamPlan.model_validate_json(planned.model_dump_json()),
        template=request.template,
        row_length=512,
        tokenizer_path=str(demo_base_path()),
        tokenizer_revision=None,
        trust_remote_code=False,
        new_tokens=(),
        seed=SEED,
    )


def source(path: str, **fields: Any) -> list[StreamedSource]:
    return [StreamedSource(source=TrainSource(path=path, **fields))]


def write_chats(path: Path, num_rows: int = 150, seed: int = 0) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(num_rows, seed)))
    return path


def steps(stream: Stream, first: int, last: int) -> list[list[list[int]]]:
    """Tokens of the rows of steps."""
    found = []
    for step in range(first, last):
        rows = stream.rows_at(np.arange(step * BATCH, (step + 1) * BATCH), SEED)
        found.append([stream.row(int(row)).input_ids.tolist() for row in rows])
    return found


def assert_same_rows(stream: Stream, store: Store) -> None:
    """In the order of three epochs."""
    for positions in np.array_split(np.arange(3 * store.num_rows), 20):
        own, theirs = stream.rows_at(positions, SEED), store.rows_at(positions, SEED)
        assert stream.targets_of(own).tolist() == store.targets_of(theirs).tolist()
        for one, other in zip(own.tolist(), theirs.tolist()):
            assert np.array_equal(stream.row(one).input_ids, store.row(other).input_ids)
            assert np.array_equal(stream.row(one).is_target, store.row(other).is_target)
    stream.close()


@pytest.mark.parametrize("packing", ["best_fit", "none"])
@pytest.mark.parametrize("window", [150, 1000])
def test_a_window_of_all_rows_is_a_store_in_each_of_its_epochs(window: int, packing: Any, tmp_path: Path) -> None:
    path = write_chats(tmp_path / "a.jsonl")
    store = Store.open(tiny_store(tmp_path / "stores", str(path), max_rows=None, packing=packing).path)
    assert_same_rows(Stream(recipe(path, window, packing=packing)), store)


def test_what_is_made_of_chats_before_the_template_sees_them_is_that_of_a_store(tmp_path: Path) -> None:
    path, rows = tmp_path / "a.jsonl", tiny_rows(60)
    chats = [{"messages": one["messages"] + other["messages"]} for one, other in zip(rows[::2], rows[1::2])]
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    options: dict[str, Any] = {"system": "Be brief.", "system_when": "always", "max_turns": 1}
    store = Store.open(tiny_store(tmp_path / "stores", str(path), max_rows=None, shape=Shape(**options)).path)
    as_it_is = tiny_store(tmp_path / "stores", str(path), max_rows=None)
    assert store.num_bytes < as_it_is.num_bytes, "half of the answers are left out"
    assert_same_rows(Stream(recipe(path, 30, **options)), store)


OWN = """
def shouted(row, chance):
    messages = [{**turn, "content": turn["content"].upper()} for turn in row["messages"]]
    return {**row, "messages": messages} if chance.random() < 0.5 else None
"""


@pytest.mark.parametrize("changes", [{"noise": 0.2, "wordings": ["Say: {content}"], "seed": 1}, {"function": "own.py:shouted"}])
def test_what_is_made_of_rows_is_that_of_a_store_whoever_reads(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    section = AugmentSection(copies=2, **changes)
    code, path = code_of(section), write_chats(tmp_path / "a.jsonl", 60)
    info = tiny_store(tmp_path / "stores", str(path), max_rows=None, augmentation=augmentation_of(section, code))
    made = info.report.total("augmented")
    assert made > 20
    Path("own.py").unlink()  # as on another machine
    stream = Stream(recipe(path, 60, augment=section, augment_code=code))
    stream.rows_at(np.arange(1), SEED)
    assert {name: stream.counts[name] for name in ("rows", "augmented", "passes")} == {
        "rows": 60 + made,
        "augmented": made,
        "passes": 0,
    }
    assert_same_rows(Stream(recipe(path, 60, augment=section, augment_code=code)), Store.open(info.path))


TEXTS = [f"document {number} {'x' * (number % 40)}" for number in range(90)]


def as_array(path: Path, texts: list[str]) -> None:
    path.write_text(json.dumps([{"text": text} for text in texts], indent=1))


def as_lines(path: Path, texts: list[str]) -> None:
    path.write_text("\ufeff\n" + "\n\n".join(json.dumps({"text": text}) for text in texts))


def as_csv(path: Path, texts: list[str]) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts)])


def as_arrow(path: Path, texts: list[str]) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.schema([("text", pa.string())])) as writer:
        for start in range(0, len(texts), 7):
            writer.write_batch(pa.record_batch({"text": texts[start : start + 7]}))


def as_dataset(path: Path, texts: list[str]) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(path))


KINDS: dict[str, Callable[[Path, list[str]], object]] = {
    "a.jsonl": as_lines,
    "a.jsonl.gz": lambda path, texts: path.write_bytes(
        gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    ),
    "a.txt": lambda path, texts: path.write_text("\r\n".join(texts)),
    "a.txt.bz2": lambda path, texts: path.write_bytes(bz2.compress("\n".join(texts).encode())),
    "a.json": as_array,
    "a.csv": as_csv,
    "a.parquet": lambda path, texts: pyarrow.parquet.write_table(pa.table({"text": texts}), path, row_group_size=13),
    "a.arrow": as_arrow,
    "saved": as_dataset,
}


@pytest.mark.parametrize("name", KINDS)
def test_every_row_comes_once_per_pass_and_any_window_goes_on_as_the_unbroken_stream(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    KINDS[name](path, TEXTS)
    made = recipe(path, 17, packing="none", sources=source(str(path), format="text"))
    unbroken = list(islice(windows_from(made, Position()), 14))
    tokenizer = tiny_tokenizer()

    def texts(windows: list[Any]) -> list[str]:
        rows = [window.rows.row(row).input_ids for window in windows for row in range(window.rows.num_rows)]
        return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]

    assert Counter(texts(unbroken[:6])) == Counter(TEXTS)
    assert Counter(texts(unbroken[6:12])) == Counter(TEXTS)
    assert texts(unbroken[:6]) != texts(unbroken[6:12]), "each pass has orders of its own"
    assert [unbroken[5].after.counts[0]["rows"], unbroken[11].after.counts[0]["passes"]] == [90, 2]
    for index in (1, 4, 6, 9):
        position = Position.of(json.loads(json.dumps(unbroken[index].position.to_json())))
        again = list(islice(windows_from(made, position), 4))
        assert texts(again) == texts(unbroken[index : index + 4])
        assert [one.position for one in again] == [one.position for one in unbroken[index : index + 4]]
        origin = again[0].rows.origins(0)[0]
        assert origin == unbroken[index].rows.origins(0)[0], "a row has the line that it stands on"


HELD = """
import sys
from dataclasses import replace
import pyarrow as pa
from raytune.config.sections.data import TrainSource
from raytune.data.files.readers import read_segment
from raytune.data.files.source_files import find_files
from raytune.data.files.sources import unread_parts

(file,) = find_files(TrainSource(path=sys.argv[1]), None)
parts = unread_parts(file)
before = pa.total_allocated_bytes()
held = [pa.total_allocated_bytes() - before for _ in read_segment(replace(parts[0], stop=parts[-1].stop))]
print(len(parts), len(held), max(held))
"""


def test_of_a_parquet_file_a_row_group_is_in_memory_and_no_more(tmp_path: Path) -> None:
    path, per_group = tmp_path / "a.parquet", 1 << 18
    chance = np.random.default_rng(0)
    texts = [chance.bytes(1 << 10).hex() for _ in range(20 * per_group // (1 << 11))]
    pyarrow.parquet.write_table(pa.table({"text": texts}), path, row_group_size=per_group >> 11)
    # Arrow counts what the whole process holds, which other tests of this one move.
    printed = subprocess.run([sys.executable, "-c", HELD, str(path)], cwd=ROOT, capture_output=True, text=True, check=True)
    num_groups, num_rows, held = map(int, printed.stdout.split())
    assert (num_groups, num_rows) == (20, len(texts))
    assert held <= 5 * per_group, "as it is in the file, decoded, and in batches; all groups are 20 of them"


def test_windows_reach_over_files_and_the_first_rows_are_all_if_asked(tmp_path: Path) -> None:
    for number, name in enumerate("abc"):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{number} {line}" for line in range(10)))
    made = recipe(tmp_path, 8, packing="none", sources=source(str(tmp_path / "*.txt"), max_rows=26))
    windows = list(islice(windows_from(made, Position()), 5))
    assert [window.rows.num_rows for window in windows] == [8, 8, 8, 2, 8]
    assert sorted(origin.split("/")[-1] for row in range(8) for origin in windows[1].rows.origins(row)) == [
        "a.txt:10", "a.txt:9", *(f"b.txt:{line}" for line in range(1, 7))
    ]  # fmt: skip
    assert windows[4].position.counts[0]["rows"] == 26


def test_a_stream_goes_on_at_any_step_as_if_it_had_not_been_left(tmp_path: Path) -> None:
    made = recipe(write_chats(tmp_path / "a.jsonl"), 40)
    whole, positions = Stream(made), {}
    rows = []
    for step in range(14):
        rows += steps(whole, step, step + 1)
        positions[step + 1] = json.dumps(whole.position_of((step + 1) * BATCH).to_json())
    whole.close()
    for step in range(1, 14):
        stream = Stream(made, Position.of(json.loads(positions[step])))
        assert steps(stream, step, min(step + 3, 14)) == rows[step : step + 3], step
        stream.close()
    from_the_beginning = Stream(made)  # without a position: slower, and the same
    assert steps(from_the_beginning, 12, 14) == rows[12:]
    from_the_beginning.close()


def test_weights_count_in_windows_that_have_some_and_in_those_that_have_none(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(["no digit here"] * 4 + ["12 and 345"] * 4))
    made = recipe(tmp_path / "a.txt", 4, packing="none", token_weights=TokenWeightsSection(numbers=3.0))
    stream = Stream(made)
    rows = stream.rows_at(np.arange(8), SEED)
    weights = stream.weights_of(rows)
    assert weights is not None
    assert weights[:4].tolist() == stream.targets_of(rows)[:4].tolist()
    assert (weights[4:] > stream.targets_of(rows)[4:]).all()
    stream.close()


def test_a_bad_row_stops_with_its_line_when_it_is_reached_or_is_counted(tmp_path: Path) -> None:
    path = write_chats(tmp_path / "a.jsonl", 50)
    path.write_text(path.read_text() + "{torn\n" + json.dumps(tiny_rows(1)[0]) + "\n")
    stream = Stream(recipe(path, 20))
    steps(stream, 0, 1)
    with pytest.raises(DataError, match=r"a\.jsonl:51: not JSON"):
        steps(stream, 1, 20)
    stream.close()
    first_pass = list(islice(windows_from(recipe(path, 20, on_bad_row="skip"), Position()), 3))
    assert {name: first_pass[-1].after.counts[0][name] for name in ("rows", "bad", "documents")} == {
        "rows": 52,
        "bad": 1,
        "documents": 51,
    }


def test_what_ends_a_stream_is_told_though_the_wait_for_it_had_just_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(Queue):
        """Gives up no wait before the thread that was waited for has ended."""

        def get(self, block: bool = True, timeout: float | None = None) -> Any:
            try:
                return super().get(block, timeout)
            except Empty:
                stream._thread.join()
                raise

    monkeypatch.setattr("raytune.data.stream.stream.Queue", Late)
    monkeypatch.setattr("raytune.data.stream.stream._PASS_S", 1e-3)
    path = write_chats(tmp_path / "a.jsonl", 50)
    path.write_text(path.read_text() + "{torn\n")
    stream = Stream(recipe(path, 100))
    with pytest.raises(DataError, match=r"a\.jsonl:51: not JSON"):
        steps(stream, 0, 1)


def test_made_rows_that_were_not_seen_before_the_run_end_it_and_those_that_were_go_on(tmp_path: Path) -> None:
    made = [row | {ORIGIN: content_of(row), MADE_BY: {"model": "m", "row": "a.jsonl:1"}} for row in tiny_rows(40, seed=1)]
    late, early = tmp_path / "late.jsonl", tmp_path / "early.jsonl"
    late.write_text(write_chats(late, 50).read_text() + "".join(json.dumps(row) + "\n" for row in made))
    early.write_text("".join(json.dumps(row) + "\n" for row in made) + write_chats(tmp_path / "a.jsonl", 50).read_text())
    with pytest.raises(DataError, match="none in its first window"):
        list(islice(windows_from(recipe(late, 20), Position()), 4))
    windows = list(islice(windows_from(recipe(early, 20), Position()), 6))
    assert windows[-1].after.counts[0]["made"] > 40, "of a second pass too"


def test_files_without_a_row_to_train_on_are_refused_rather_than_read_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "only a question"}]}) + "\n")
    with pytest.raises(DataError, match="can be trained on: of 1 rows 0 are bad, 1 have no target"):
        next(windows_from(recipe(path, 3), Position()))


def write_unanswered(path: Path, num_rows: int, unanswered: int) -> Path:
    """Good chats with some of the last ones turned into questions alone."""
    rows = [*tiny_rows(num_rows - unanswered), *({"messages": row["messages"][:1]} for row in tiny_rows(unanswered))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_limits_are_held_against_all_that_was_read_so_far(tmp_path: Path) -> None:
    few = recipe(write_unanswered(tmp_path / "few.jsonl", 60, 2), 20)
    assert next(islice(windows_from(few, Position()), 2, None)).reports[0].no_target == 2, "10 % of it, 3 % of all"
    path = write_unanswered(tmp_path / "many.jsonl", 60, 4)
    windows = windows_from(recipe(path, 20), Position())
    second = list(islice(windows, 2))[-1]
    exceeded = r"as far as it was read\): 4 of 60 rows \(6\.67 %\) have no target, more than 5 % .*\n.*many\.jsonl:57"
    with pytest.raises(DataError, match=exceeded):
        next(windows)
    position = Position.of(json.loads(json.dumps(second.after.to_json())))
    with pytest.raises(DataError, match=exceeded):
        next(windows_from(recipe(path, 20), position))
    raised = recipe(path, 20, limits=LimitsSection(no_target=0.07))
    assert next(windows_from(raised, position)).after.counts[0]["no_target"] == 4


def test_what_stops_a_run_does_not_make_another_one_of_it(tmp_path: Path) -> None:
    path = write_chats(tmp_path / "a.jsonl", 40)

    def named(**changes: Any) -> str:
        made = recipe(path, **({"window": 20} | changes))
        return first_window(made).path

    policies: dict[str, Any] = {"on_bad_row": "skip", "on_prompt_mismatch": "accept", "limits": LimitsSection(lost=0.9)}
    assert named() == named(**policies)
    assert named(too_long="drop") == named(too_long="error")
    others: list[dict[str, Any]] = [{"window": 30}, {"max_turns": 1}, {"train_empty_thought": False}]
    others += [{"augment": AugmentSection(copies=1, noise=0.1)}, {"too_long": "drop"}]
    assert len({named(), *(named(**other) for other in others)}) == 1 + len(others)


def test_a_check_says_how_many_of_the_rows_it_looked_at(tmp_path: Path) -> None:
    path = write_unanswered(tmp_path / "a.jsonl", 60, 15)
    data = {"train": str(path), "streaming": {"window": 40}}
    config = config_from(
        {"name": "a", "storage": str(tmp_path), "model": {"base": "demo"}, "data": data, "training": {"max_steps": 5}}
    )
    window, more = check_data(config), check_data(config, max_rows=50)
    assert "Looked at all rows, but at the first 40 only of those that are streamed (--rows looks at more); " in str(window)
    assert not window.is_refused
    assert "Looked at the first 50 rows of each source; 1 limit is exceeded" in str(more)
    with pytest.raises(PlanError, match=r"Leave data\.quality out"):
        check_data(config_from({**config.model_dump(mode="json", exclude_unset=True), "data": {**data, "quality": {}}}))


def test_a_preview_reads_no_further_than_the_rows_that_it_shows(tmp_path: Path) -> None:
    whole = write_chats(tmp_path / "whole.jsonl", 500).read_bytes()
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(whole)[:-100])
    data = {"train": str(cut), "streaming": {"window": 40}}
    config = config_from({"name": "a", "model": {"base": "demo"}, "data": data, "training": {"max_steps": 5}})
    shown = preview_data(config, rows=2).documents
    assert [document.origin.rpartition(":")[2] for document in shown] == ["1", "2"]
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz"):
        preview_data(config_from(config.model_dump(mode="json", exclude_unset=True) | {"data": {"train": str(cut)}}), rows=2)


def test_nobody_reads_on_behind_a_closed_stream(tmp_path: Path) -> None:
    before = threading.active_count()
    stream = Stream(recipe(write_chats(tmp_path / "a.jsonl"), 20))
    steps(stream, 0, 2)
    assert threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before


FULL: dict[str, Any] = {"adapter": {"method": "full"}}
STREAMED: dict[str, Any] = {"train": "rows.jsonl", "streaming": {"window": 100}}
PART: dict[str, Any] = {"path": "a.jsonl", "proportion": 1.0}
BOUNDED = PART | {"max_passes": 2.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {}}, r"how many steps a pass .* Set training\.max_steps, or leave data\.streaming out"),
        (
            {"data": STREAMED | {"train": ["a.jsonl", "b.jsonl"]}},
            r"known at their end\. Give each source a proportion, its",
        ),
        ({"data": STREAMED | {"train": [BOUNDED, PART]}}, r"passes are those of one\. Give each source a proportion"),
        ({"data": STREAMED | {"train": [{"path": "a.jsonl", "passes": 2.0}, "b.jsonl"]}}, "passes are those of one"),
        (
            {"data": STREAMED | {"train": ["a.jsonl", "b.jsonl"], "mixing": {"temperature": 2.0}}},
            r"targets of each source, which are counted at its end\. Give each source a proportion",
        ),
        (
            {"data": STREAMED | {"train": [PART, PART | {"path": "b.jsonl"}], "mixing": {"until": "first_exhausted"}}},
            r"Leave mixing\.until out: proportions are kept all the same",
        ),
        ({"data": STREAMED | {"validation_fraction": 0.1}}, r"Name rows as data\.validation"),
        (
            {"data": STREAMED | {"fold": {"index": 0, "of": 5}}},
            r"rows that data\.fold holds out .* Name rows as data\.validation",
        ),
        ({"data": STREAMED | {"test_fraction": 0.1}}, r"rows that data\.test_fraction holds out .* Name rows as data\.test"),
        ({"data": STREAMED | {"quality": {}}}, r"Leave data\.quality out"),
        ({"strategy": {"replay": {"data": "c.jsonl", "share": 0.1}}}, "Leave replay out"),
        ({"checkpoint": {"every_epochs": 1}}, r"epochs are not counted\. Set checkpoint\.every_steps"),
        (
            {"data": STREAMED | {"validation": "v.jsonl"}, "evaluation": {"every_epochs": 1}},
            r"epochs are not counted\. Set evaluation\.every_steps",
        ),
        (
            {
                "strategy": {"unfreeze": [{"last_layers": 1}, {"from_epoch": 1, "last_layers": "all"}]},
                "adapter": {"method": "full"},
            },
            "Set from_step",
        ),
    ],
)
def test_what_has_to_know_all_rows_first_is_refused_with_what_would_do(changes: dict[str, Any], message: str) -> None:
    config = {"name": "a", "model": {"base": "demo"}, "data": STREAMED, "training": {"max_steps": 5}} | changes
    with pytest.raises(PlanError, match=message):
        check_streaming(config_from(config))


def test_a_hub_that_is_not_to_be_asked_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"owner/name is a data set of a hub, .* but HF_HUB_OFFLINE is set on"):
        recipe("owner/name", 3)


MEASURE = """
import sys
from itertools import islice
import numpy as np
from pathlib import Path
from raytune.data.stream.stream import Stream
from tests.unit.test_data_stream import SEED, recipe

def resident_bytes():
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])

def read_to(window):
    global position
    while not stream._windows or stream._windows[-1].after.window < window:
        stream.rows_at(np.arange(position, position + 16), SEED)
        position += 16

before, position = resident_bytes(), 0
stream = Stream(recipe(sys.argv[1], 500))
read_to(8)
early = resident_bytes()
read_to(24)
print(before, early, resident_bytes(), stream.counts["tokens"] // 24)
stream.close()
"""


@pytest.mark.slow
def test_memory_stays_as_it_is_and_within_what_the_plan_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    row = json.dumps({"text": "some words of a long document " * 20}) + "\n"
    path.write_text(row * 20_000)
    printed = subprocess.run([sys.executable, "-c", MEASURE, str(path)], cwd=ROOT, capture_output=True, text=True, check=True)
    before, early, late, tokens = map(int, printed.stdout.split())
    assert late - before <= STREAM_BYTES + STREAMED_TOKEN_BYTES * tokens
    assert late - early <= 32 * MIB, "what allocators keep comes and goes; 16 windows are 8,000 rows"
