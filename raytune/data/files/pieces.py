"""Files that a run reads while it trains: what they are when it is planned, and pieces of them, fetched ahead of who reads.

A file is held to be the one that it was by its size and what its storage changes with each write: the time, an ETag. One behind a
URL is asked for in pieces of a few MiB; once its pieces are read one after another, a few threads ask for the next ones, those of
the next files too, as far ahead as they may. What they hold is bounded by that, and lies in memory alone.
"""

import io
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from raytune.errors import DataError, RaytuneError
from raytune.local_files import local_errors
from raytune.object_store import is_of_a_commit, limit_of, retry, shown
from raytune.storage import chunk_of, is_local, local_path
from raytune.units import MIB

PIECE_BYTES = 4 * MIB
KEPT_PIECES = 4
"""Beside those ahead: the one that is read, and the end of a Parquet file, where its columns are listed."""
_BUFFER_BYTES = 1 << 18
_MOST_THREADS = 8
_LOOK_AGAIN_S = 0.2
"""How often who waits for a piece looks whether anybody still wants it."""
_MARKS = ("ETag", "generation", "etag", "blob_id", "md5Hash", "LastModified", "last_modified", "mtime", "created")
"""What stores tell of a file that changes when it is written again, the surest first."""


@dataclass(frozen=True, slots=True)
class Version:
    """What a file is at some time."""

    size: int
    """Bytes."""
    mark: str
    """What is another one once the file was written again; empty where nothing is."""


def version_of(path: str) -> Version:
    """What a file is now.

    Raises:
        DataError: if there is none.
        RaytuneError: if its storage cannot be asked.
    """
    try:
        if is_local(path):
            with local_errors(path):
                found = local_path(path).stat()
            return Version(found.st_size, str(found.st_mtime_ns))
        version = retry(_version, "look for", path)
    except FileNotFoundError as error:
        raise DataError(f"There is no file '{shown(path)}'.") from error
    if version.size < 0 or not (version.mark or is_of_a_commit(path)):
        what = "how large it is" if version.size < 0 else "when it is written again"
        raise DataError(
            f"{shown(path)} cannot be streamed: its storage does not say {what}. Of a hub name a commit "
            f"(hf://datasets/OWNER/NAME@COMMIT/FILE); a file of a web server copy to a folder that every node mounts.",
            keys=("data.train",),
        )
    return version


def refuse_another(path: str, version: Version) -> None:
    """Refuse a local file that is not what it was.

    Raises:
        DataError: with what it was and what it is.
    """
    try:
        with local_errors(path):
            found = local_path(path).stat()
    except FileNotFoundError as error:
        raise _gone(path, version) from error
    _compare(path, version, Version(found.st_size, str(found.st_mtime_ns)))


def _version(files: Any, name: str) -> Version:
    info = files.info(name)
    mark = next((str(info[mark]) for mark in _MARKS if info.get(mark)), "")
    return Version(-1 if info["size"] is None else int(info["size"]), mark)


def _compare(path: str, version: Version, now: Version) -> None:
    if now != version:
        raise DataError(
            f"{shown(path)} is another file than when this run was planned: it had {version.size} bytes and has {now.size}, and "
            f"its mark was {version.mark or 'none'} and is {now.mark or 'none'}. A stream goes on in the files that it began "
            f"with. Put back what it was, or begin a run of another name.",
            keys=("data.train",),
        )


def _gone(path: str, version: Version) -> DataError:
    return DataError(
        f"{shown(path)}, {version.size} bytes when this run was planned, is gone. Put it back.", keys=("data.train",)
    )


def read_piece(url: str, version: Version, start: int, stop: int) -> bytes:
    """Bytes of a file behind a URL, if it is what it was.

    Raises:
        DataError: if it is not.
        UserError, ClusterError: see `object_store.retry`.
    """

    def read(files: Any, name: str) -> bytes:
        try:
            return chunk_of(files, name, start, stop)
        finally:  # behind the answer, whatever it was: what was written before it is seen
            if not is_of_a_commit(url):
                try:
                    now = _version(files, name)
                except FileNotFoundError as error:
                    raise _gone(url, version) from error
                _compare(url, version, now)

    return retry(read, "read", url, limit_s=limit_of(stop - start))


@dataclass(slots=True, eq=False)
class _Piece:
    file: int
    number: int
    content: bytes = b""
    error: BaseException | None = None
    is_here: bool = False
    num_readers: int = 0
    """That wait for it."""


class _Closed(RaytuneError):
    """Nobody wants what is waited for."""


class FilesAhead:
    """Files behind URLs that are read one behind another, and the first one again behind the last.

    Args:
        files: their URLs, and what each of them is.
        num_bytes: to fetch ahead of what is read, at most; 0: what is asked for alone.
    """

    def __init__(self, files: Sequence[tuple[str, Version]], num_bytes: int) -> None:
        self._files = list(files)
        self._index = {url: index for index, (url, _) in enumerate(files)}
        self._most_ahead = -(-num_bytes // PIECE_BYTES)
        self._num_ahead = 0
        """How far is fetched ahead now: twice as far with each piece, so that who looks at a beginning asks for little more."""
        self._last: tuple[int, int] | None = None
        self._pieces: dict[tuple[int, int], _Piece] = {}
        """Asked for, the oldest first."""
        self._ahead: set[tuple[int, int]] = set()
        """Those of them that are to be read next."""
        self._wanted: deque[_Piece] = deque()
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._is_closed = False

    def open(self, url: str) -> BinaryIO:
        """A file from its first byte on."""
        index = self._index[url]
        return io.BufferedReader(_FileAhead(self, index, self._files[index][1].size), _BUFFER_BYTES)

    def piece(self, file: int, number: int) -> bytes:
        """A piece of a file, when it is here.

        Raises:
            RaytuneError: why it cannot be had.
        """
        key = (file, number)
        with self._changed:
            if self._is_closed:
                raise _Closed
            follows = self._last is None or key in self._pieces or key == self._behind(self._last)
            piece = self._pieces.get(key) or self._ask(key, is_first=True)
            piece.num_readers += 1
            if follows and key != self._last:
                self._num_ahead = min(max(1, 2 * self._num_ahead), self._most_ahead)
                self._ask_ahead(key)
            self._last = key
            self._forget()
            while not piece.is_here and not self._is_closed:
                self._changed.wait(_LOOK_AGAIN_S)
            piece.num_readers -= 1
        if piece.error is not None:
            raise piece.error
        if not piece.is_here:
            raise _Closed
        return piece.content

    def close(self) -> None:
        """Ask for nothing more. An answer that is on its way is thrown away when it comes."""
        with self._changed:
            self._is_closed = True
            self._wanted.clear()
            self._pieces.clear()
            self._changed.notify_all()

    def _behind(self, key: tuple[int, int]) -> tuple[int, int]:
        file, number = key[0], key[1] + 1
        while number * PIECE_BYTES >= self._files[file][1].size:
            file, number = (file + 1) % len(self._files), 0
            if self._files[file][1].size:
                break
        return file, number

    def _ask_ahead(self, key: tuple[int, int]) -> None:
        self._ahead, behind = set(), key
        for _ in range(self._num_ahead):
            behind = self._behind(behind)
            if behind == key:
                return
            self._ahead.add(behind)
            if behind not in self._pieces:
                self._ask(behind, is_first=False)

    def _ask(self, key: tuple[int, int], *, is_first: bool) -> _Piece:
        piece = self._pieces[key] = _Piece(*key)
        (self._wanted.appendleft if is_first else self._wanted.append)(piece)
        if len(self._threads) < min(_MOST_THREADS, self._most_ahead + 1):
            # Not of a pool, whose threads Python waits for at its end: one that waits for a store is left behind.
            self._threads.append(threading.Thread(target=self._fetch, name="read ahead", daemon=True))
            self._threads[-1].start()
        self._changed.notify_all()
        return piece

    def _forget(self) -> None:
        """Let go of the oldest pieces that nobody is about to read."""
        idle = [key for key, piece in self._pieces.items() if not piece.num_readers and key not in self._ahead]
        for key in idle[: max(0, len(self._pieces) - self._most_ahead - KEPT_PIECES)]:
            piece = self._pieces.pop(key)
            if not piece.is_here and piece in self._wanted:
                self._wanted.remove(piece)

    def _fetch(self) -> None:
        while (piece := self._next()) is not None:
            url, version = self._files[piece.file]
            start = piece.number * PIECE_BYTES
            try:
                piece.content = read_piece(url, version, start, min(start + PIECE_BYTES, version.size))
            except BaseException as error:  # whoever reads it is told
                piece.error = error
            with self._changed:
                piece.is_here = True
                self._changed.notify_all()

    def _next(self) -> _Piece | None:
        with self._changed:
            while not self._wanted and not self._is_closed:
                self._changed.wait()
            return self._wanted.popleft() if self._wanted else None


class _FileAhead(io.RawIOBase):
    """A file in the pieces of all."""

    def __init__(self, files: FilesAhead, index: int, size: int) -> None:
        self._files, self._index, self._size, self._at = files, index, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        if self._at >= self._size:
            return 0
        number, first = divmod(self._at, PIECE_BYTES)
        content = memoryview(self._files.piece(self._index, number))[first : first + len(buffer)]
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)
