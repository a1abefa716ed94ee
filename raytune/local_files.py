"""Files of the local disk: put in place whole and for good, and errors that say where and what to do."""

import errno
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

from raytune.errors import ClusterError, StorageFullError, UserError

T = TypeVar("T")
FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a disk, or of somebody's share of it, that has no room left."""


@contextmanager
def local_errors(path: str | Path) -> Iterator[None]:
    """Turn errors of the local file system into errors that say where and what to do; a missing file stays as it is."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        node = os.uname().nodename
        if error.errno in FULL:
            raise disk_full(f"write {path}", error) from error
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


def is_full(error: BaseException) -> bool:
    """Whether something failed because a disk has no room. Neither safetensors nor torch.save passes the errno on."""
    return (isinstance(error, OSError) and error.errno in FULL) or "No space left" in str(error) or "os error 28" in str(error)


def make_folder(path: Path) -> None:
    """Make a folder with those above it, if it is not there.

    Raises:
        RaytuneError: saying where, and why not.
    """
    with local_errors(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # as below /proc, where nobody can make one
            raise UserError(f"Cannot make the folder {path} on {os.uname().nodename}: {error.strerror}.") from error


def disk_full(what: str, error: OSError) -> StorageFullError:
    """The error for a disk of this machine that filled up while we did `what`."""
    return StorageFullError(
        f"Could not {what}: the disk is full ({error.strerror}). Free some space, or lower checkpoint.keep_last."
    )


def replace_file(target: Path, fill: Callable[[BinaryIO], T]) -> T:
    """Write a file beside its target, bring it to the disk, rename it into place; what `fill` returns."""
    draft = target.parent / f".{target.name[:100]}.{uuid.uuid4().hex[:12]}.draft"
    make_folder(target.parent)
    with local_errors(target):
        try:
            with open(draft, "wb") as file:
                result = fill(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, target)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        sync(target.parent)
    return result


def create_file(path: Path, data: bytes) -> bool:
    """Create a file that is not there yet; whether it was this process that did."""
    make_folder(path.parent)
    with local_errors(path):
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        sync(path.parent)
    return True


def move_local_folder(source: Path, target: Path) -> None:
    """Rename a folder on one file system, atomically and so that the new name survives a power cut."""
    with local_errors(target):
        os.rename(source, target)
        sync(target.parent)
        if source.parent != target.parent:
            sync(source.parent)


def sync_local_folder(path: Path) -> None:
    """Bring every file and folder below a local folder to the disk itself."""
    with local_errors(path):
        for folder, _, names in os.walk(path):
            for name in names:
                sync(Path(folder) / name)
            sync(Path(folder))
        sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
