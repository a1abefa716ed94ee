"""An object store that misbehaves on purpose: a TCP server that spoils a connection, or passes it on to a good store."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

Fault = Literal["mute", "stall", "drip", "cut", "500", "403", "slow down", "pass on"]

SIZE = 1_000_000
"""Bytes that the objects of `stall`, `drip` and `cut` are said to have."""
_HEADERS = (
    b'HTTP/1.1 200 OK\r\nContent-Length: %d\r\nContent-Type: binary/octet-stream\r\nETag: "0"\r\n'
    b"Last-Modified: Sat, 28 Nov 2026 10:00:00 GMT\r\n\r\n" % SIZE
)
_REFUSALS = {"500": ("500 Server Error", "InternalError"), "403": ("403 Forbidden", "AccessDenied")}
_REFUSALS["slow down"] = ("503 Slow Down", "SlowDown")


class BadStore:
    """Listens on `url`. Connections meet the faults one after the other, and then the last one again and again.

    Args:
        faults: `mute` never answers; `stall` answers with headers and some bytes, and no more; `drip` sends a byte every half
            second; `cut` breaks off in the middle; `pass on` hands the connection to `upstream`.
    """

    def __init__(self, *faults: Fault, upstream: tuple[str, int] | None = None) -> None:
        self.faults: list[Fault] = list(faults)
        self.upstream = upstream
        self.num_connections = 0
        self._over = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._over.set()
        self._socket.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                self.num_connections += 1
                fault = self.faults.pop(0) if len(self.faults) > 1 else self.faults[0]
                threading.Thread(target=self._serve, args=(connection, fault), daemon=True).start()

    def _serve(self, connection: socket.socket, fault: Fault) -> None:
        with suppress(OSError), connection:
            if fault == "pass on":
                assert self.upstream is not None
                with socket.create_connection(self.upstream) as above:
                    threading.Thread(target=_pump, args=(connection, above), daemon=True).start()
                    _pump(above, connection)
                return
            request = connection.recv(65536)
            if fault in _REFUSALS:
                status, code = _REFUSALS[fault]
                body = b"" if request.startswith(b"HEAD") else f"<Error><Code>{code}</Code></Error>".encode()
                connection.sendall(
                    f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nConnection: close\r\n"
                    f"Content-Length: {len(body)}\r\n\r\n".encode()
                    + body
                )
                return
            if request.startswith(b"HEAD") and fault != "mute":
                connection.sendall(b"" if self.upstream else _HEADERS)  # a good store behind it has objects of other sizes
                return
            if fault != "mute":
                connection.sendall(_HEADERS)
            if fault in ("stall", "cut"):
                connection.sendall(bytes(1000))
            while fault != "cut" and not self._over.wait(0.5):
                if fault == "drip":
                    connection.sendall(b"x")


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@contextmanager
def bad_store(*faults: Fault, upstream: tuple[str, int] | None = None) -> Iterator[BadStore]:
    store = BadStore(*faults, upstream=upstream)
    try:
        yield store
    finally:
        store.close()
