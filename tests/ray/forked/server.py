"""The process that workers of the tests' clusters are forked from, and commands that a test runs to their end: it has imported
the libraries that each of them would import for itself, for six CPU seconds, most of what a short run takes.

Of Ray it imports nothing, because Ray's C++ keeps the environment that it was imported in; of raytune nothing, because workers
get that from where the run has sent it. A worker for whom a library would have read other settings while it was imported is left
to start as Ray starts it, and so is one that wants another interpreter.

Called with the path of its socket; it ends when its standard input does.
"""

import atexit
import gc
import json
import os
import random
import runpy
import selectors
import shlex
import signal
import socket
import struct
import sys
import traceback
from contextlib import suppress
from typing import Any

import deepspeed.module_inject.auto_ep_layer
import deepspeed.runtime.superoffload  # noqa: F401
import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import numpy.ma
import numpy.random
import pandas  # noqa: F401
import peft  # noqa: F401
import pyarrow.dataset  # noqa: F401
import pydantic  # noqa: F401
import rich.progress_bar
import rich.table  # noqa: F401
import setuptools  # noqa: F401
import torch
import transformers.integrations.bitsandbytes  # noqa: F401
from starter import EXIT_CODE, FORKED, REFUSED, WORKER  # beside this file
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

READ_AT_IMPORT = ("HF_", "TRANSFORMERS_", "DS_", "OMP_", "MKL_", "OPENBLAS_", "LD_")
"""How the names of variables begin that libraries read while they are imported."""
INSTALLED = sys.path[1:]
CONTEXT = "--serialized-runtime-env-context="


def serve(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as selector:
        listener.bind(path)
        listener.listen(64)
        ended, wakeup = socket.socketpair()
        wakeup.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
        starters: dict[int, socket.socket] = {}  # by process
        for source in (listener, ended, sys.stdin):
            selector.register(source, selectors.EVENT_READ)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while True:
            for key, _ in selector.select():
                if key.fileobj is sys.stdin:
                    return
                if key.fileobj is listener:
                    starter, _ = listener.accept()
                    if (pid := started(starter)) is None:
                        starter.close()
                    else:
                        starters[pid] = starter
                        selector.register(starter, selectors.EVENT_READ, pid)
                elif key.fileobj is ended:
                    ended.recv(4096)
                    for pid in list(starters):
                        found, status = os.waitpid(pid, os.WNOHANG)
                        if found:
                            starter = starters.pop(pid)
                            if starter in selector.get_map():
                                selector.unregister(starter)
                            with suppress(OSError):  # it may have been killed meanwhile
                                starter.sendall(EXIT_CODE.pack(os.waitstatus_to_exitcode(status)))
                            starter.close()  # it ends now
                elif key.data in starters:  # killed; one whose process has ended in this round too is closed by now
                    selector.unregister(key.fileobj)
                    os.kill(key.data, signal.SIGKILL)


def started(starter: socket.socket) -> int | None:
    """Fork the process that a starter asks for; None if it has to start by itself."""
    header, descriptors, _, _ = socket.recv_fds(starter, 4, 3)
    try:
        return forked(json.loads(received(starter, *struct.unpack("!I", header))), starter, descriptors)
    except (OSError, struct.error):  # it was killed while it asked
        return None
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def received(starter: socket.socket, size: int) -> bytes:
    payload = b""
    while len(payload) < size:
        if not (part := starter.recv(1 << 20)):
            raise ConnectionResetError
        payload += part
    return payload


def forked(request: dict[str, Any], starter: socket.socket, descriptors: list[int]) -> int | None:
    """The pid; None if it has to start by itself."""
    is_worker = request["arguments"][0].endswith(WORKER)
    context = json.loads(
        next((word for word in request["arguments"] if word.startswith(CONTEXT)), f"{CONTEXT}{{}}")[len(CONTEXT) :]
    )
    prefix = context.get("command_prefix", [])  # a job's is ["cd", its folder, "&&"]
    is_in_folder = len(prefix) == 3 and (prefix[0], prefix[2]) == ("cd", "&&")
    folder = shlex.split(prefix[1])[0] if is_in_folder else request["folder"]
    can_fork = (is_in_folder or not prefix) and context.get("py_executable", sys.executable) == sys.executable
    can_fork &= of_imports(request["environment"] | context.get("env_vars", {})) == of_imports(dict(os.environ))
    starter.sendall(FORKED if can_fork else REFUSED)
    pid = None
    if can_fork and (pid := os.fork()) == 0:
        become(is_worker, request["arguments"], request["environment"], folder, descriptors)
    return pid


def of_imports(environment: dict[str, str]) -> dict[str, str]:
    """What libraries have read. Of telemetry runs have a setting and other workers none, and it makes no difference offline."""
    read = {name: value for name, value in environment.items() if name.startswith(READ_AT_IMPORT)}
    return read | {"HF_HUB_DISABLE_TELEMETRY": "1"}


def become(is_worker: bool, words: list[str], environment: dict[str, str], folder: str, descriptors: list[int]) -> None:
    """Do what Python would do with these words in a new process, or Ray's setup_worker.py for a worker. Does not return."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setpgid(0, 0)
        for standard, descriptor in enumerate(descriptors):
            os.dup2(descriptor, standard)
        os.closerange(3, 1024)  # above all the server's ends of other starters, which wait for their closing
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        arguments = arguments_of_worker(words[1:]) if is_worker else words
        for seed in (random.seed, numpy.random.seed, torch.seed):
            seed()
        named = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
        sys.path[:] = [os.path.dirname(arguments[0]), *named, *INSTALLED]
        sys.argv = arguments
        if not is_worker:
            sys.executable = environment["PYTHON_OF_RAYLETS"]  # as site/sitecustomize.py does
        runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def arguments_of_worker(words: list[str]) -> list[str]:
    """What Ray's setup_worker.py makes of its own: sets the environment and gives the worker's script and its arguments."""
    from ray._private.runtime_env.context import RuntimeEnvContext
    from ray._private.utils import update_envs
    from ray._private.workers.setup_worker import parser

    known, arguments = parser.parse_known_args(words)
    update_envs(RuntimeEnvContext.deserialize(known.serialized_runtime_env_context or "{}").env_vars)
    return arguments


def main() -> None:
    assert not {"ray", "raytune"} & set(sys.modules)
    get_checkpoint_conversion_mapping("llama")  # of all models: a thousand regular expressions, compiled once
    gc.collect()
    gc.freeze()
    serve(sys.argv[1])


if __name__ == "__main__":
    main()
