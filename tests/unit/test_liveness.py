"""A process that does not answer: what it uses says whether it is at work or hangs. A rank that is asked where it is says so."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from raytune.launch.attempts.liveness import is_at_work
from raytune.training.steps.loop import training_steps
from raytune.training.whereabouts import findable, whereabouts

BUSY = "while True: pass"
WRITING = "import os\nwhile True: os.write(1, bytes(1 << 20)); __import__('time').sleep(0.2)"
# Another library waits, with Python's lock in its hand: no thread of the process runs.
LOCKED = "import ctypes; ctypes.PyDLL(None).sleep(1000)"


@contextmanager
def process(code: str) -> Iterator[int]:
    started = subprocess.Popen([sys.executable, "-c", f"print(flush=True)\n{code}"], stdout=subprocess.PIPE)
    assert started.stdout is not None
    started.stdout.readline()
    drain = threading.Thread(target=lambda: [None for _ in iter(lambda: started.stdout.read(1 << 20), b"")], daemon=True)
    drain.start()
    time.sleep(0.3)
    try:
        yield started.pid
    finally:
        started.kill()
        started.wait()


@pytest.mark.parametrize("code", [BUSY, WRITING])
def test_a_process_that_computes_or_writes_is_left_alone(code: str) -> None:
    with process(code) as pid:
        assert is_at_work(pid, watched_for_s=1.5)


@pytest.mark.parametrize("code", ["import time; time.sleep(1000)", LOCKED])
def test_a_process_that_only_waits_hangs(code: str) -> None:
    with process(code) as pid:
        assert not is_at_work(pid, watched_for_s=0.5)


def test_a_process_that_was_stopped_hangs_however_busy_it_was() -> None:
    with process(BUSY) as pid:
        os.kill(pid, signal.SIGSTOP)
        assert not is_at_work(pid, watched_for_s=0.5)
    assert not is_at_work(pid, watched_for_s=0.1), "and so does one that has ended"


def test_a_rank_says_in_which_step_it_is_and_on_which_line() -> None:
    is_there, may_go_on = threading.Event(), threading.Event()

    class Model:
        def train(self) -> None: ...

    class Engine:
        model, rank = Model(), 0

    def batches_of(step: int) -> list:
        if step == 7:
            is_there.set()
            may_go_on.wait(30)
        raise StopIteration

    def work() -> None:
        steps = training_steps(Engine(), batches_of, None, float, start=7, stop=9, seed=0)  # pyright: ignore[reportArgumentType]
        with findable(), pytest.raises(RuntimeError):
            next(steps)

    assert whereabouts() is None
    thread = threading.Thread(target=work)
    thread.start()
    assert is_there.wait(30)
    found = whereabouts()
    may_go_on.set()
    thread.join()
    assert found is not None
    assert (found.step, found.waits) == (8, False)
    assert found.place.startswith("loop.py:")
    assert "in step 8" in str(found)
