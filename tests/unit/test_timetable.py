"""The calendar of a run."""

from hypothesis import given
from hypothesis import strategies as st

from raytune.training.steps.timetable import Timetable


def table(**changes: object) -> Timetable:
    values = {"num_steps": 10, "log_every": 2, "evaluate_every": 4, "save_every": 5}
    values |= {"evaluate_at_saves": False, "rungs": ()}
    return Timetable(**(values | changes))  # type: ignore[arg-type]


def test_a_ten_step_run_reads_like_its_calendar() -> None:
    steps = range(1, 11)
    assert [step for step in steps if table().logs_after(step)] == [2, 4, 6, 8, 10]
    assert [step for step in steps if table().evaluates_after(step)] == [4, 8, 10]
    assert [step for step in steps if table().saves_after(step)] == [5, 10]


def test_saves_that_are_due_by_step_can_be_evaluated_too() -> None:
    assert [step for step in range(1, 11) if table(evaluate_at_saves=True).evaluates_after(step)] == [4, 5, 8, 10]


def test_without_validation_rows_nothing_is_evaluated() -> None:
    nothing = table(evaluate_every=None, evaluate_at_saves=True)
    assert not any(nothing.evaluates_after(step) for step in range(1, 11))


def test_rungs_are_evaluated_and_saved() -> None:
    with_rungs = table(rungs=(1, 7))
    assert [step for step in range(1, 11) if with_rungs.evaluates_after(step)] == [1, 4, 7, 8, 10]
    assert [step for step in range(1, 11) if with_rungs.saves_after(step)] == [1, 5, 7, 10]


@given(st.integers(1, 200), st.integers(1, 50), st.integers(1, 50), st.integers(1, 50))
def test_the_last_step_is_logged_evaluated_and_saved(num_steps: int, log: int, evaluate: int, save: int) -> None:
    last = table(num_steps=num_steps, log_every=log, evaluate_every=evaluate, save_every=save)
    assert last.logs_after(num_steps)
    assert last.evaluates_after(num_steps)
    assert last.saves_after(num_steps)
