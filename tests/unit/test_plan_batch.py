"""The batch equation."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune.config.sections.training import TrainingSection
from raytune.errors import UserError
from raytune.plan.choosing.batch import DEFAULT_ROWS, MIN_STEPS, default_rows_per_step, possible_batches

SIZES = st.integers(1, 64)


def batches(workers: int, wanted: int = 16, max_micro_batch: int = 4, **training: Any) -> list[tuple[int, int, int]]:
    found = possible_batches(TrainingSection(**training), workers, wanted, max_micro_batch)
    return [(batch.micro_batch_size, batch.accumulation, batch.global_batch_size) for batch in found]


@given(workers=SIZES, wanted=st.integers(1, 512), most=st.integers(1, 32))
def test_without_wishes_the_equation_holds_and_rows_per_step_do_not_depend_on_the_way(
    workers: int, wanted: int, most: int
) -> None:
    found = possible_batches(TrainingSection(), workers, wanted, most)
    assert {batch.workers * batch.micro_batch_size * batch.accumulation for batch in found} == {found[0].global_batch_size}
    assert [batch.micro_batch_size for batch in found] == sorted((b.micro_batch_size for b in found), reverse=True)
    assert found[-1].micro_batch_size == 1
    assert found[0].micro_batch_size <= most
    assert max(workers, wanted) >= found[0].global_batch_size > wanted - workers


@given(workers=SIZES, wanted=st.integers(1, 512), enough=st.integers(1, 32))
def test_of_micro_batches_that_are_large_enough_the_smallest_comes_first(workers: int, wanted: int, enough: int) -> None:
    sizes = [batch.micro_batch_size for batch in possible_batches(TrainingSection(), workers, wanted, 2 * enough, enough)]
    every = [batch.micro_batch_size for batch in possible_batches(TrainingSection(), workers, wanted, 2 * enough)]
    assert sizes == every[-len(sizes) :], "smaller ones follow, for less memory"
    large = [rows for rows in every if rows >= enough]
    assert sizes[0] == min(large, default=every[0])


@given(workers=SIZES, micro=SIZES, accumulation=SIZES)
def test_any_two_fix_the_third(workers: int, micro: int, accumulation: int) -> None:
    total = workers * micro * accumulation
    expected = [(micro, accumulation, total)]
    given_by = {
        "global_batch_size": total,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
    }
    for left_out in given_by:
        assert batches(workers, **{key: value for key, value in given_by.items() if key != left_out}) == expected
    assert batches(workers, **given_by) == expected


def test_one_wish_is_kept_and_the_others_come_near_the_wanted_rows() -> None:
    assert batches(2, per_device_train_batch_size=3) == [(3, 2, 12)]
    assert batches(2, per_device_train_batch_size=32) == [(32, 1, 64)]
    assert batches(2, gradient_accumulation_steps=3) == [(2, 3, 12)]
    assert batches(2, global_batch_size=12) == [(3, 2, 12), (2, 3, 12), (1, 6, 12)]


@pytest.mark.parametrize(
    ("workers", "training", "nearest"),
    [
        (4, {"global_batch_size": 10}, "8 or 12"),
        (4, {"global_batch_size": 2}, "possible: 4"),
        (2, {"global_batch_size": 10, "per_device_train_batch_size": 4}, "8 or 16"),
        (2, {"global_batch_size": 10, "gradient_accumulation_steps": 3}, "6 or 12"),
        (
            2,
            {"global_batch_size": 12, "gradient_accumulation_steps": 3, "per_device_train_batch_size": 4},
            "Set it to 24, or leave",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused_with_the_nearest(workers: int, training: dict[str, int], nearest: str) -> None:
    with pytest.raises(UserError, match=nearest):
        batches(workers, **training)


@given(
    workers=SIZES, total=SIZES, fixed=SIZES, key=st.sampled_from(["per_device_train_batch_size", "gradient_accumulation_steps"])
)
def test_other_workers_are_advised_where_there_are_some_that_divide(workers: int, total: int, fixed: int, key: str) -> None:
    training = {"global_batch_size": total, key: fixed}
    try:
        batches(workers, **training)
    except UserError as refusal:
        _, advised, divided = str(refusal).partition("set cluster.workers to a divisor of ")
        assert bool(advised) == (total % fixed == 0)
        for others in range(1, total + 1):
            if advised and int(divided.rstrip(".")) % others == 0:
                batches(others, **training)


@given(num_rows=st.integers(1, 5000), epochs=st.floats(0.1, 20))
def test_the_default_leaves_twenty_steps_wherever_there_are_twenty_rows(num_rows: int, epochs: float) -> None:
    rows_in_epochs = max(1, int(epochs * num_rows))
    rows = default_rows_per_step(num_rows, rows_in_epochs)
    assert 1 <= rows <= DEFAULT_ROWS
    assert rows == 1 or rows_in_epochs / rows >= MIN_STEPS


def test_with_given_steps_no_row_comes_twice_in_a_step() -> None:
    assert default_rows_per_step(5, None) == 5
    assert default_rows_per_step(500, None) == DEFAULT_ROWS
