"""What raylets of the tests start as their Python, and tests for a command that they run to its end: a worker, and a script of
`SCRIPTS`, is forked from the server; anything else is started as it is.

Called with the real interpreter, the server's socket, and what is to run. It stays in its place while that lives, and ends as it
does; that ends when this process is killed.
"""

import json
import os
import socket
import struct
import sys

FORKED, REFUSED = b"f", b"r"
EXIT_CODE = struct.Struct("!i")
WORKER = "/setup_worker.py"
SCRIPTS = ("launch.py", "example.py", "adapter.py")


def main() -> None:
    python, server, *arguments = sys.argv[1:]
    if arguments[0].endswith(WORKER) or arguments[0] in SCRIPTS:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(server)
            request = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
            payload = json.dumps(request).encode()
            socket.send_fds(connection, [struct.pack("!I", len(payload))], [0, 1, 2])
            connection.sendall(payload)
            if connection.recv(1) == FORKED:
                code = connection.recv(EXIT_CODE.size)  # once it ends
                sys.exit(EXIT_CODE.unpack(code)[0] if code else 1)
    os.execv(python, [python, *arguments])


if __name__ == "__main__":
    main()
