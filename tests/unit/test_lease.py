"""One command at a time holds a run: whoever is alive keeps it, whoever is gone loses it, and two never get the same number."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune import storage
from raytune.errors import RunHeldError, TakenOverError
from raytune.launch.attempts.lease import (
    EXPIRES_S,
    Holder,
    Holding,
    Lease,
    Look,
    Standing,
    claim,
    hold,
    is_held_by,
    lives,
    standing,
    this_process,
)
from raytune.run_folder import RunFolder
from tests.tiny import PATIENT

ELSEWHERE = Holder(host="other", system="another system", pid=7, born=1, job="raysubmit_1", since="2026-11-25 12:00:00")


class Time:
    """A clock that sleeping moves; `at_each_look` happens meanwhile, elsewhere."""

    def __init__(self, at_each_look=lambda: None) -> None:
        self.now, self.at_each_look = 1000.0, at_each_look

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.at_each_look()


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> RunFolder:
    roots = {"local": lambda: str(tmp_path), "memory": lambda: f"memory://{tmp_path.name}"}
    root = roots[request.param]() if request.param in roots else f"{request.getfixturevalue('s3')}/{tmp_path.name}"
    return RunFolder(root, "run")


def claim_by(folder: RunFolder, holder: Holder, time: Time | None = None) -> Lease:
    time = time or Time()
    return claim(folder, holder, sleep=time.sleep, clock=time.clock)


# --- Decisions


looks = st.builds(Look, st.integers(1, 3), st.sampled_from([b"", b"a", b"b"]), st.floats(0, 1e6))


@PATIENT
@given(looks, looks, st.sampled_from([None, True, False]))
def test_a_claim_is_free_only_if_its_process_is_gone_or_nothing_of_it_changed_for_long(
    first: Look, newest: Look, holder_lives: bool | None
) -> None:
    unchanged = (first.number, first.content) == (newest.number, newest.content)
    expected = holder_lives is False or (holder_lives is None and unchanged and newest.at_s - first.at_s >= EXPIRES_S)
    assert (standing(first, newest, holder_lives) is Standing.FREE) == expected


@PATIENT
@given(looks)
def test_one_look_at_a_holder_elsewhere_decides_nothing(look: Look) -> None:
    assert standing(look, look, None) is Standing.UNCLEAR


def test_a_lease_is_read_as_it_was_written_and_anything_else_is_none() -> None:
    lease = Lease(number=3, token="t", holder=ELSEWHERE, beat=9)
    assert Lease.decode(lease.encode()) == lease
    assert [Lease.decode(content) for content in (b"", b"{", b"[]", b'{"number": 1}', lease.encode()[:-9])] == [None] * 5


def test_a_process_lives_until_it_ends_and_another_of_its_pid_is_not_it() -> None:
    here = this_process()
    assert lives(here)
    assert not lives(replace(here, born=(here.born or 0) - 1))
    assert lives(replace(here, system="another system")) is None
    child = subprocess.Popen(["sleep", "60"])
    born = int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19])
    holder = replace(here, pid=child.pid, born=born)
    assert lives(holder)
    child.kill()
    while lives(holder):  # a killed process stays in the table until its parent asks: that counts as gone too
        time.sleep(0.01)
    child.wait()
    assert not lives(holder)


# --- Claims


def test_a_run_is_held_by_one_and_free_when_it_lets_go(folder: RunFolder) -> None:
    with hold(folder) as lease:
        with pytest.raises(RunHeldError, match=rf"Run 'run' .* is held by process {os.getpid()} on") as caught, hold(folder):
            pass
        assert caught.value.exit_code == 10
        lease.renew()
    assert storage.list_folder(folder.path) == [], "nothing stays behind"
    assert not storage.exists(folder.path)
    with hold(folder):
        pass


def test_what_lies_in_the_run_folder_stays_when_the_run_is_let_go(folder: RunFolder) -> None:
    with hold(folder):
        storage.write_bytes(folder.questions, b"")
    assert storage.list_folder(folder.path) == ["questions.jsonl"]


def test_a_holder_elsewhere_keeps_its_run_while_its_heartbeat_moves(folder: RunFolder) -> None:
    theirs = Holding(folder, claim_by(folder, ELSEWHERE))
    time = Time(theirs.renew)
    with pytest.raises(RunHeldError, match="process 7 on other, Ray job raysubmit_1, since 2026-11-25 12:00:00"):
        claim_by(folder, this_process(), time)
    assert time.now < 1000 + EXPIRES_S
    theirs.check()


def test_a_holder_elsewhere_that_stands_still_is_taken_over_and_learns_it(folder: RunFolder) -> None:
    theirs = Holding(folder, claim_by(folder, ELSEWHERE))
    time = Time()
    ours = Holding(folder, claim_by(folder, this_process(), time))
    assert time.now >= 1000 + EXPIRES_S
    assert ours.number > theirs.number
    theirs.check()  # it has not looked yet
    with pytest.raises(TakenOverError, match=f"by process {os.getpid()} on .* the other one goes on"):
        theirs.renew()
    with pytest.raises(TakenOverError):
        theirs.check()
    theirs.release()
    ours.renew()
    assert storage.list_folder(folder.leases) == [f"{ours.number}.json"]


def test_a_holder_that_died_here_is_followed_at_once_with_a_higher_number(folder: RunFolder) -> None:
    dead = claim_by(folder, replace(this_process(), born=0))
    time = Time()
    assert claim_by(folder, this_process(), time).number > dead.number
    assert time.now == 1000


def test_half_a_lease_of_a_dead_machine_is_in_the_way_only_for_a_while(folder: RunFolder) -> None:
    storage.write_bytes(f"{folder.leases}/4.json", b'{"numb')
    assert claim_by(folder, this_process()).number == 5


def test_a_claim_is_numbered_above_every_attempt_before(folder: RunFolder) -> None:
    storage.write_json(folder.fence, {"fence": 6})
    assert claim_by(folder, ELSEWHERE).number == 7


def test_of_many_that_start_at_once_one_gets_the_run(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "run")

    def start(number: int) -> Lease | None:
        try:
            return claim(folder, this_process())
        except RunHeldError:
            return None

    for _ in range(5):
        with ThreadPoolExecutor(8) as pool:
            claims = [lease for lease in pool.map(start, range(8)) if lease]
        assert len(claims) == 1
        Holding(folder, claims[0]).release()


def test_of_many_that_follow_a_dead_holder_at_once_one_gets_the_run(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "run")
    claim_by(folder, replace(this_process(), born=0))

    def start(number: int) -> Lease | None:
        try:
            return claim(folder, this_process())
        except RunHeldError:
            return None

    with ThreadPoolExecutor(8) as pool:
        claims = [lease for lease in pool.map(start, range(8)) if lease]
    assert len(claims) == 1


def test_a_claim_that_was_written_over_is_lost() -> None:
    lease = Lease(number=3, token="t", holder=ELSEWHERE)
    assert is_held_by(lease, Look(3, replace(lease, beat=5).encode(), 0.0))
    assert not is_held_by(lease, Look(3, replace(lease, token="u").encode(), 0.0))
    assert not is_held_by(lease, Look(4, lease.encode(), 0.0))
    assert not is_held_by(lease, None)


# --- Processes


HOLD = """
import sys, time
from raytune.launch.attempts.lease import hold
from raytune.run_folder import RunFolder
with hold(RunFolder(sys.argv[1], "run")):
    print("held", flush=True)
    time.sleep(300)
"""


def test_a_run_of_another_process_is_refused_until_that_is_killed(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "run")
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(RunHeldError, match=f"process {process.pid} on"), hold(folder):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        with hold(folder) as lease:
            assert lease.number == 2
    finally:
        process.kill()
