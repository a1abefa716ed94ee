"""Where stores lie, each at its address: found there only if it is intact, and put there whole."""

import errno
import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path

from raytune.data.store import StoreInfo, complete_meta, read_info, row_files
from raytune.local_files import move_local_folder
from raytune.storage import file_digest


def put_in_place(built: Path, final: Path, info: StoreInfo) -> StoreInfo:
    """Rename a built store to its address. Another builder's store, finished first, is as good; a damaged one is replaced."""
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
            return info


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
