"""How workers of a cluster inside this machine start in a moment: the raylet calls a program in place of Python (`fork_starter`),
and that has them forked from a process which has loaded the libraries (`fork_server`), once for all of them."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from raytune.launch.cluster import fork_starter
from raytune.launch.cluster.gpu_drivers import may_have_gpus

OF_RANKS = ("raytune.training.start.start", "raytune.training.tasks")
"""What each rank loads, whatever it is about to train."""
_SERVE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from raytune.launch.cluster.fork_server import main; "
    "main(int(sys.argv[2]), sys.argv[3])"
)
_server: "Server | None" = None


@contextmanager
def python_of_workers(folder: str, cpus_per_worker: float) -> Iterator[str]:
    """The program that a raylet of this machine is to start as its Python, for as long as the block lasts.

    Args:
        folder: for files that are as short-lived.
    """
    global _server
    # Libraries ask a GPU's driver while they are loaded, and a process that has asked it cannot be forked from.
    if may_have_gpus() or _is_script(sys.executable):
        yield sys.executable
        return
    _server = Server(folder, threads=max(int(cpus_per_worker), 1))
    try:
        yield _server.program
    finally:
        _server.end()
        _server = None


def _is_script(program: str) -> bool:
    """Whether something stands in Python's place, such as what profiles each process: then that is how workers are to start."""
    with open(program, "rb") as file:
        return file.read(2) == b"#!"


def load_for_ranks(*modules: str) -> None:
    """Have modules loaded once for all ranks that start from now on, where those are forked."""
    if _server:
        _server.load(*modules)


class Server:
    """The process that workers are forked from.

    Args:
        folder: in which it makes one of its own, and removes it when it ends or this process does.
        threads: those that Ray gives to libraries of a worker which ask the environment for their number.
        modules: what it loads at once.
    """

    def __init__(self, folder: str, threads: int, modules: Sequence[str] = OF_RANKS) -> None:
        self._folder = tempfile.mkdtemp(prefix="raytune-", dir=folder)
        path, self.program = f"{self._folder}/socket", f"{self._folder}/python"
        words = [sys.executable, "-IS", fork_starter.__file__, sys.executable, path]
        Path(self.program).write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        os.chmod(self.program, 0o700)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(128)
            self._process = subprocess.Popen(
                [sys.executable, "-c", _SERVE, json.dumps(sys.path), str(listener.fileno()), path],
                # numpy would have its threads at once, which nothing can be forked from, and uses none for what ranks do with it.
                env={"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": "1"} | os.environ,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[listener.fileno()],
                start_new_session=True,
            )
        self.load(*modules)

    @property
    def pid(self) -> int:
        return self._process.pid

    def load(self, *modules: str) -> None:
        """Have modules loaded before workers that ask from now on are forked."""
        assert self._process.stdin is not None
        with suppress(OSError):  # it has died, and workers start as Ray starts them
            os.write(self._process.stdin.fileno(), f"{json.dumps(modules)}\n".encode())

    def end(self) -> None:
        """End it, whatever it is at; processes that were forked from it live on."""
        self._process.kill()
        self._process.communicate()
        shutil.rmtree(self._folder, ignore_errors=True)
