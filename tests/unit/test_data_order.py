"""The order of data is a function of the step."""

import time
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from raytune.data.store.order import positions_of_step, row_at, rows_at, share_of_rank
from tests.tiny import PATIENT

ROWS = st.integers(1, 300)
SEEDS = st.integers(0, 2**32)


@PATIENT
@given(ROWS, SEEDS, st.integers(0, 50))
def test_every_epoch_visits_every_row_once(num_rows: int, seed: int, epoch: int) -> None:
    visited = [row_at(epoch * num_rows + place, num_rows, seed) for place in range(num_rows)]
    assert sorted(visited) == list(range(num_rows))


@PATIENT
@given(ROWS, SEEDS, st.lists(st.integers(0, 10**7), min_size=1, max_size=50))
def test_many_positions_at_once_equal_one_at_a_time(num_rows: int, seed: int, positions: list[int]) -> None:
    assert rows_at(np.array(positions), num_rows, seed).tolist() == [row_at(p, num_rows, seed) for p in positions]


@PATIENT
@given(st.integers(20, 300), SEEDS)
def test_epochs_and_seeds_differ(num_rows: int, seed: int) -> None:
    first, second = rows_at(np.arange(2 * num_rows), num_rows, seed).reshape(2, -1).tolist()
    other_seed = rows_at(np.arange(num_rows), num_rows, seed + 1).tolist()
    assert first != second
    assert first != other_seed
    assert first != sorted(first)


DIVISIONS = st.sampled_from([(1, 12, 1), (2, 3, 2), (3, 2, 2), (4, 3, 1), (1, 1, 12), (12, 1, 1)])


@PATIENT
@given(st.integers(1, 200), SEEDS, st.integers(0, 30), DIVISIONS)
def test_the_rows_of_a_step_do_not_depend_on_how_its_batch_is_divided(
    num_rows: int, seed: int, step: int, division: tuple[int, int, int]
) -> None:
    world, micro_batch_size, accumulation = division
    batch = rows_at(positions_of_step(step, 12), num_rows, seed)
    shares = [
        share_of_rank(micro_step=micro_step, rank=rank, world=world, micro_batch_size=micro_batch_size)
        for micro_step in range(accumulation)
        for rank in range(world)
    ]
    assert [row for share in shares for row in batch[share].tolist()] == batch.tolist()


def test_all_orders_of_a_few_rows_are_about_equally_likely() -> None:
    orders = Counter(tuple(rows_at(np.arange(4) + 4 * epoch, 4, 7).tolist()) for epoch in range(4800))
    assert len(orders) == 24
    # 200 of each are expected with a standard deviation of 14.
    assert 130 < min(orders.values()) <= max(orders.values()) < 270


def test_an_epoch_of_ten_million_rows_needs_no_memory_and_microseconds_a_row() -> None:
    started_s = time.process_time()
    rows = [row_at(position, 10_000_000, 0) for position in range(2000)]
    assert len(set(rows)) == 2000
    assert (time.process_time() - started_s) / 2000 < 100e-6  # 4 microseconds measured; room for a busy machine
