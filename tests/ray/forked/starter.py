"""What raylets of the tests start as their Python: a worker is forked from the server, anything else is started as it is.

Called with the real interpreter, the server's socket, and what the raylet wants to run. It stays in its place while the worker
lives, and ends with it; the worker ends when this process is killed.
"""

import json
import os
import socket
import struct
import sys

FORKED, REFUSED = b"f", b"r"


def main() -> None:
    python, server, *arguments = sys.argv[1:]
    if arguments[0].endswith("/setup_worker.py"):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(server)
            request = {"arguments": arguments[1:], "environment": dict(os.environ), "folder": os.getcwd()}
            payload = json.dumps(request).encode()
            socket.send_fds(connection, [struct.pack("!I", len(payload))], [0, 1, 2])
            connection.sendall(payload)
            if connection.recv(1) == FORKED:
                connection.recv(1)  # until it ends
                return
    os.execv(python, [python, *arguments])


if __name__ == "__main__":
    main()
