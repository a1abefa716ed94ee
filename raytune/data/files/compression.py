"""The bytes of a file as they were before it was compressed. What a file is compressed with its content says, not its name."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Literal

from raytune.data.files.source_files import SourceFile
from raytune.errors import DataError

Compression = Literal["gzip", "bz2", "xz", "zstd"]
# Each is no UTF-8, but for those of bzip2, which are long enough to be no text, and of frames that zstd skips, which have a
# control character.
_BEGINNINGS: dict[Compression, tuple[bytes, ...]] = {
    "gzip": (b"\x1f\x8b",),
    "bz2": tuple(b"BZh%d\x31\x41\x59\x26\x53\x59" % level for level in range(1, 10)),
    "xz": (b"\xfd7zXZ\x00",),
    # A frame, or one that is skipped, as `pzstd` writes it in front of each.
    "zstd": (b"\x28\xb5\x2f\xfd", *(b"%c\x2a\x4d\x18" % first for first in range(0x50, 0x60))),
}
_CHUNK_BYTES = 1 << 16


def compression_of(file: SourceFile) -> Compression | None:
    with file.open() as stream:
        begins = stream.read(16)
    return next((name for name, beginnings in _BEGINNINGS.items() if begins.startswith(beginnings)), None)


@contextmanager
def open_bytes(file: SourceFile, start: int = 0) -> Iterator[BinaryIO]:
    """The content of a file from an offset on. In a compressed file all that is before it is decompressed too, and dropped.

    Raises:
        DataError: while it is read, if what was compressed is damaged or cut off.
    """
    compression = compression_of(file)
    if compression is None:
        with file.open() as stream:
            stream.seek(start)
            yield stream
        return
    with (
        file.open() as raw,
        io.BufferedReader(_Decompressed(_RAW[compression](raw), file.name, compression), _CHUNK_BYTES) as stream,
    ):
        left = start
        while left and (dropped := stream.read(min(left, _CHUNK_BYTES))):
            left -= len(dropped)
        yield stream


class _Decompressed(io.RawIOBase):
    """A decompressed stream whose errors name the file: a system's error would be taken for one of the disk."""

    def __init__(self, raw: Any, name: str, compression: Compression) -> None:
        self._raw, self._name, self._compression, self._read = raw, name, compression, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            count = self._raw.readinto(buffer)
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            raise DataError(
                f"{self._name} cannot be decompressed ({self._compression}): it is damaged or cut off behind its first "
                f"{self._read} bytes of content ({error}). Copy or write it anew."
            ) from error
        self._read += count
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Streams(io.RawIOBase):
    """Compressed streams one behind another. Python's own files leave out, without a word, a later one that is damaged."""

    def __init__(self, file: BinaryIO, new: Callable[[], Any]) -> None:
        self._file, self._new, self._decompressor = file, new, new()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._decompressor.eof:
                rest = self._behind_stream()
                if not rest:
                    return 0
                self._decompressor = self._new()
            else:
                rest = self._file.read(_CHUNK_BYTES) if self._decompressor.needs_input else b""
                if self._decompressor.needs_input and not rest:
                    raise EOFError("it ends in the middle")
            if data := self._decompressor.decompress(rest, len(buffer)):
                buffer[: len(data)] = data
                return len(data)

    def _behind_stream(self) -> bytes:
        """How the next stream begins; empty if there is none. Between them there may be zeros."""
        rest = self._decompressor.unused_data.lstrip(b"\0")
        while not rest:
            if not (chunk := self._file.read(_CHUNK_BYTES)):
                return b""
            rest = chunk.lstrip(b"\0")
        return rest


def _zstd(file: BinaryIO) -> Any:
    import pyarrow  # Python has none before 3.14

    return pyarrow.input_stream(file, compression="zstd")


_RAW: dict[Compression, Callable[[BinaryIO], Any]] = {
    "gzip": lambda file: gzip.GzipFile(fileobj=file),
    "bz2": lambda file: _Streams(file, bz2.BZ2Decompressor),
    "xz": lambda file: _Streams(file, lzma.LZMADecompressor),
    "zstd": _zstd,
}
