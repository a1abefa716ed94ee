"""The process that workers of a cluster inside this machine are forked from: it has loaded the libraries that each of them would
load for itself, and has done nothing else.

A fork is as good as a process of its own as long as this one has no threads and has not touched a device. It loads what it is
told on its standard input, a line with a list in JSON after the other, and ends with it. A worker whose environment is not
that of this process, beyond what Ray sets for each, is left to start as Ray starts it: libraries read the environment when
they are loaded.
"""

import atexit
import gc
import importlib
import json
import os
import random
import runpy
import selectors
import shutil
import signal
import socket
import struct
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from raytune.launch.cluster.fork_starter import EXIT_CODE, FORKED, REFUSED, SIZE
from raytune.missing import TAKEN_ALONG, left_out

OF_WORKERS = {"RAY_LD_PRELOAD_ON_WORKERS", "SPT_NOENV", "PYTHONBREAKPOINT"}
"""Variables that Ray sets for workers, and that no library reads while it is loaded."""
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""What this process was given for its own sake, where its command has none: workers do without, or get it from Ray later."""
OF_SHELLS = {"PWD", "OLDPWD", "SHLVL", "_"}
OF_RAY = "RAY_"
"""How names begin of what Ray alone reads, when a worker loads it. It is not loaded here: its C++ keeps the environment as it was
then, and processes that were forked with it (2.60) died now and then of segmentation faults, in the middle of a run."""
FORK_SAFE_THREADS = {"jemalloc_bg_thd"}
"""Of pyarrow's allocator, which ends and begins it around a fork."""
CONTEXT = "--serialized-runtime-env-context="

Asked = dict[str, Any]
"""What a starter asks for (`fork_starter`)."""


_environment = dict(os.environ)
"""In which libraries were loaded here."""


def main(listener: int, path: str) -> NoReturn:
    """Answer starters until the standard input ends.

    Args:
        listener: descriptor of the socket that they connect to.
        path: of that socket, in a folder that is removed when the command has ended.
    """
    try:
        _serve(socket.socket(fileno=listener), Path(path))
        shutil.rmtree(Path(path).parent, ignore_errors=True)  # else the command goes on, and what is in there starts its workers
    finally:
        os._exit(0)  # what libraries do when they end is the business of processes that have worked with them


def _serve(listener: socket.socket, path: Path) -> None:
    ended, wakeup = socket.socketpair()
    wakeup.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
    starters: dict[int, socket.socket] = {}  # by the process that was forked for them
    with selectors.DefaultSelector() as selector:
        for source in (listener, ended, 0):
            selector.register(source, selectors.EVENT_READ)
        while True:
            # What is to be loaded comes first: who was told that it would be may ask for a worker in the same moment.
            for key, _ in sorted(selector.select(), key=lambda ready: ready[0].fileobj != 0):
                if key.fileobj == 0:
                    if not (lines := os.read(0, 1 << 16)):
                        return
                    for line in lines.splitlines():
                        _load(json.loads(line))
                elif key.fileobj is listener:
                    starter, _ = listener.accept()
                    if (pid := _forked_for(starter)) is None:
                        starter.close()
                    else:
                        starters[pid] = starter
                        selector.register(starter, selectors.EVENT_READ, pid)
                elif key.fileobj is ended:
                    ended.recv(4096)
                    _tell_ended(starters, selector)
                elif key.data in starters:  # the starter was killed; one whose process has ended in this round is closed by now
                    selector.unregister(key.fileobj)
                    os.kill(key.data, signal.SIGKILL)


def _load(modules: list[str]) -> None:
    with left_out(*TAKEN_ALONG):
        for module in modules:
            importlib.import_module(module)
    assert "ray" not in sys.modules
    gc.collect()
    gc.freeze()  # so that no collection of a worker writes into what all of them share


def _tell_ended(starters: dict[int, socket.socket], selector: selectors.BaseSelector) -> None:
    for pid in list(starters):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            starter = starters.pop(pid)
            if starter in selector.get_map():
                selector.unregister(starter)
            with suppress(OSError):  # it may have been killed meanwhile
                starter.sendall(EXIT_CODE.pack(os.waitstatus_to_exitcode(status)))
            starter.close()  # it ends now


def _forked_for(starter: socket.socket) -> int | None:
    """The process that a starter asks for; None if it has to start it itself."""
    descriptors: list[int] = []
    try:
        header, descriptors, _, _ = socket.recv_fds(starter, SIZE.size, 3)
        asked: Asked = json.loads(_received(starter, *SIZE.unpack(header)))
        if not _can_fork(asked):
            starter.sendall(REFUSED)
            return None
        starter.sendall(FORKED)
        return os.fork() or _work(asked, descriptors)
    except (OSError, struct.error):  # it was killed while it asked
        return None
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _received(starter: socket.socket, size: int) -> bytes:
    payload = b""
    while len(payload) < size:
        if not (part := starter.recv(1 << 20)):
            raise ConnectionResetError
        payload += part
    return payload


def _can_fork(asked: Asked) -> bool:
    threads = [Path(f"/proc/self/task/{thread}/comm").read_text().strip() for thread in os.listdir("/proc/self/task")]
    context = _context(asked)
    return (
        not context.get("command_prefix")
        and context.get("py_executable", sys.executable) == sys.executable
        and context.get("override_worker_entrypoint") is None
        and _as_libraries_see(asked["environment"] | context.get("env_vars", {})) == _as_libraries_see(_environment)
        and sum(name not in FORK_SAFE_THREADS for name in threads) == 1
    )


def _context(asked: Asked) -> dict[str, Any]:
    words = (word.removeprefix(CONTEXT) for word in asked["arguments"] if word.startswith(CONTEXT))
    return json.loads(next(words, "{}"))


def _as_libraries_see(environment: dict[str, str]) -> dict[str, str]:
    unread = {*OF_WORKERS, *OF_SHELLS, *THREADS}
    return {name: value for name, value in environment.items() if name not in unread and not name.startswith(OF_RAY)}


def _work(asked: Asked, descriptors: list[int]) -> NoReturn:
    """Be the worker, in the process that was forked for it: what Ray's setup_worker.py and default_worker.py do in a new one."""
    code = 1
    try:
        _be_new(asked, descriptors)
        arguments = _arguments_of_worker(asked["arguments"][1:])
        sys.argv, sys.path[0] = arguments, os.path.dirname(arguments[0])
        runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    with suppress(BaseException):  # what Python does when it ends
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _be_new(asked: Asked, descriptors: list[int]) -> None:
    """Let go of what is the server's, and take what the raylet has given to the starter."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)
    for standard, descriptor in enumerate(descriptors):
        os.dup2(descriptor, standard)
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor > 2:
            with suppress(OSError):  # the one of this listing
                os.close(descriptor)  # above all the ends of other starters, which wait for their closing
    os.nice(max(asked["niceness"] - os.nice(0), 0))
    Path("/proc/self/oom_score_adj").write_text(asked["oom_score"])
    signal.pthread_sigmask(signal.SIG_SETMASK, asked["blocked_signals"])
    for name in THREADS:
        os.environ.pop(name, None)
    os.environ.update(asked["environment"])  # beside what libraries have set while they were loaded
    os.chdir(asked["folder"])
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()


def _arguments_of_worker(words: list[str]) -> list[str]:
    """What Ray's setup_worker.py makes of its own: it sets the environment, and calls a script with the rest."""
    from ray._private.runtime_env.context import RuntimeEnvContext
    from ray._private.utils import update_envs
    from ray._private.workers.setup_worker import parser

    known, arguments = parser.parse_known_args(words)
    update_envs(RuntimeEnvContext.deserialize(known.serialized_runtime_env_context or "{}").env_vars)
    return arguments
