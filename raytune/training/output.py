"""What a worker prints, kept in the run folder: Ray keeps it in files of its session on the worker's node, and those go with it.

A thread copies what is new in these files. So nothing stands between the process and its output, and what breaks the copying
breaks no training; of a process that is killed, the last second may be missing.
"""

import logging
import os
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raytune.run_folder import RunFolder
from raytune.storage import is_local, local_path, write_bytes
from raytune.units import MIB

COPY_EVERY_S = 1.0
MOST_BYTES = 4 * MIB
"""Of a file. A local one that is full becomes the older one, which a third one replaces; of a remote one the end is kept."""

_log = logging.getLogger(__name__)


@contextmanager
def output_kept(folder: RunFolder, attempt: int, rank: int, copy_every_s: float = COPY_EVERY_S) -> Iterator[None]:
    """Keep what this process prints as long as the block lasts, if its output goes to files."""
    copy, ended = _Copy(folder, attempt, rank), threading.Event()

    def copy_for_ever() -> None:
        while not ended.wait(copy_every_s):
            copy.more()

    thread = threading.Thread(target=copy_for_ever, name="output", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        copy.more()
        copy.end()


class _Copy:
    """Copies what is added to the files that standard output and standard error go to."""

    def __init__(self, folder: RunFolder, attempt: int, rank: int) -> None:
        self._path, self._older = folder.log(attempt, rank), folder.older_log(attempt, rank)
        self._offsets = {path: path.stat().st_size for path in map(_file_of, (1, 2)) if path}
        self._content = b""
        """Of a remote file, which is written at the end."""
        self._has_failed = False

    def more(self) -> None:
        """Copy what is new."""
        try:
            self._add(b"".join(self._read(path) for path in self._offsets))
        except Exception as error:
            self._say(error)

    def end(self) -> None:
        try:
            if self._content:
                write_bytes(self._path, self._content)
        except Exception as error:
            self._say(error)

    def _read(self, path: Path) -> bytes:
        """What was added to a file."""
        with open(path, "rb") as file:
            file.seek(self._offsets[path])
            data = file.read(MOST_BYTES)
        self._offsets[path] += len(data)
        return data

    def _add(self, data: bytes) -> None:
        if not data:
            return
        if not is_local(self._path):
            self._content = (self._content + data)[-MOST_BYTES:]
            return
        path = local_path(self._path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size + len(data) > MOST_BYTES:
            path.replace(local_path(self._older))
        with open(path, "ab") as file:
            file.write(data)

    def _say(self, error: Exception) -> None:
        if not self._has_failed:
            _log.warning("What this worker prints is not kept in %s: %s. Training goes on.", self._path, error)
        self._has_failed = True


def _file_of(descriptor: int) -> Path | None:
    """The file that a descriptor of this process writes to; None if it is no plain file."""
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        return path if path.exists() else None
    except OSError:
        return None
