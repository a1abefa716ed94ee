"""An attempt that failed is tried again unless the same would happen again, or the budget is spent."""

import pytest

from raytune.launch.attempts import Decision, Failure, decide


def failure(kind: str) -> Failure:
    return Failure(attempt=1, rank=1, node="n1", kind=kind, message="first line\nsecond line", traceback="")


@pytest.mark.parametrize("kind", ["WorkerDied", "ClusterError", "RuntimeError", "ConnectionError"])
def test_a_lost_worker_is_tried_again_within_the_budget(kind: str) -> None:
    assert [decide(failure(kind), failures, max_failures=2) for failures in (1, 2, 3)] == [
        Decision.RETRY,
        Decision.RETRY,
        Decision.RAISE,
    ]


@pytest.mark.parametrize("kind", ["DataError", "ModelError", "TrainingError", "OutOfMemoryError", "PlanError"])
def test_what_would_only_happen_again_is_raised_at_once(kind: str) -> None:
    assert decide(failure(kind), 1, max_failures=10) is Decision.RAISE


def test_the_headline_names_rank_node_and_cause_in_one_line() -> None:
    assert failure("DataError").headline == "rank 1 on n1: DataError: first line"
