"""Where stores lie, each at its address: found there only if it is intact, and put there whole."""

import errno
import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from raytune.data.store import ROWS_FILE, StoreInfo, read_info, read_meta
from raytune.local_files import move_local_folder
from raytune.storage import file_digest

T = TypeVar("T")


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
    meta = read_meta(folder)
    if meta is None:
        return None
    try:
        digest = file_digest(folder / ROWS_FILE)
    except FileNotFoundError:
        return None
    return read_info(folder, meta) if (digest.size, digest.sha256) == (meta["size"], meta["sha256"]) else None
