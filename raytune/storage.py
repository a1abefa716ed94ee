"""Bytes of a run, on a local disk or behind an fsspec URL (s3:// gs:// abfs:// memory://): the same few verbs for both.

Nothing that was uploaded counts before it was read back: `pyarrow.fs.copy_files` reports success for uploads that the server
refused (docs/facts.md). A missing file is FileNotFoundError from every verb; a server that does not answer is never taken
for a missing file, since a run would then start from scratch beside its own checkpoints.

Long because each verb stands beside its twin for the other kind of storage, and the pair is read together.
"""

import errno
import hashlib
import json
import os
import posixpath
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from raytune.errors import ClusterError, UserError
from raytune.local_files import create_file, local_errors, replace_file
from raytune.object_store import (
    bucket_must_exist,
    file_system,
    in_time,
    limit_of,
    moved,
    refuse_web_page,
    retry,
    shown,
    upload_must_arrive,
)
from raytune.units import MIB

CHUNK_BYTES = 8 * MIB
MOST_PARTS = 9_000
"""Of an upload in parts; S3 allows 10,000."""
PARALLEL_FILES = 8

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Digest:
    """What a file's content is, as far as anybody can tell."""

    size: int
    sha256: str


# --- Paths -------------------------------------------------------------------------------------------------------------------


def is_local(path: str | Path) -> bool:
    """Whether the path lies on a mounted file system; `file://` URLs do."""
    text = str(path)
    return "://" not in text or text.startswith("file://")


def local_path(path: str | Path) -> Path:
    """The absolute `Path` of a local path or `file://` URL."""
    return Path(os.path.abspath(os.path.expanduser(str(path).removeprefix("file://"))))


def absolute(path: str | Path) -> str:
    """The path as every process can use it: local ones absolute, URLs without a trailing slash."""
    return str(local_path(path)) if is_local(path) else str(path).rstrip("/")


# --- Small files -------------------------------------------------------------------------------------------------------------


def read_bytes(path: str | Path) -> bytes:
    """The whole content of a file.

    Raises:
        FileNotFoundError: if there is no such file.
        UserError, ClusterError: see `retry`.
    """
    if is_local(path):
        with local_errors(path):
            return local_path(path).read_bytes()
    return retry(_content, "read", path, limit_s=None)


def read_from(path: str | Path, offset: int) -> bytes:
    """What a file holds from an offset on; nothing where it is no longer than that. What comes before is not read.

    Raises:
        FileNotFoundError: if there is no such file.
        UserError, ClusterError: see `retry`.
    """
    if is_local(path):
        with local_errors(path), open(local_path(path), "rb") as file:
            file.seek(offset)
            return file.read()
    return retry(partial(_content, offset=offset), "read", path, limit_s=None)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Put a file in place whole: a reader sees the old content or the new one, and the new one survives a power cut.

    Raises:
        StorageFullError: if the disk is full; the old content is intact.
        UserError, ClusterError: see `retry`.
    """
    if is_local(path):
        replace_file(local_path(path), lambda file: file.write(data))
        return

    def put(files: Any, name: str) -> None:
        with bucket_must_exist(path):
            files.pipe_file(name, data)
        with upload_must_arrive(path):
            stored = files.cat_file(name)
        if stored != data:
            raise OSError(f"{shown(path)} does not hold what was just written to it")

    retry(put, "write", path, limit_s=limit_of(2 * len(data)))


def create_bytes(path: str | Path, data: bytes) -> bool:
    """Create a file that is not there yet. Of any number of processes that create one file, one succeeds.

    Readers may see it before it is whole. An object store that cannot refuse to overwrite lets the last writer win, and the ones
    before it learn that only by reading the file again later.

    Args:
        data: unlike what any other process would write.

    Returns:
        Whether the file holds `data`; False if somebody else's is there.

    Raises:
        StorageFullError, UserError, ClusterError: see `retry`.
    """
    if is_local(path):
        return create_file(local_path(path), data)

    def create(files: Any, name: str) -> bool:
        with suppress(FileExistsError), bucket_must_exist(path):  # may be our own: the answer to an earlier try was lost
            files.pipe_file(name, data, mode="create")
        with upload_must_arrive(path):
            return files.cat_file(name) == data

    return retry(create, "create", path)


def read_json(path: str | Path) -> Any:
    """The value in a JSON file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not JSON in UTF-8.
    """
    return json.loads(read_bytes(path).decode())


def write_json(path: str | Path, value: object) -> None:
    """Put a value in place as strict JSON; not-a-number and infinity are refused (`metrics.json_numbers` spells them)."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode())


# --- Looking -----------------------------------------------------------------------------------------------------------------


def exists(path: str | Path) -> bool:
    """Whether there is a file or folder. False only on the storage's own word, never because it could not be asked."""
    if is_local(path):
        with local_errors(path):
            return os.path.lexists(local_path(path))

    def look(files: Any, name: str) -> bool:
        try:  # not `files.exists`, which takes every error for "no"
            files.info(name)
        except FileNotFoundError:
            return False
        return True

    return retry(look, "look for", path)


def refuse_unusable(path: str | Path) -> None:
    """Refuse a folder that cannot be made or written here, or a URL that nothing here can open. Writes nothing.

    Raises:
        UserError: saying why.
    """
    if not is_local(path):
        file_system(path)
        return
    with local_errors(path):
        there = next(folder for folder in (local_path(path), *local_path(path).parents) if folder.exists())
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{there} is a file, not a folder")
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, f"{there} cannot be written by this user")


def list_folder(path: str | Path) -> list[str]:
    """Names directly inside a folder, sorted; none if there is no such folder."""
    if is_local(path):
        try:
            with local_errors(path):
                return sorted(os.listdir(local_path(path)))
        except FileNotFoundError:
            return []

    def look(files: Any, name: str) -> list[str]:
        try:
            entries = files.ls(name, detail=False)
        except FileNotFoundError:
            return []
        return sorted({posixpath.basename(str(entry).rstrip("/")) for entry in entries} - {"", posixpath.basename(name)})

    return retry(look, "list", path)


def file_sizes(path: str | Path) -> dict[str, int]:
    """Bytes of every file below a folder by its name relative to it, with `/`; empty if there is no such folder."""
    if is_local(path):
        root = local_path(path)
        with local_errors(path):
            return {file.relative_to(root).as_posix(): file.stat().st_size for file in sorted(root.rglob("*")) if file.is_file()}

    def look(files: Any, name: str) -> dict[str, int]:
        prefix = name.rstrip("/") + "/"
        found = files.find(name, detail=True)
        return {str(file).removeprefix(prefix): int(info["size"]) for file, info in sorted(found.items())}

    return retry(look, "list", path)


def free_bytes(path: str | Path) -> int | None:
    """Bytes that can still be written there, or None where the storage does not say. The folder need not exist yet."""
    if not is_local(path):
        return None
    folder = local_path(path)
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def file_digest(path: str | Path) -> Digest:
    """Size and hash of a file, read through once."""
    if is_local(path):
        with local_errors(path), open(local_path(path), "rb") as file:
            return _copy(file, None)
    return _read_through(path, None)


# --- Removing and moving -----------------------------------------------------------------------------------------------------


def remove_folder(path: str | Path, root: str | Path) -> None:
    """Remove a folder (or file) below `root` with everything in it; nothing happens if it is not there.

    Symbolic links are removed, never followed: what they point to stays.

    Raises:
        UserError: if the path is not strictly inside `root`.
    """
    if not is_local(path):
        _remove_remote(str(path), str(root))
        return
    target, base = local_path(path), local_path(root).resolve()
    # Only the parents may be resolved: resolving the last name would follow it if it is a link.
    real = target.parent.resolve() / target.name
    if not is_local(root) or base not in real.parents:
        raise UserError(f"Refusing to delete {path}: it is not inside {root}.")
    with suppress(FileNotFoundError), local_errors(path):
        if real.is_symlink() or real.is_file():
            real.unlink()
        else:
            shutil.rmtree(real)  # does not follow links inside


def remove_empty_folder(path: str | Path) -> None:
    """Remove a folder if nothing is in it. An object store has no empty folders."""
    if is_local(path):
        with suppress(OSError):
            os.rmdir(local_path(path))


def _remove_remote(path: str, root: str) -> None:
    inside, parts = path.removeprefix(root.rstrip("/") + "/"), path.split("/")
    if inside == path or not inside.strip("/") or ".." in parts or "." in parts:
        raise UserError(f"Refusing to delete {path}: it is not inside {root}.")

    def remove(files: Any, name: str) -> None:
        with suppress(FileNotFoundError):
            files.rm(name, recursive=True)
        files.invalidate_cache()

    retry(remove, "delete", path)


# --- Large files -------------------------------------------------------------------------------------------------------------


def upload_file(source: Path, target: str | Path) -> Digest:
    """Copy a local file to `target` and read it back from there; done only when size and hash agree.

    Raises:
        StorageFullError, UserError, ClusterError: see `retry`.
    """
    if is_local(target):
        with open(source, "rb") as reader:
            digest = replace_file(local_path(target), lambda file: _copy(reader, file))
        if file_digest(target) != digest:
            raise ClusterError(f"{target} does not hold what was just written to it. Is the disk or its mount failing?")
        return digest
    part = max(CHUNK_BYTES, -(-source.stat().st_size // MOST_PARTS))

    def put(files: Any, name: str) -> Digest:
        with bucket_must_exist(target):
            digest = in_time(lambda: _send(source, files, name, part), limit_of(part))
        with upload_must_arrive(target):
            stored = _read_through(target, None)
        if stored != digest:
            raise OSError(f"{shown(target)} holds {stored.size} bytes that are not the {digest.size} bytes that were sent")
        return digest

    return retry(put, "upload", target, limit_s=None)


def upload_folder(source: Path, target: str | Path) -> dict[str, Digest]:
    """Copy every file below a local folder, each read back; digests by relative name."""
    names = sorted(file.relative_to(source).as_posix() for file in source.rglob("*") if file.is_file())
    return dict(zip(names, in_parallel(lambda name: upload_file(source / name, f"{target}/{name}"), names)))


def download_file(source: str | Path, target: Path) -> Digest:
    """Copy a file to a local path, whole or not at all; the digest is that of the bytes that arrived.

    Raises:
        FileNotFoundError: if there is no such file.
        StorageFullError, UserError, ClusterError: see `retry`.
    """
    if is_local(source):
        with local_errors(source), open(local_path(source), "rb") as reader:
            return replace_file(target, lambda file: _copy(reader, file))
    return replace_file(target, lambda file: _read_through(source, file))


def download_folder(source: str | Path, target: Path) -> dict[str, Digest]:
    """Copy every file below a folder to a local folder; digests by relative name."""
    names = list(file_sizes(source))
    return dict(zip(names, in_parallel(lambda name: download_file(f"{source}/{name}", target / name), names)))


def in_parallel(work: Callable[[str], T], items: Iterable[str]) -> list[T]:
    """`[work(item) for item in items]` with a few threads: reading and hashing leave the interpreter lock alone."""
    with ThreadPoolExecutor(PARALLEL_FILES, thread_name_prefix="storage") as pool:
        return list(pool.map(work, items))


# --- Details -----------------------------------------------------------------------------------------------------------------


def _content(files: Any, name: str, offset: int = 0) -> bytes:
    """What a file holds from an offset on, in one answer, so that it is never a mixture of two contents."""
    size = in_time(lambda: int(files.info(name)["size"]), limit_of(0))
    if offset == 0:
        content = in_time(lambda: files.cat_file(name), limit_of(size))
        refuse_web_page(name, content)
        return content
    if size <= offset:  # to ask for bytes behind the end is an error
        return b""
    return in_time(lambda: files.cat_file(name, start=offset, end=size), limit_of(size - offset))


def _read_through(path: str | Path, writer: BinaryIO | None) -> Digest:
    """Size and hash of a remote file, written along if there is a writer. A chunk that does not come is asked for again alone."""
    size = retry(lambda files, name: int(files.info(name)["size"]), "read", path)
    sha256 = hashlib.sha256()
    for start in range(0, size, CHUNK_BYTES):
        stop = min(start + CHUNK_BYTES, size)
        chunk = retry(partial(chunk_of, start=start, stop=stop), "read", path, limit_s=limit_of(stop - start))
        sha256.update(chunk)
        if writer is not None:
            writer.write(chunk)
        moved()
    return Digest(size, sha256.hexdigest())


def chunk_of(files: Any, name: str, start: int, stop: int) -> bytes:
    """Bytes of a remote file, all of them."""
    chunk = files.cat_file(name, start=start, end=stop)
    if len(chunk) != stop - start:  # a cut connection can look like the end of the file
        raise OSError(f"of {stop - start} bytes {len(chunk)} arrived")
    return chunk


def _send(source: Path, files: Any, name: str, part: int) -> Digest:
    """Upload a file in parts of so many bytes; what was sent. Nothing is there if something goes wrong on the way."""
    with open(source, "rb") as reader:
        writer = files.open(name, "wb", block_size=part)
        try:
            size, sha256 = 0, hashlib.sha256()
            while data := reader.read(part):
                writer.write(data)
                size += len(data)
                sha256.update(data)
                if len(data) == part:  # less is kept until the file is closed
                    moved()
        except BaseException:
            with suppress(Exception):  # the store may be what is wrong
                writer.discard()
            writer._closed = True  # a file of fsspec that is not closed finishes its upload when it is collected
            raise
        writer.close()
    return Digest(size, sha256.hexdigest())


def _copy(reader: BinaryIO, writer: Any | None) -> Digest:
    """Read to the end, writing along if there is a writer."""
    size, sha256 = 0, hashlib.sha256()
    while chunk := reader.read(CHUNK_BYTES):
        size += len(chunk)
        sha256.update(chunk)
        if writer is not None:
            writer.write(chunk)
    return Digest(size, sha256.hexdigest())
