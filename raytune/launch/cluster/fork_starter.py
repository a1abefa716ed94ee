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
WORKER = "/setup_worker.py"


def main() -> None:
    python, server, *arguments = sys.argv[1:]
    if arguments and arguments[0].endswith(WORKER):
        try:
            code = _forked(server, arguments)
        except OSError:  # no server any more: it starts as Ray would start it
            code = None
        if code is not None:
            os._exit(code)
    os.execv(python, [python, *arguments])


def _forked(server: str, arguments: list[str]) -> int | None:
    """The exit code of the worker once it has ended; None if it has to be started here."""
    with open("/proc/self/oom_score_adj") as file:
        oom_score = file.read()
    asked = {
        "arguments": arguments,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        # What Ray has set for the process that it means to start.
        "niceness": os.nice(0),
        "oom_score": oom_score,
        "blocked_signals": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
    }
    payload = json.dumps(asked).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(server)
        socket.send_fds(connection, [SIZE.pack(len(payload))], [0, 1, 2])
        connection.sendall(payload)
        if connection.recv(1) != FORKED:
            return None
        code = connection.recv(EXIT_CODE.size)  # once it ends
        return EXIT_CODE.unpack(code)[0] & 0xFF if code else 1


if __name__ == "__main__":
    main()
