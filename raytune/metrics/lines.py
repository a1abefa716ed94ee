"""Files that JSON lines are added to, on a disk or in an object store."""

import json
import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from raytune.errors import RaytuneError
from raytune.local_files import local_errors
from raytune.object_store import once, shown
from raytune.storage import exists, is_local, local_path, read_bytes, write_bytes

_log = logging.getLogger(__name__)


class LineWriter:
    """Adds lines to a file. Threads may share it, and processes may write to the same file.

    What a thread still has to say after the file was closed is written too, line by line.

    Args:
        upload_every_s: an object store cannot append, so that there the whole file is written again, at most this often.
    """

    def __init__(self, path: str | Path, upload_every_s: float) -> None:
        self._lines = _LocalLines(local_path(path)) if is_local(path) else _RemoteLines(str(path), upload_every_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Close; where something else ended the block, that is told and not what became of the last lines."""
        try:
            self.close()
        except RaytuneError as failure:
            if kind is None:
                raise
            _log.warning("The last lines were not written: %s", failure)

    def flush(self) -> None:
        """Bring every line to the storage itself."""
        self._lines.flush()

    def close(self) -> None:
        """Flush, and write no more."""
        self._lines.close()


def _encode(record: Mapping[str, object]) -> bytes:
    return json.dumps(record, allow_nan=False, ensure_ascii=False).encode() + b"\n"


class _LocalLines:
    """Appends to a local file; a line is one write, so that readers and other writers never see half of one."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock, self._is_closed = path, threading.Lock(), False
        with local_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            # Half a line is what a killed writer left; the next line must not continue it.
            os.ftruncate(self._descriptor, path.read_bytes().rfind(b"\n") + 1)

    def add(self, record: Mapping[str, object]) -> None:
        line = _encode(record)
        with self._lock, local_errors(self._path):
            if self._is_closed:  # its number may be that of another file by now
                with open(self._path, "ab", buffering=0) as file:
                    file.write(line)
                return
            while line:  # more than one write only where the disk is full, and then the second one says so
                line = line[os.write(self._descriptor, line) :]

    def flush(self) -> None:
        with self._lock:
            if not self._is_closed:
                with local_errors(self._path):
                    os.fsync(self._descriptor)

    def close(self) -> None:
        try:
            self.flush()
        finally:
            with self._lock:
                if not self._is_closed:
                    self._is_closed = True
                    os.close(self._descriptor)


class _RemoteLines:
    """Gathers lines, and a thread that adds them to what the object holds by then.

    Two writers keep each other's lines unless they upload in the same fraction of a second: an object store cannot append, and
    not every one can refuse to overwrite.
    """

    def __init__(self, path: str, upload_every_s: float) -> None:
        self._path, self._every_s = path, upload_every_s
        self._pending = bytearray()
        self._adding, self._uploading = threading.Lock(), threading.Lock()
        self._closed = threading.Event()
        threading.Thread(target=self._upload_for_ever, name=f"upload {path}", daemon=True).start()

    def add(self, record: Mapping[str, object]) -> None:
        with self._adding:
            self._pending += _encode(record)
        if self._closed.is_set():
            self.flush()  # nobody else will

    def flush(self) -> None:
        with self._uploading:
            with self._adding:
                lines = bytes(self._pending)
            if not lines:
                return
            content = read_bytes(self._path) if exists(self._path) else b""
            write_bytes(self._path, content[: content.rfind(b"\n") + 1] + lines)
            with self._adding:
                del self._pending[: len(lines)]

    def close(self) -> None:
        self._closed.set()
        self.flush()

    def _upload_for_ever(self) -> None:
        is_away = False
        while not self._closed.wait(self._every_s):
            try:
                with once():
                    self.flush()
            except RaytuneError as error:  # the lines are kept, and the next turn or `close` tries again
                if not is_away:
                    _log.warning("Lines of %s wait until the storage answers again: %s", shown(self._path), error)
                is_away = True
            else:
                if is_away:
                    _log.warning("The lines of %s that waited have arrived.", shown(self._path))
                is_away = False
