"""A command whose process is ended without a word has a parent that says why, and writes it down. Real processes, no cluster."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raytune.launch.attempts.lease import claim, this_process
from raytune.launch.attempts.lost import Driver, driver_lost
from raytune.launch.attempts.places import Place, write_places
from raytune.launch.state.record import RunRecord
from raytune.metrics.events import read_events
from raytune.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
SCRIPT = """
import os, signal, sys, time
from raytune.cli.supervise import supervised
from raytune.launch.cluster.signals import end_in_order
def answer(notes):
    signal.signal(signal.SIGTERM, end_in_order)
    signal.signal(signal.SIGINT, end_in_order)
    print(os.getpid(), flush=True)
    {body}
supervised(answer, ["train", *{arguments}])
"""
WAIT = """
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        sys.exit(130)
"""


def started(body: str, *arguments: str) -> tuple[subprocess.Popen[str], int]:
    """The process, and the pid of the child that does the work."""
    code = SCRIPT.format(body=body.strip(), arguments=list(arguments))
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


@pytest.mark.parametrize(("body", "code"), [("sys.exit(0)", 0), ("sys.exit(3)", 3), ("sys.exit('no')", 1), (WAIT.strip(), 143)])
def test_a_command_ends_with_the_exit_code_of_its_work(body: str, code: int) -> None:
    process, _ = started(body)
    if code == 143:
        process.send_signal(signal.SIGTERM)
    assert process.wait(30) == code


@pytest.mark.parametrize(
    ("body", "cause"),
    [("os._exit(1)", "the Ray cluster inside this machine was lost"), ("os.kill(os.getpid(), 9)", "was ended by SIGKILL")],
)
def test_a_command_that_ends_without_a_word_can_be_tried_again_and_its_last_line_is_the_cause(body: str, cause: str) -> None:
    process, _ = started(body)
    _, messages = process.communicate(timeout=30)
    assert process.returncode == 10
    assert cause in messages.strip().splitlines()[-1]
    process, _ = started(body, "--json")
    output, messages = process.communicate(timeout=30)
    assert json.loads(output)["exit_code"] == 10


def test_a_fault_of_ours_is_shown_as_one_and_lays_the_blame_on_no_cluster() -> None:
    process, _ = started("raise NameError('x')")
    _, messages = process.communicate(timeout=30)
    assert process.returncode == 1
    assert messages.strip().splitlines()[-1] == "NameError: x"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_whole_group_unwinds_once(number: signal.Signals, code: int) -> None:
    body = "try: print('ready', flush=True); time.sleep(60)\n    finally: time.sleep(1); print('let go', flush=True)"
    code_text = SCRIPT.format(body=body, arguments=[])
    process = subprocess.Popen(
        [sys.executable, "-c", code_text],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)][1] == "ready\n"
    os.killpg(process.pid, number)  # as a terminal and `ray job stop` do; the parent hands it on besides
    output, messages = process.communicate(timeout=30)
    assert output == "let go\n", messages
    assert process.returncode == code


def test_a_parent_that_is_killed_takes_the_work_along() -> None:
    process, child = started(WAIT.strip())
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break  # ended, and nobody has buried it
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{child}").exists()


def test_a_lost_driver_leaves_an_event_a_cause_and_a_run_that_others_may_claim(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "lost")
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys\nfrom raytune.launch.attempts.lease import *\nfrom raytune.run_folder import RunFolder\n"
            f"claim(RunFolder({str(tmp_path)!r}, 'lost'), this_process())",
        ],
        cwd=ROOT,
    )
    assert holder.wait() == 0
    RunRecord(name="lost", state="running", attempts=3, created=0.0, config={}, versions={}).write(folder)
    here, there = (
        Place(host=host, address=address, node_id=host * 20, pid=1) for host, address in (("a", "10.0.0.1"), ("b", "10.0.0.2"))
    )
    write_places(folder, 3, {0: here, 1: there, 2: there})
    facts = {"verb": "train", "cluster": "10.0.0.2:6379", "head": "10.0.0.2:6379", "lost": "gcs_server"}
    message = driver_lost(Driver(pid=holder.pid, storage=str(tmp_path), name="lost", **facts))
    last = message.splitlines()[-1]
    assert last.startswith("Training failed in attempt 3: NodeLost: the head of the Ray cluster at 10.0.0.2:6379 was lost")
    assert "ranks 1, 2 on node b (10.0.0.2, Ray node bbbbbbbbbbbb)" in last
    (event,) = read_events(folder.events)
    assert (event["event"], event["attempt"]) == ("attempt_failed", 3)
    assert event["cause"] in last
    record = RunRecord.read(folder)
    assert record is not None
    assert (record.state, record.failure) == ("failed", event["cause"])
    claim(folder, this_process())


def test_a_lost_driver_says_nothing_about_a_run_that_another_command_has_taken_over(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "lost")
    RunRecord(name="lost", state="running", attempts=3, created=0.0, config={}, versions={}).write(folder)
    claim(folder, this_process())
    driver_lost(Driver(pid=1, verb="train", storage=str(tmp_path), name="lost", lost="raylet"))
    assert read_events(folder.events) == []
    record = RunRecord.read(folder)
    assert record is not None
    assert record.state == "running"


@pytest.mark.parametrize("resumes", [True, False])
def test_a_lost_driver_says_what_its_own_command_would_do_whatever_the_run_began_with(resumes: bool, tmp_path: Path) -> None:
    began_with = {"checkpoint": {"resume": not resumes}}
    RunRecord(name="lost", state="failed", attempts=1, created=0.0, config=began_with, versions={}).write(
        RunFolder(str(tmp_path), "lost")
    )
    message = driver_lost(Driver(pid=1, verb="train", storage=str(tmp_path), name="lost", resumes=resumes, lost="raylet"))
    assert ("the same command would refuse the run" in message) is not resumes
    assert ("the same command starts the run from its beginning" in message) is resumes
