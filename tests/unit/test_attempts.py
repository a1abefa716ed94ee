"""An attempt that failed is tried again unless the same would happen again, or the budget is spent."""

import pytest

from raytune.launch.attempts import Decision, Failure, decide


def failure(kind: str, message: str = "first line\nsecond line") -> Failure:
    return Failure(attempt=1, rank=1, node="n1", kind=kind, message=message, traceback="")


def test_lost_workers_are_replaced_within_the_budget() -> None:
    lost = failure("WorkerDied")
    assert [decide([lost] * number, max_failures=2) for number in (1, 2, 3)] == [Decision.RETRY, Decision.RETRY, Decision.RAISE]


def test_an_error_is_tried_again_once_but_not_when_it_comes_back_unchanged() -> None:
    first, other = failure("ConnectionError"), failure("ConnectionError", "another peer")
    assert decide([first], max_failures=9) is Decision.RETRY
    assert decide([first, other], max_failures=9) is Decision.RETRY
    assert decide([other, first, first], max_failures=9) is Decision.RAISE


@pytest.mark.parametrize("kind", ["DataError", "ModelError", "TrainingError", "OutOfMemoryError", "PlanError"])
def test_what_would_only_happen_again_is_raised_at_once(kind: str) -> None:
    assert decide([failure(kind)], max_failures=10) is Decision.RAISE


def test_the_headline_names_rank_node_and_cause_in_one_line() -> None:
    assert failure("DataError").headline == "rank 1 on n1: DataError: first line"
