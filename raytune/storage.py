"""Bytes of a run, on a local disk or behind an fsspec URL (s3:// gs:// abfs:// memory://): the same few verbs for both.

Nothing that was uploaded counts before it was read back: `pyarrow.fs.copy_files` reports success for uploads that the server
refused (FAULTS.md, fact 1). A missing file is FileNotFoundError from every verb; a server that does not answer is never taken
for a missing file, since a run would then start from scratch beside its own checkpoints.
"""

import errno
import hashlib
import json
import logging
import os
import posixpath
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from raytune.errors import ClusterError, RaytuneError, StorageFullError, UserError
from raytune.missing import OPTIONAL, install_command
from raytune.units import MIB

CHUNK_BYTES = 8 * MIB
# What a storage service is given to come back before a run fails with "retry later". The other ranks wait in a collective
# meanwhile, whose limit is five minutes. A time and not a count, because s3fs tries for up to a minute by itself.
PATIENCE_S = 240.0
# A refusal is usually a wrong credential, but services also refuse while they rotate tokens: asked again, not for long.
PATIENCE_AFTER_REFUSAL_S = 15.0
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 60.0
PARALLEL_FILES = 8

_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "abfss": "adlfs", "az": "adlfs"}

_log = logging.getLogger(__name__)
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
    files, name = _remote(path)
    return retry(lambda: files.cat_file(name), f"read {path}")


def write_bytes(path: str | Path, data: bytes) -> None:
    """Put a file in place whole: a reader sees the old content or the new one, and the new one survives a power cut.

    Raises:
        StorageFullError: if the disk is full; the old content is intact.
        UserError, ClusterError: see `retry`.
    """
    if is_local(path):
        _replace_local(local_path(path), lambda file: file.write(data))
        return
    files, name = _remote(path)

    def put() -> None:
        with _bucket_must_exist(path):
            files.pipe_file(name, data)
        with _upload_must_arrive(path):
            stored = files.cat_file(name)
        if stored != data:
            raise OSError(f"{path} does not hold what was just written to it")

    retry(put, f"write {path}")


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
        return _create_local(local_path(path), data)
    files, name = _remote(path)

    def create() -> bool:
        with suppress(FileExistsError), _bucket_must_exist(path):  # may be our own: the answer to an earlier try was lost
            files.pipe_file(name, data, mode="create")
        with _upload_must_arrive(path):
            return files.cat_file(name) == data

    return retry(create, f"create {path}")


def _create_local(path: Path, data: bytes) -> bool:
    with local_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # as below /proc, where nobody can make one
            raise UserError(f"Cannot make the folder {path.parent} on {os.uname().nodename}: {error.strerror}.") from error
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        _sync(path.parent)
    return True


def read_json(path: str | Path) -> Any:
    """The value in a JSON file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not JSON in UTF-8.
    """
    return json.loads(read_bytes(path).decode())


def write_json(path: str | Path, value: object) -> None:
    """Put a value in place as strict JSON; not-a-number and infinity are refused (`metrics.encode_number` spells them)."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode())


# --- Looking -----------------------------------------------------------------------------------------------------------------


def exists(path: str | Path) -> bool:
    """Whether there is a file or folder. False only on the storage's own word, never because it could not be asked."""
    if is_local(path):
        with local_errors(path):
            return os.path.lexists(local_path(path))
    files, name = _remote(path)

    def look() -> bool:
        try:  # not `files.exists`, which takes every error for "no"
            files.info(name)
        except FileNotFoundError:
            return False
        return True

    return retry(look, f"look for {path}")


def refuse_unusable(path: str | Path) -> None:
    """Refuse a folder that cannot be made or written here, or a URL that nothing here can open. Writes nothing.

    Raises:
        UserError: saying why.
    """
    if not is_local(path):
        _remote(path)
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
    files, name = _remote(path)

    def look() -> list[str]:
        try:
            entries = files.ls(name, detail=False)
        except FileNotFoundError:
            return []
        return sorted({posixpath.basename(str(entry).rstrip("/")) for entry in entries} - {"", posixpath.basename(name)})

    return retry(look, f"list {path}")


def file_sizes(path: str | Path) -> dict[str, int]:
    """Bytes of every file below a folder by its name relative to it, with `/`; empty if there is no such folder."""
    if is_local(path):
        root = local_path(path)
        with local_errors(path):
            return {file.relative_to(root).as_posix(): file.stat().st_size for file in sorted(root.rglob("*")) if file.is_file()}
    files, name = _remote(path)
    prefix = name.rstrip("/") + "/"

    def look() -> dict[str, int]:
        found = files.find(name, detail=True)
        return {str(file).removeprefix(prefix): int(info["size"]) for file, info in sorted(found.items())}

    return retry(look, f"list {path}")


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
    files, name = _remote(path)

    def read() -> Digest:
        with files.open(name, "rb") as file:
            return _copy(file, None)

    return retry(read, f"read {path}")


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
    files, name = _remote(path)

    def remove() -> None:
        with suppress(FileNotFoundError):
            files.rm(name, recursive=True)
        files.invalidate_cache()

    retry(remove, f"delete {path}")


def move_local_folder(source: Path, target: Path) -> None:
    """Rename a folder on one file system, atomically and so that the new name survives a power cut."""
    with local_errors(target):
        os.rename(source, target)
        _sync(target.parent)
        if source.parent != target.parent:
            _sync(source.parent)


def sync_local_folder(path: Path) -> None:
    """Bring every file and folder below a local folder to the disk itself."""
    with local_errors(path):
        for folder, _, names in os.walk(path):
            for name in names:
                _sync(Path(folder) / name)
            _sync(Path(folder))
        _sync(path.parent)


# --- Large files -------------------------------------------------------------------------------------------------------------


def upload_file(source: Path, target: str | Path) -> Digest:
    """Copy a local file to `target` and read it back from there; done only when size and hash agree.

    Raises:
        StorageFullError, UserError, ClusterError: see `retry`.
    """
    if is_local(target):
        with open(source, "rb") as reader:
            digest = _replace_local(local_path(target), lambda file: _copy(reader, file))
        if file_digest(target) != digest:
            raise ClusterError(f"{target} does not hold what was just written to it. Is the disk or its mount failing?")
        return digest
    files, name = _remote(target)

    def put() -> Digest:
        with _bucket_must_exist(target), open(source, "rb") as reader, files.open(name, "wb") as writer:
            digest = _copy(reader, writer)
        with _upload_must_arrive(target), files.open(name, "rb") as reader:
            stored = _copy(reader, None)
        if stored != digest:
            raise OSError(f"{target} holds {stored.size} bytes that are not the {digest.size} bytes that were sent")
        return digest

    return retry(put, f"upload {target}")


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
            return _replace_local(target, lambda file: _copy(reader, file))
    files, name = _remote(source)

    def fetch() -> Digest:
        size = int(files.info(name)["size"])
        with files.open(name, "rb") as reader:
            digest = _replace_local(target, lambda file: _copy(reader, file))
        if digest.size != size:  # a cut connection can look like the end of the file
            raise OSError(f"{source} has {size} bytes, of which {digest.size} arrived")
        return digest

    return retry(fetch, f"download {source}")


def download_folder(source: str | Path, target: Path) -> dict[str, Digest]:
    """Copy every file below a folder to a local folder; digests by relative name."""
    names = list(file_sizes(source))
    return dict(zip(names, in_parallel(lambda name: download_file(f"{source}/{name}", target / name), names)))


def in_parallel(work: Callable[[str], T], items: Iterable[str]) -> list[T]:
    """`[work(item) for item in items]` with a few threads: reading and hashing leave the interpreter lock alone."""
    with ThreadPoolExecutor(PARALLEL_FILES, thread_name_prefix="storage") as pool:
        return list(pool.map(work, items))


# --- Errors ------------------------------------------------------------------------------------------------------------------


def retry(
    action: Callable[[], T],
    what: str,
    *,
    patience_s: float = PATIENCE_S,
    patience_after_refusal_s: float = PATIENCE_AFTER_REFUSAL_S,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> T:
    """Do something with remote storage, again and again while it fails for a reason that may pass.

    Args:
        what: verb and path for messages, such as "read s3://bucket/run.json".

    Raises:
        FileNotFoundError: at once; the storage has answered.
        StorageFullError: at once, if the disk of this machine is full.
        UserError: if the storage still refuses access after a few seconds, or there are no credentials.
        ClusterError: if it still fails when patience is at its end.
    """
    started, tried, wait = clock(), 0, FIRST_WAIT_S
    while True:
        try:
            return action()
        except (FileNotFoundError, RaytuneError):
            raise
        except Exception as error:  # every backend has its own kinds; what cannot pass is sorted out here
            if type(error).__name__ in ("NoCredentialsError", "DefaultCredentialsError"):
                raise UserError(f"Could not {what}: no credentials for this storage on {os.uname().nodename}. {error}") from error
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise _full(what, error) from error
            refused, cause = isinstance(error, PermissionError), f"{type(error).__name__}: {error}"
            tried, elapsed = tried + 1, clock() - started
            if elapsed + wait > (patience_after_refusal_s if refused else patience_s):
                if refused:
                    raise UserError(
                        f"Could not {what}: the storage refuses access ({cause}). "
                        f"Give the credentials or the role of {os.uname().nodename} the right to read, write and list there."
                    ) from error
                raise ClusterError(
                    f"Could not {what} in {tried} attempts over {elapsed:.0f} s ({cause}). "
                    f"When the storage is back, run the same command again: nothing that was committed is lost."
                ) from error
            _log.warning("could not %s (%s); trying again in %s s", what, cause, wait)
            sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT_S)


def _full(what: str, error: OSError) -> StorageFullError:
    return StorageFullError(
        f"Could not {what}: the disk is full ({error.strerror}). Free some space, or lower checkpoint.keep_last."
    )


@contextmanager
def local_errors(path: str | Path) -> Iterator[None]:
    """Turn errors of the local file system into errors that say where and what to do; a missing file stays as it is."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        node = os.uname().nodename
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(f"write {path}", error) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(
                f"Cannot use {path} on {node}: {error.strerror}. "
                f"Choose a storage folder that this user may read and write on every node."
            ) from error
        if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP):
            raise UserError(f"Cannot use {path}: {error.strerror}.") from error
        raise ClusterError(
            f"Could not use {path} on {node}: {error.strerror or error}. Is its disk or mount still there?"
        ) from error


# --- Details -----------------------------------------------------------------------------------------------------------------


def _remote(path: str | Path) -> tuple[Any, str]:
    """The fsspec file system of a URL with nothing remembered, and the path inside it."""
    import fsspec  # only runs on remote storage pay for it

    protocol = str(path).split("://")[0]
    try:
        files, name = fsspec.core.url_to_fs(str(path))
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        if package is None:
            raise UserError(f"Cannot use {path}: {error}") from error
        raise UserError(
            f"Cannot use {path}: the package {package} is not installed on {os.uname().nodename}. "
            f"Install it on every node: {install_command(OPTIONAL[package])}"
        ) from error
    except ValueError as error:
        known = ", ".join(f"{name}://" for name in ("s3", "gs", "abfs"))
        raise UserError(f"Cannot use {path}: {error}. Use a local folder or one of {known}.") from error
    files.invalidate_cache()  # other processes write too: what was listed a minute ago says nothing
    return files, name


@contextmanager
def _bucket_must_exist(path: str | Path) -> Iterator[None]:
    """A write finds nothing missing but the bucket."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"Cannot write {path}: {error}. Does the bucket exist, and is its name spelled right?") from error


@contextmanager
def _upload_must_arrive(path: str | Path) -> Iterator[None]:
    """What is missing right after it was written was never stored, whatever the upload said; worth another try."""
    try:
        yield
    except FileNotFoundError as error:
        raise OSError(f"{path} was uploaded without an error but is not there") from error


def _replace_local(target: Path, fill: Callable[[BinaryIO], T]) -> T:
    """Write a file beside its target, bring it to the disk, rename it into place."""
    draft = target.parent / f".{target.name[:100]}.{uuid.uuid4().hex[:12]}.draft"
    with local_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(draft, "wb") as file:
                result = fill(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, target)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        _sync(target.parent)
    return result


def _copy(reader: Any, writer: Any | None) -> Digest:
    """Read to the end, writing along if there is a writer."""
    size, sha256 = 0, hashlib.sha256()
    while chunk := reader.read(CHUNK_BYTES):
        size += len(chunk)
        sha256.update(chunk)
        if writer is not None:
            writer.write(chunk)
    return Digest(size, sha256.hexdigest())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
