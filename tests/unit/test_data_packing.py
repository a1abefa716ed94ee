"""Packing keeps every document, fills rows and never overfills one."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune.data.store.packing import PACKINGS, pack, pack_rows
from raytune.errors import DataError
from tests.tiny import PATIENT

LENGTHS = st.lists(st.integers(1, 64), max_size=200)


@pytest.mark.parametrize("packing", PACKINGS)
@PATIENT
@given(lengths=LENGTHS)
def test_every_document_is_in_exactly_one_row_and_no_row_is_too_long(packing: str, lengths: list[int]) -> None:
    rows = pack(lengths, 64, packing)  # pyright: ignore[reportArgumentType]
    assert sorted(document for row in rows for document in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[document] for document in row) <= 64 for row in rows)


def fewest_rows(lengths: list[int], row_length: int) -> int:
    """The optimum, by trying everything."""

    def best(rest: list[int], free: list[int]) -> int:
        if not rest:
            return len(free)
        choices = [
            best(rest[1:], [*free[:row], space - rest[0], *free[row + 1 :]])
            for row, space in enumerate(free)
            if space >= rest[0] and space not in free[:row]
        ]
        return min([*choices, best(rest[1:], [*free, row_length - rest[0]])])

    return best(lengths, [])


@PATIENT
@given(st.lists(st.integers(1, 10), max_size=7))
def test_best_fit_decreasing_stays_within_11_9_of_the_optimum(lengths: list[int]) -> None:
    assert len(pack_rows(lengths, 10)) <= 11 / 9 * fewest_rows(lengths, 10) + 6 / 9


def test_best_fit_takes_the_fullest_row_that_has_room() -> None:
    assert pack_rows([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert pack_rows([7, 6, 3, 4], 10) == [[0, 2], [1, 3]]


def test_rows_come_in_the_order_of_their_first_document() -> None:
    rows = pack_rows([1, 9, 8, 9, 2], 10)
    assert rows == sorted(rows)
    assert pack([3, 1, 2], 10, "none") == [[0], [1], [2]]


def test_neighbours_in_length_share_a_row_in_token_budget_mode() -> None:
    lengths = [5, 60, 7, 58, 6, 61]
    rows = pack(lengths, 64, "token_budget")
    assert [0, 2, 4] in rows
    assert len(rows) == 4


def test_a_document_longer_than_a_row_is_refused_with_both_numbers() -> None:
    with pytest.raises(DataError, match="has 65 tokens but rows hold 64"):
        pack_rows([3, 65], 64)


def test_nothing_packs_into_no_rows() -> None:
    assert pack_rows([], 64) == []


def test_a_million_documents_pack_in_seconds_with_little_waste() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 1, 200_000).astype(int), 1, 2048)
    started_s = time.process_time()
    rows = pack_rows(lengths, 2048)
    assert time.process_time() - started_s < 5  # 0.15 s measured
    assert len(rows) < 1.002 * lengths.sum() / 2048 + 1
