"""Where stores lie, each at its address: found there only if it is intact, and put there whole."""

import errno
import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from raytune.data.store.store import StoreInfo, complete_meta, read_info, row_files
from raytune.errors import DataError
from raytune.local_files import local_errors, move_local_folder
from raytune.storage import file_digest, is_local, local_path

T = TypeVar("T")


def local_stores(folder: str | Path) -> Path:
    """The folder of stores, made if it is not there.

    Raises:
        DataError: if it is no folder that files can be mapped from.
    """
    if not is_local(folder):
        raise DataError(
            f"data.store is {folder}, but tokenised rows are mapped into memory. Set it to a folder that every node mounts."
        )
    stores = local_path(folder)
    with local_errors(stores):
        stores.mkdir(parents=True, exist_ok=True)
    return stores


def put_in_place(built: Path, final: Path, value: T, intact: Callable[[Path], T | None]) -> T:
    """Rename a folder to the address of what is in it. Another builder's, finished first, is as good; a damaged one is replaced.

    Args:
        value: what is in the folder.
        intact: the same of another's folder, or None if that is not whole.
    """
    while True:
        try:
            os.rename(built, final)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            if (found := intact(final)) is not None:
                return found
            aside = final.with_name(f"damaged-{uuid.uuid4().hex[:12]}")
            with suppress(FileNotFoundError):  # another builder was quicker
                move_local_folder(final, aside)
            if intact(aside) is not None:  # another builder has just put a good one there
                with suppress(OSError):
                    os.rename(aside, final)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            return value


def intact(folder: Path) -> StoreInfo | None:
    """The store in a folder if it is complete and every byte is what was written; else None."""
    meta = complete_meta(folder)
    if meta is None:
        return None
    try:
        is_intact = all(file_digest(folder / name) == digest for name, digest in row_files(meta).items())
    except FileNotFoundError:
        return None
    return read_info(folder, meta) if is_intact else None
