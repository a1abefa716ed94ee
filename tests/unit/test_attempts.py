"""An attempt that failed is tried again unless the same would happen again, or the budget is spent."""

from pathlib import Path

import pytest

from raytune.launch.attempts.attempts import Decision, Failure, cause_line, decide, details
from raytune.launch.run import RunFailedError, explanation
from raytune.run_folder import RunFolder
from raytune.storage import write_json


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


@pytest.mark.parametrize(
    "kind",
    [
        "DataError",
        "ModelError",
        "TrainingError",
        "OutOfMemoryError",
        "PlanError",
        "NoRoom",
        "ModuleNotFoundError",
        "UnfitCheckpointError",
    ],
)
def test_what_would_only_happen_again_is_raised_at_once(kind: str) -> None:
    assert decide([failure(kind)], max_failures=10) is Decision.RAISE


def test_the_headline_names_rank_node_and_cause_in_one_line() -> None:
    assert failure("DataError").headline == "rank 1 on n1: DataError: first line"


RAYS = '\x1b[36mray::execute()\x1b[39m (pid=7, ip=10.0.0.1)\n  File "a.py", line 1, in b\nRuntimeError: no NCCL'


def test_the_cause_of_a_traceback_is_its_last_line_without_colours_and_of_a_message_its_first() -> None:
    assert cause_line(RAYS) == "RuntimeError: no NCCL"
    assert cause_line("Traceback (most recent call last):\n  File x\nValueError: bad\n") == "ValueError: bad"
    created = "The actor died because of an error raised in its creation task, ray::Controller.__init__() (pid=7)"
    assert cause_line(f"{created}\n  File x\nOSError: bad") == "OSError: bad"
    assert cause_line("too long\nlower it") == "too long"
    assert details("too long\nlower it") == ["lower it"]
    assert "\x1b" not in failure("RuntimeError", RAYS).headline


def test_the_last_line_of_a_failed_run_is_its_cause_and_nothing_is_named_that_is_not_there(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "failed")
    lines = explanation([failure("WorkerDied", "the process died")], folder).splitlines()
    assert lines == [
        "No checkpoint was committed yet, so the same command starts the run from its beginning.",
        "Training failed in attempt 1: rank 1 on n1: WorkerDied: the process died",
    ]
    write_json(folder.failure(1, 1), {})
    lines = explanation([failure("TrainingError", "The loss of step 3 is not finite.\nLower the rate.")], folder).splitlines()
    assert lines == [
        f"Tracebacks: {folder.failures}",
        "Lower the rate.",
        "Training failed in attempt 1: rank 1 on n1: TrainingError: The loss of step 3 is not finite.",
    ]


@pytest.mark.parametrize(
    ("kind", "code"), [("WorkerDied", 10), ("WorkerHung", 10), ("NodeLost", 10), ("NoRoom", 10), ("ValueError", 1)]
)
def test_what_is_the_machines_fault_can_be_tried_again_later(kind: str, code: int) -> None:
    assert RunFailedError("message", failure(kind)).exit_code == code


def test_a_command_that_resumes_nothing_is_not_said_to_go_on(tmp_path: Path) -> None:
    lost = [failure("WorkerDied", "the process died")]
    first, *_ = explanation(lost, RunFolder(str(tmp_path), "failed"), resumes=False).splitlines()
    assert (
        first == "checkpoint.resume is false, so the same command would refuse the run. With checkpoint.resume=true it goes on."
    )
