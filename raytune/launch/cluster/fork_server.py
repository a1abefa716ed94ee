"""The process that workers of a cluster are forked from: it has loaded the libraries that each of them would
load for itself, and has done nothing else.

A fork is as good as a process of its own as long as this one has no threads and has not touched a device. A command's own one
(`main`) loads what it is told on its standard input, a line with a list in JSON after the other, and ends with it; one that is
kept between commands (`stay`) goes with the raylet that it works for. A worker whose environment is not that of this process,
beyond what Ray sets for each, is left to start as Ray starts it: libraries read the environment when they are loaded.
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
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from raytune.launch.cluster.fork_starter import (
    EXIT_CODE,
    FORKED,
    LEAVE,
    REFUSED,
    SETS_UP,
    SIZE,
    THREADS,
    as_libraries_see,
    cgroup,
)
from raytune.missing import TAKEN_ALONG, left_out

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
        _serve(listener, Path(path), 0, _asked_to_load)
        shutil.rmtree(Path(path).parent, ignore_errors=True)  # else the command goes on, and what is in there starts its workers
    finally:
        os._exit(0)  # what libraries do when they end is the business of processes that have worked with them


def stay(listener: int, path: str, modules: Sequence[str], raylet: int, idle_s: float) -> NoReturn:
    """Answer starters of one raylet, for command after command, until that raylet ends, or for `idle_s` none of them has had a
    worker, or a file of what is loaded is not what it was, or it is told to leave.

    Args:
        listener, path: as for `main`; the socket is removed.
        modules: what it loads.
        raylet: its process.
    """
    try:
        lifeline = os.pidfd_open(raylet)
        _load(modules)
        files = [file for module in list(sys.modules.values()) if (file := vars(module).get("__file__"))]
        as_loaded = _changes(files)
        _serve(listener, Path(path), lifeline, lambda: False, idle_s=idle_s, is_current=lambda: _changes(files) == as_loaded)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        os._exit(0)


def _changes(files: Sequence[str]) -> list[int | None]:
    """When each was changed; None where it is not there any more."""
    changes: list[int | None] = []
    for file in files:
        try:
            changes.append(os.stat(file).st_mtime_ns)
        except OSError:
            changes.append(None)
    return changes


def _asked_to_load() -> bool:
    """Load what the standard input says, a list in JSON on each line. False once it has ended."""
    lines = os.read(0, 1 << 16)
    for line in lines.splitlines():
        _load(json.loads(line))
    return bool(lines)


def _serve(
    listening: int,
    path: Path,
    lifeline: int,
    goes_on: Callable[[], bool],
    *,
    idle_s: float | None = None,
    is_current: Callable[[], bool] = lambda: True,
) -> None:
    """Fork for whoever connects.

    Args:
        listening: descriptor of the socket whose path it is.
        lifeline: descriptor; when something can be read from it, `goes_on` reads it and says whether this is to go on.
        idle_s: after which it ends where nobody has a process; None: never.
        is_current: whether it may be forked from still. Once it may not, or is told to leave, the socket is given up, and this
            ends with its last process.
    """
    ended, wakeup = socket.socketpair()
    wakeup.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
    starters: dict[int, socket.socket] = {}  # by the process that was forked for them
    listens = True
    with socket.socket(fileno=listening) as listener, selectors.DefaultSelector() as selector:
        for source in (listener, ended, lifeline):
            selector.register(source, selectors.EVENT_READ)
        while listens or starters:
            ready = selector.select(None if starters else idle_s)
            if not ready:
                break
            # What is to be loaded comes first: who was told that it would be may ask for a worker in the same moment.
            for key, _ in sorted(ready, key=lambda one: one[0].fileobj != lifeline):
                if key.fileobj == lifeline:
                    if not goes_on():
                        path.unlink(missing_ok=True)
                        return
                elif key.fileobj is listener:
                    starter, _ = listener.accept()
                    if starter.recv(SIZE.size, socket.MSG_PEEK) == LEAVE or not is_current():
                        listens = False
                        path.unlink(missing_ok=True)  # the next starter has another one made; who is here by now starts by itself
                        selector.unregister(listener)
                        listener.close()
                        starter.close()
                    elif (pid := _forked_for(starter)) is None:
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
        if listens:
            path.unlink(missing_ok=True)  # before it is closed: whoever finds it closed has another one made at this path


def _load(modules: Sequence[str]) -> None:
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
        and as_libraries_see(asked["environment"] | context.get("env_vars", {})) == as_libraries_see(_environment)
        and asked["cgroup"] == cgroup()
        and sum(name not in FORK_SAFE_THREADS for name in threads) == 1
    )


def _context(asked: Asked) -> dict[str, Any]:
    words = (word.removeprefix(CONTEXT) for word in asked["arguments"] if word.startswith(CONTEXT))
    return json.loads(next(words, "{}"))


def _work(asked: Asked, descriptors: list[int]) -> NoReturn:
    """Be the worker, in the process that was forked for it: what Ray's setup_worker.py and default_worker.py do in a new one."""
    code = 1
    try:
        _be_new(asked, descriptors)
        arguments = _arguments_of_worker(asked["arguments"])
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
    if not words[0].endswith(SETS_UP):  # it has done so
        return words
    from ray._private.runtime_env.context import RuntimeEnvContext
    from ray._private.utils import update_envs
    from ray._private.workers.setup_worker import parser

    known, arguments = parser.parse_known_args(words[1:])
    update_envs(RuntimeEnvContext.deserialize(known.serialized_runtime_env_context or "{}").env_vars)
    return arguments
