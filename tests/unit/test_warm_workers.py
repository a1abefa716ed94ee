"""`cluster.keep_warm`: workers are forked from a process that stays on their node from command to command."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from raytune.config.sections.cluster import ClusterSection
from raytune.errors import UserError
from raytune.launch.cluster.gpu_drivers import may_have_gpus
from raytune.launch.cluster.warm import python_kept_warm, refuse_another_python

on_nodes_without_gpus = pytest.mark.skipif(may_have_gpus(), reason="workers start as ever where a library may ask a GPU's driver")
WORK = """
import json, os, sys, time
kept = sys.modules.get("kept")
print(json.dumps({
    "words": sys.argv[1:], "pid": os.getpid(), "parent": os.getppid(), "kept": kept and kept.VALUE,
    "environment": dict(os.environ), "folder": os.getcwd(),
}), flush=True)
if "wait" in sys.argv:
    sys.stdin.readline()
sys.exit(7)
"""
RAYLET = """
import subprocess, sys
subprocess.run(sys.argv[1:], stdin=subprocess.DEVNULL)
sys.stdin.read()
"""


class Node:
    """A raylet's folder, and workers that are started as it starts them: this process is the raylet."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.sockets = folder, folder / "ray" / "sockets"
        self.log = folder / "ray" / "logs" / "raytune-warm.log"
        for made in (self.sockets, self.log.parent, folder / "site"):
            made.mkdir(parents=True)
        self.module = folder / "site" / "kept.py"
        self.module.write_text("VALUE = 1\n")
        (folder / "default_worker.py").write_text(WORK)
        self.servers: set[int] = set()

    def command(self, *words: str, modules: str = "kept", idle_s: float = 60.0) -> list[str]:
        starter = [sys.executable, "-P", "-m", "raytune.launch.cluster.warm_starter", modules, f"{idle_s:g}", "1"]
        return [*starter, str(self.folder / "default_worker.py"), f"--raylet-name={self.sockets}/raylet", *words]

    def environment(self, **variables: str) -> dict[str, str]:
        path = os.pathsep.join([str(self.folder / "site"), os.getcwd()])
        of_pytest = {"PYTEST_CURRENT_TEST", "PYTEST_XDIST_TESTRUNUID"}
        return {name: value for name, value in os.environ.items() if name not in of_pytest} | {"PYTHONPATH": path} | variables

    def started(self, *words: str, idle_s: float = 60.0, modules: str = "kept", **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*words, idle_s=idle_s, modules=modules),
            cwd=self.folder,
            env=self.environment(**variables),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def facts(self, worker: subprocess.Popen[str]) -> dict[str, Any]:
        assert worker.stdout is not None
        facts = json.loads(worker.stdout.readline())
        if facts["parent"] != os.getpid():
            self.servers.add(facts["parent"])
        return facts

    def ended(self, *words: str, idle_s: float = 60.0, modules: str = "kept", **variables: str) -> dict[str, Any]:
        """What a worker says that has ended."""
        worker = self.started(*words, idle_s=idle_s, modules=modules, **variables)
        facts = self.facts(worker)
        worker.communicate(timeout=60)
        assert worker.returncode == 7
        return facts


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    yield node
    for server in node.servers:
        if psutil.pid_exists(server):
            os.kill(server, signal.SIGKILL)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "30 s"
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@on_nodes_without_gpus
def test_workers_of_command_after_command_are_forked_from_one_process(node: Node) -> None:
    both = [node.started(word, RAY_JOB_ID="01", RAY_OF_THE_FIRST="x") for word in ("one", "two")]
    facts = [node.facts(worker) for worker in both]
    assert [worker.wait(timeout=60) for worker in both] == [7, 7]
    facts.append(node.ended("three", RAY_JOB_ID="02"))
    (server,) = {fact["parent"] for fact in facts}
    assert server not in {os.getpid(), *(worker.pid for worker in both)}
    assert [fact["words"][-1] for fact in facts] == ["one", "two", "three"]
    assert [fact["kept"] for fact in facts] == [1, 1, 1]
    assert [fact["environment"]["RAY_JOB_ID"] for fact in facts] == ["01", "01", "02"]
    assert "RAY_OF_THE_FIRST" not in facts[2]["environment"], "what Ray told the worker that started the server"
    assert facts[2]["folder"] == str(node.folder)
    # Ray ends what a worker has started when that ends, and the server was started by what could have become one.
    assert psutil.Process(server).ppid() not in {os.getpid(), *(worker.pid for worker in both)}
    assert not node.log.read_text()


@on_nodes_without_gpus
def test_what_libraries_would_have_read_otherwise_is_loaded_by_another_process_which_takes_its_place(node: Node) -> None:
    working = node.started("wait")
    here = node.facts(working)
    elsewhere = node.ended(HF_HOME="/elsewhere")
    assert (here["kept"], elsewhere["kept"]) == (1, 1)
    assert here["parent"] != elsewhere["parent"]
    assert elsewhere["environment"]["HF_HOME"] == "/elsewhere"
    assert not is_gone(here["parent"]), "a worker is left"
    working.communicate("\n", timeout=60)
    assert working.returncode == 7
    wait_until(lambda: is_gone(here["parent"]))  # else each change of the code would leave one
    assert node.ended(HF_HOME="/elsewhere")["parent"] == elsewhere["parent"]


@on_nodes_without_gpus
def test_it_ends_when_nobody_has_used_it_for_so_long_and_not_beside_a_worker(node: Node) -> None:
    working = node.started("wait", idle_s=0.5)
    server = node.facts(working)["parent"]
    time.sleep(1.5)
    assert not is_gone(server)
    working.communicate("\n", timeout=60)
    wait_until(lambda: is_gone(server))
    assert not [path for path in node.sockets.iterdir() if path.is_socket()]
    again = node.ended(idle_s=0.5)
    assert again["kept"] == 1
    assert again["parent"] != server


@on_nodes_without_gpus
def test_what_was_installed_meanwhile_is_what_workers_load(node: Node) -> None:
    working = node.started("wait")
    old = node.facts(working)["parent"]
    node.module.write_text("VALUE = 2\n")
    os.utime(node.module, ns=(1, 1))
    at_once = node.ended()
    assert at_once["parent"] == os.getpid(), "it started as Ray starts it, and loads what is there"
    later = node.ended()
    assert later["kept"] == 2
    assert later["parent"] != old
    assert not is_gone(old), "a worker is left"
    working.communicate("\n", timeout=60)
    assert working.returncode == 7
    wait_until(lambda: is_gone(old))
    assert node.ended()["parent"] == later["parent"]


@on_nodes_without_gpus
def test_it_ends_with_its_raylet(node: Node) -> None:
    raylet = subprocess.Popen(
        [sys.executable, "-c", RAYLET, *node.command()],
        cwd=node.folder,
        env=node.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    server = node.facts(raylet)["parent"]
    assert not is_gone(server)
    raylet.kill()
    raylet.communicate(timeout=60)
    wait_until(lambda: is_gone(server))
    assert not [path for path in node.sockets.iterdir() if path.is_socket()]


@on_nodes_without_gpus
def test_where_it_was_killed_the_next_worker_has_another_one(node: Node) -> None:
    killed = node.ended()["parent"]
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: is_gone(killed))
    assert node.ended()["parent"] not in {killed, os.getpid()}


@on_nodes_without_gpus
def test_what_cannot_be_loaded_leaves_workers_to_start_as_ray_starts_them(node: Node) -> None:
    facts = node.ended(modules="no_module_is_called_so")
    assert (facts["parent"], facts["kept"]) == (os.getpid(), None)
    assert "no_module_is_called_so" in node.log.read_text()


@on_nodes_without_gpus
def test_where_it_cannot_be_started_one_worker_starts_as_ray_starts_it(node: Node) -> None:
    node.log.parent.rmdir()
    worker = node.started()
    first, _ = worker.communicate(timeout=60)
    (line,) = first.splitlines()  # not two: what was to become the server is no worker
    assert json.loads(line)["parent"] == os.getpid()


def test_what_is_no_worker_is_python_with_its_words(node: Node) -> None:
    command = [*node.command()[:7], "-c", "import sys; print(sys.argv[1:], sys.flags.safe_path)", "a b", "c"]
    done = subprocess.run(command, env=node.environment(), capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "['a b', 'c'] False\n"
    assert not list(node.sockets.iterdir())


def test_ray_starts_workers_with_the_python_of_this_node_or_that_of_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert python_kept_warm(ClusterSection()) == {}
    program = tmp_path / "a python" / "python"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nprintf "%s\\n" "here:" "$@"\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    words = python_kept_warm(ClusterSection(keep_warm=90.0, cpus_per_worker=2.5))["py_executable"]

    def run_by_ray() -> list[str]:
        """As `RuntimeEnvContext.exec_worker` has a shell do it."""
        environment = os.environ | {"PATH": f"{tmp_path / 'elsewhere'}:{os.environ['PATH']}"}
        command = ["bash", "-c", f"exec {words} {shlex.join(['/a b/default_worker.py', '--raylet-name=x'])}"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()

    modules = "raytune.training.start.start,raytune.training.tasks"
    called = ["-P", "-m", "raytune.launch.cluster.warm_starter", modules, "90", "2", "/a b/default_worker.py", "--raylet-name=x"]
    assert run_by_ray() == ["here:", *called]
    (tmp_path / "elsewhere").mkdir()
    program.rename(tmp_path / "elsewhere" / "python")  # another node's image
    assert run_by_ray() == ["here:", *called]


@pytest.mark.parametrize("field", ["pip", "image_uri", "py_executable"])
def test_another_python_of_a_job_is_refused_beside_it(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_another_python(ClusterSection(), {field: "x"})
    refuse_another_python(ClusterSection(keep_warm=90.0), {"env_vars": {"A": "b"}, field: None})
    with pytest.raises(UserError, match=rf"cluster\.keep_warm .* has {field}, with which workers start another one"):
        refuse_another_python(ClusterSection(keep_warm=90.0), {field: "x"})
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {field: "x"}, "metadata": {}}))
    with pytest.raises(UserError, match=rf"has {field},"):
        python_kept_warm(ClusterSection(keep_warm=90.0))
