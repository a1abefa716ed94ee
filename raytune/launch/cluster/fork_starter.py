"""What a raylet starts in place of Python: a worker is forked from the server (`fork_server`), anything else is Python with what
it is given. Standard library only, and little of that: it stands in each worker's way.

Called with the interpreter, the server's socket, and what the interpreter was to be called with. It stays while the worker lives,
and ends as it does; the worker is killed when this process is.
"""

import json
import os
import signal
import socket
import struct
import sys

FORKED, REFUSED = b"f", b"r"
EXIT_CODE = struct.Struct("!i")
SIZE = struct.Struct("!I")
LEAVE = SIZE.pack(0)
"""In place of what is asked for: that the server forks for nobody any more."""
SETS_UP = "/setup_worker.py"
"""Ray's script that sets the environment of a worker, and then calls the worker's own."""
OF_WORKERS = {"RAY_LD_PRELOAD_ON_WORKERS", "SPT_NOENV", "PYTHONBREAKPOINT"}
"""Variables that Ray sets for workers, and that no library reads while it is loaded."""
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""What the server was given for its own sake, where its command has none: workers do without, or get it from Ray later."""
OF_SHELLS = {"PWD", "OLDPWD", "SHLVL", "_"}
OF_RAY = "RAY_"
"""How names begin of what Ray alone reads, when a worker loads it. The server does not: Ray's C++ keeps the environment as it was
then, and processes that were forked with it (2.60) died now and then of segmentation faults, in the middle of a run."""

ANSWER_S = 120.0
"""Longest wait for a server, which may be loading what it is to have loaded."""


def main() -> None:
    python, server, *arguments = sys.argv[1:]
    if arguments and arguments[0].endswith(SETS_UP):
        try:
            code = forked(server, arguments)
        except OSError:  # no server any more: it starts as Ray would start it
            code = None
        if code is not None:
            os._exit(code)
    os.execv(python, [python, *arguments])


def as_libraries_see(environment: dict[str, str]) -> dict[str, str]:
    """What a library may read of an environment while it is loaded."""
    unread = {*OF_WORKERS, *OF_SHELLS, *THREADS}
    return {name: value for name, value in environment.items() if name not in unread and not name.startswith(OF_RAY)}


def cgroup() -> str:
    """Which limits of the kernel this process is under: it hands them on to what is forked from it."""
    with open("/proc/self/cgroup") as file:
        return file.read()


def forked(server: str, arguments: list[str]) -> int | None:
    """Have a worker forked.

    Args:
        server: path of its socket.
        arguments: that Python was to be called with.

    Returns:
        The exit code of the worker, once it has ended; None if it has to be started here.

    Raises:
        OSError: if there is no server any more, or it does not answer: the worker has to be started here then too.
    """
    with open("/proc/self/oom_score_adj") as file:
        oom_score = file.read()
    asked = {
        "arguments": arguments,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "cgroup": cgroup(),
        # What Ray has set for the process that it means to start.
        "niceness": os.nice(0),
        "oom_score": oom_score,
        "blocked_signals": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
    }
    payload = json.dumps(asked).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(ANSWER_S)
        connection.connect(server)
        socket.send_fds(connection, [SIZE.pack(len(payload))], [0, 1, 2])
        connection.sendall(payload)
        if connection.recv(1) != FORKED:
            return None
        connection.settimeout(None)
        code = connection.recv(EXIT_CODE.size)  # once it ends
        return EXIT_CODE.unpack(code)[0] & 0xFF if code else 1


if __name__ == "__main__":
    main()
