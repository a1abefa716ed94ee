"""Batches hold what the store holds, divided over ranks without a word between them."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from raytune.data.batches.batches import Batch, evaluation_batches, num_evaluation_batches, step_batches
from raytune.data.store.store import Store
from tests.tiny import tiny_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store.open(tiny_store(tmp_path_factory.mktemp("stores"), max_rows=60).path)


def batches_of_step(store: Store, step: int, world: int, micro: int, accumulation: int, num_rows: int) -> list[Batch]:
    return [
        batch
        for rank in range(world)
        for batch in step_batches(
            store,
            step=step,
            rank=rank,
            world=world,
            micro_batch_size=micro,
            accumulation=accumulation,
            num_rows_in_run=num_rows,
            seed=1,
        )
    ]


def test_a_batch_is_its_rows_end_to_end(store: Store) -> None:
    (batch,) = batches_of_step(store, 0, 1, 3, 1, 1000)
    rows = [store.row(row) for row in batch.rows]
    assert batch.input_ids.dtype == batch.position_ids.dtype == batch.target_ids.dtype == batch.target_positions.dtype
    assert batch.input_ids.dtype == torch.int64
    assert batch.cumulative_lengths.dtype == torch.int32
    assert batch.input_ids[0].tolist() == [token for row in rows for token in row.input_ids]
    lengths = [length for row in rows for length in row.document_lengths]
    assert batch.cumulative_lengths.tolist() == [0, *np.cumsum(lengths)]
    assert batch.max_document_length == max(lengths)
    assert batch.num_tokens == sum(lengths)


def test_positions_start_again_with_each_document(store: Store) -> None:
    for batch in batches_of_step(store, 3, 2, 2, 2, 1000):
        bounds = batch.cumulative_lengths.tolist()
        expected = [place for start, stop in pairwise(bounds) for place in range(stop - start)]
        assert batch.position_ids[0].tolist() == expected


def test_a_target_is_predicted_from_the_token_before_it_in_the_same_document(store: Store) -> None:
    for batch in batches_of_step(store, 5, 2, 3, 1, 1000):
        ids, starts = batch.input_ids[0], set(batch.cumulative_lengths.tolist())
        assert torch.equal(ids[batch.target_positions + 1], batch.target_ids)
        assert not starts & set((batch.target_positions + 1).tolist())
        is_target = np.concatenate([store.row(row).is_target for row in batch.rows])
        assert (np.flatnonzero(is_target) - 1).tolist() == batch.target_positions.tolist()


@pytest.mark.parametrize(("world", "micro", "accumulation"), [(1, 6, 1), (2, 3, 1), (3, 1, 2), (1, 1, 6), (6, 1, 1)])
def test_every_division_of_a_step_has_the_same_rows_and_knows_all_targets(
    store: Store, world: int, micro: int, accumulation: int
) -> None:
    num_rows_in_run = 2 * store.num_rows
    for step in range(-(-num_rows_in_run // 6)):
        batches = batches_of_step(store, step, world, micro, accumulation, num_rows_in_run)
        (whole,) = batches_of_step(store, step, 1, 6, 1, num_rows_in_run)
        assert sorted(row for batch in batches for row in batch.rows) == sorted(whole.rows)
        assert {batch.num_targets_in_step for batch in batches} == {whole.num_targets}
        assert sum(batch.num_targets for batch in batches) == whole.num_targets


def test_rows_beyond_the_end_of_the_run_are_there_but_carry_no_targets(store: Store) -> None:
    batches = batches_of_step(store, 0, 2, 4, 1, 3)
    assert [batch.num_targets > 0 for batch in batches] == [True, False]
    assert all(len(batch.rows) == 4 and batch.num_tokens > 0 for batch in batches)
    counted = store.num_targets_of_row[list(batches[0].rows[:3])].sum()
    assert sum(batch.num_targets for batch in batches) == counted == batches[0].num_targets_in_step


@pytest.mark.parametrize("max_rows", [None, 1, 5, 10**6])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_covers_the_first_rows_once_in_as_many_batches_on_every_rank(
    store: Store, world: int, max_rows: int | None
) -> None:
    by_rank = [
        list(evaluation_batches(store, rank=rank, world=world, micro_batch_size=2, max_rows=max_rows)) for rank in range(world)
    ]
    num_rows = min(store.num_rows, max_rows or store.num_rows)
    assert {len(batches) for batches in by_rank} == {
        num_evaluation_batches(store.num_rows, world=world, micro_batch_size=2, max_rows=max_rows)
    }
    batches = [batch for batches in by_rank for batch in batches]
    expected = int(store.num_targets_of_row[:num_rows].sum())
    assert sum(batch.num_targets for batch in batches) == expected
    assert {batch.num_targets_in_step for batch in batches} == {expected}
    assert set(range(num_rows)) == {row for batch in batches for row in batch.rows}


def test_a_batch_moves_with_all_its_tensors(store: Store) -> None:
    (batch,) = batches_of_step(store, 0, 1, 2, 1, 1000)
    moved = batch.to("meta")
    assert {moved.input_ids.device.type, moved.target_ids.device.type, moved.cumulative_lengths.device.type} == {"meta"}
    assert moved.rows == batch.rows


def test_a_worker_reads_stores_without_datasets_pandas_or_transformers(tmp_path: Path) -> None:
    info = tiny_store(tmp_path)
    code = (
        "import sys\n"
        "from raytune.data.batches.batches import step_batches\n"
        "from raytune.data.store.store import Store\n"
        f"store = Store.open({info.path!r})\n"
        "step_batches(store, step=0, rank=0, world=1, micro_batch_size=1, accumulation=1, num_rows_in_run=1, seed=0)\n"
        "print([name for name in ('datasets', 'pandas', 'transformers') if name in sys.modules])\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
