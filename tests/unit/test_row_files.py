"""Documents are packed some at a time and written to files of bounded size, and nothing but memory depends on it."""

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune.data.batches.batches import step_batches
from raytune.data.store import row_file, shard_documents
from raytune.data.store.build import build_store
from raytune.data.store.row_file import write_rows
from raytune.data.store.same_rows import have_same_rows
from raytune.data.store.shard_documents import SourceUse, in_buffers
from raytune.data.store.store import Store, batches_of
from raytune.errors import DataError
from raytune.model.demo import demo_base_path
from tests.synthetic_shards import short_lengths, write_shard
from tests.tiny import PATIENT, tiny_request, tiny_store

ONCE = SourceUse(num_documents=0, num_tokens=0)


@pytest.fixture
def small_buffers() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_documents, "DOCUMENTS_AT_ONCE", 16)
        yield


@PATIENT
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=90),
    cuts=st.lists(st.integers(0, 90), max_size=4),
    per_batch=st.integers(1, 8),
)
def test_buffers_have_all_documents_in_order_however_shards_divide_them(
    lengths: list[int], cuts: list[int], per_batch: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    bounds = [0, *sorted(cut for cut in cuts if cut < len(lengths)), len(lengths)]
    shards = [
        write_shard(folder / f"{index}.arrow", np.array(lengths[first:last], np.int64), first, per_batch=per_batch)
        for index, (first, last) in enumerate(pairwise(bounds))
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_documents, "DOCUMENTS_AT_ONCE", 16)
        buffers = list(in_buffers(shards, [ONCE]))
    assert [len(buffer.lengths) for buffer in buffers[:-1]] == [16] * (len(buffers) - 1)
    assert [length for buffer in buffers for length in buffer.lengths.tolist()] == lengths
    assert [line for buffer in buffers for line in buffer.lines.tolist()] == list(range(len(lengths)))
    first = 0
    for buffer in buffers:
        backwards = np.arange(len(buffer.lengths))[::-1]
        input_ids, is_target = buffer.tokens(backwards)
        expected = [first + line for line in backwards for _ in range(buffer.lengths[line])]
        assert input_ids.tolist() == expected
        assert is_target.sum() == sum(buffer.lengths) - len(buffer.lengths)
        first += len(buffer.lengths)


def test_a_store_of_many_buffers_has_each_document_once(small_buffers: None, tmp_path: Path) -> None:
    one_at_a_time = Store.open(tiny_store(tmp_path / "many", max_rows=100).path)
    assert one_at_a_time.report.total("documents") == 100
    places = [place for row in range(one_at_a_time.num_rows) for place in one_at_a_time.sources(row)]
    assert sorted(line for _, line in places) == list(range(1, 101))
    assert one_at_a_time.num_targets_of_row.sum() == one_at_a_time.info.num_targets


def test_up_to_a_buffer_of_documents_are_packed_as_all_at_once(tmp_path: Path) -> None:
    one = tiny_store(tmp_path / "one", max_rows=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_documents, "DOCUMENTS_AT_ONCE", 60)
        just = tiny_store(tmp_path / "just", max_rows=60)
        patch.setattr(shard_documents, "DOCUMENTS_AT_ONCE", 59)
        over = tiny_store(tmp_path / "over", max_rows=60)
    assert have_same_rows(Path(one.path), Path(just.path))
    assert not have_same_rows(Path(one.path), Path(over.path))


def test_rows_are_the_same_in_one_file_and_in_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Store.open(tiny_store(tmp_path / "one", max_rows=60).path)
    monkeypatch.setattr(row_file, "_TOKENS_PER_FILE", 2000)
    monkeypatch.setattr(row_file, "_TOKENS_PER_RECORD_BATCH", 700)
    info = tiny_store(tmp_path / "many", max_rows=60)
    many = Store.open(info.path)
    files = sorted(path.name for path in Path(info.path).glob("rows-*"))
    assert files[:3] == ["rows-00000.arrow", "rows-00001.arrow", "rows-00002.arrow"]
    sizes = [sum(len(batch.column("input_ids").values) for batch in batches_of(Path(info.path) / file)) for file in files]
    assert all(2000 <= size < 2000 + 700 + 512 for size in sizes[:-1])
    assert have_same_rows(Path(one.info.path), Path(info.path))
    for row in range(one.num_rows):
        assert many.row(row).input_ids.tolist() == one.row(row).input_ids.tolist()
        assert many.row(row).is_target.tolist() == one.row(row).is_target.tolist()
        assert [line for _, line in many.sources(row)] == [line for _, line in one.sources(row)]
    shared = {"step": 1, "rank": 0, "world": 1, "micro_batch_size": 8, "accumulation": 1, "num_rows_in_run": 99, "seed": 0}
    assert step_batches(many, **shared)[0].target_ids.tolist() == step_batches(one, **shared)[0].target_ids.tolist()

    damaged = Path(info.path) / files[1]
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    again = build_store(tiny_request(max_rows=60), tokenizer_path=str(demo_base_path()), folder=tmp_path / "many")
    assert have_same_rows(Path(one.info.path), Path(again.path)), "what is damaged in any file is built again"
    damaged.unlink()
    with pytest.raises(DataError, match="is no complete store"):
        Store.open(info.path)


@pytest.mark.parametrize("packing", ["best_fit", "token_budget"])
def test_buffers_cost_little_of_what_fills_rows(packing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = write_shard(tmp_path / "shard.arrow", short_lengths(20_000, 0), 0)
    fills = []
    for at_once in (20_000, 4000):
        monkeypatch.setattr(shard_documents, "DOCUMENTS_AT_ONCE", at_once)
        folder = tmp_path / str(at_once)
        folder.mkdir()
        written = write_rows(folder, [shard], [ONCE], 2048, packing)  # pyright: ignore[reportArgumentType]
        fills.append(written.epoch.tokens / (written.num_rows * 2048))
    assert fills[1] > fills[0] - 0.01, "a row or two of each buffer"
    assert min(fills) > (0.98 if packing == "best_fit" else 0.9)


@pytest.mark.slow
def test_packing_takes_as_much_memory_for_a_million_documents_as_for_some_ten_thousands(tmp_path: Path) -> None:
    found = {}
    for count in (10_000, 100_000, 1_000_000):
        folder = tmp_path / str(count)
        folder.mkdir()
        for argument in (count, 0):
            command = [sys.executable, "-m", "tests.synthetic_shards", str(argument), str(folder)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[count] = json.loads(output)
    own = {count: one["peak_mib"] - one["peak_before_mib"] for count, one in found.items()}
    # A buffer of 65,536 documents and what is mapped of their shards and rows; all 1,000,000 at once took 410 MiB.
    assert own[1_000_000] < own[100_000] + 30
    assert own[1_000_000] < 150
    assert all(one["fill"] > 0.98 for one in found.values())
    assert found[1_000_000]["documents"] == 1_000_000
