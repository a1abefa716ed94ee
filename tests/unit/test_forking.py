"""Workers that are forked begin as those that Ray starts: with what the raylet gave them, and modules of the server."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray._private.workers import setup_worker

from raytune.launch.cluster import fork_starter
from raytune.launch.cluster.forking import Server

OF_PYTEST = "PYTEST_CURRENT_TEST"
"""Another one in each phase of a test."""
LOADED = "wave"
"""A module that a worker asks for in vain unless the server has loaded it."""
WORK = """
import json, os, signal, sys
facts = {
    "words": sys.argv[1:], "name": __name__, "pid": os.getpid(), "parent": os.getppid(),
    "group": os.getpgid(0), "folder": os.getcwd(),
    "nice": os.nice(0), "oom": open("/proc/self/oom_score_adj").read().strip(), "environment": dict(os.environ),
    "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
    "child_handler": signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL, "is_loaded": "wave" in sys.modules,
    "loaded_later": "colorsys" in sys.modules,
    "open": len(os.listdir("/proc/self/fd")), "path": sys.path[0],
    "random": __import__("random").random(),
}
print(json.dumps(facts), flush=True)
import atexit, threading, time
if "wait" in sys.argv:
    time.sleep(600)
atexit.register(print, "at the end")
threading.Timer(0.2, print, ["a thread that is waited for"]).start()
sys.exit(7)
"""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    monkeypatch.delenv(OF_PYTEST)
    (tmp_path / "work.py").write_text(WORK)
    server = Server("/tmp", threads=3, modules=[LOADED, "numpy"])
    yield server
    server.end()
    assert not Path(server.program).exists()


def started(server: Server, folder: Path, *words: str, **variables: str) -> subprocess.Popen[str]:
    """A worker, as a raylet starts one."""

    def as_a_raylet() -> None:
        os.nice(5)
        Path("/proc/self/oom_score_adj").write_text("900")
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])

    return subprocess.Popen(
        [server.program, setup_worker.__file__, "--language=PYTHON", str(folder / "work.py"), *words],
        cwd=folder,
        env={name: value for name, value in (os.environ | variables).items() if name != OF_PYTEST},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=as_a_raylet,
    )


def test_a_forked_worker_begins_as_ray_would_have_started_it(server: Server, tmp_path: Path) -> None:
    workers = [started(server, tmp_path, word, RAY_TRAIN_NAME=word) for word in ("one", "two")]
    outputs = [worker.communicate(timeout=60)[0].splitlines() for worker in workers]
    facts = [json.loads(lines[0]) for lines in outputs]
    for word, worker, lines, fact in zip(("one", "two"), workers, outputs, facts, strict=True):
        assert worker.returncode == 7
        assert lines[1:] == ["a thread that is waited for", "at the end"]
        assert (fact["words"], fact["name"], fact["environment"]["RAY_TRAIN_NAME"]) == ([word], "__main__", word)
        assert (fact["nice"] - os.nice(0), fact["oom"], fact["blocked"]) == (5, "900", [signal.SIGINT])
        assert (fact["folder"], fact["path"]) == (str(tmp_path), str(tmp_path))
        assert (fact["group"], fact["child_handler"], fact["is_loaded"], fact["open"]) == (fact["pid"], True, True, 4)
        assert fact["parent"] == server.pid != worker.pid
        assert not {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"} & set(fact["environment"]), (
            "which are the server's, and Ray's to set"
        )
    assert facts[0]["random"] != facts[1]["random"]


def test_where_libraries_would_have_read_other_settings_a_worker_starts_as_ray_starts_it(server: Server, tmp_path: Path) -> None:
    lines = started(server, tmp_path, HF_HOME="/elsewhere").communicate(timeout=60)[0].splitlines()
    fact = json.loads(lines[0])
    assert (fact["is_loaded"], fact["environment"]["HF_HOME"]) == (False, "/elsewhere")
    assert fact["parent"] == os.getpid()
    assert lines[1:] == ["a thread that is waited for", "at the end"]


def test_what_ray_alone_reads_may_differ_and_what_is_loaded_later_is_there_too(server: Server, tmp_path: Path) -> None:
    server.load("colorsys")
    lines = started(server, tmp_path, RAY_JOB_ID="01000000").communicate(timeout=60)[0].splitlines()
    fact = json.loads(lines[0])
    assert (fact["parent"], fact["environment"]["RAY_JOB_ID"]) == (server.pid, "01000000")
    assert fact["loaded_later"]


def test_a_worker_ends_with_what_the_raylet_started(server: Server, tmp_path: Path) -> None:
    worker = started(server, tmp_path, "wait")
    assert worker.stdout is not None
    forked = psutil.Process(json.loads(worker.stdout.readline())["pid"])
    worker.kill()
    forked.wait(timeout=30)
    assert psutil.pid_exists(server.pid)


def test_without_its_server_a_worker_starts_as_ray_starts_it(server: Server, tmp_path: Path) -> None:
    server.load("no_module_is_called_so")  # as where a package is broken: the worker will say so
    lines = started(server, tmp_path).communicate(timeout=60)[0].splitlines()
    assert json.loads(lines[0])["parent"] == os.getpid()


def test_a_server_that_does_not_answer_is_not_waited_for_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork_starter, "ANSWER_S", 0.2)
    with socket.socket(socket.AF_UNIX) as stopped:
        stopped.bind(str(tmp_path / "socket"))
        stopped.listen()
        with pytest.raises(OSError, match="timed out"):  # for which a worker is started as Ray starts it
            fork_starter.forked(str(tmp_path / "socket"), ["/setup_worker.py"])


def test_it_ends_and_removes_its_folder_when_its_command_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, sys; from raytune.launch.cluster.forking import Server; server = Server(sys.argv[1], 1, ['wave'])\n"
        "print(server.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False, timeout=60)
    server = int(done.stdout)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and (psutil.pid_exists(server) or list(tmp_path.iterdir())):
        time.sleep(0.05)
    assert not list(tmp_path.iterdir())
    assert not psutil.pid_exists(server) or psutil.Process(server).status() == psutil.STATUS_ZOMBIE
