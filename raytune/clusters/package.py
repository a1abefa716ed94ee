"""The zip in which the files of a job travel. Equal content makes an equal zip, which Ray keeps under its hash: submitting again
uploads nothing."""

import os
import zipfile
from pathlib import Path

from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE

from raytune.clusters.working_dir import Contents
from raytune.errors import UserError
from raytune.local_files import local_errors
from raytune.units import KIB, MIB, format_bytes

_FIRST_DATE = (1980, 1, 1, 0, 0, 0)
_NUM_NAMED = 5


def pack(packed: Contents, target: Path, limit_bytes: int = GCS_STORAGE_MAX_SIZE) -> None:
    """Write the files into a zip.

    Raises:
        UserError: if it grows over `limit_bytes`, with the largest files.
    """
    with local_errors(target), zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, path in packed.files.items():
            entry = zipfile.ZipInfo(name, _FIRST_DATE)  # neither times nor owners: equal content, equal zip
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (0o755 if os.access(path, os.X_OK) else 0o644) << 16
            with path.open("rb") as reader, archive.open(entry, "w", force_zip64=True) as writer:
                while piece := reader.read(MIB):
                    writer.write(piece)
                    _refuse_large(packed, archive, limit_bytes)
    if target.stat().st_size >= limit_bytes:
        raise _too_large(packed, limit_bytes)


def _refuse_large(packed: Contents, archive: zipfile.ZipFile, limit_bytes: int) -> None:
    """While it grows: a folder with a disk image need not be packed to its end."""
    written = archive.fp.tell() if archive.fp else 0
    if written >= limit_bytes + 64 * KIB:
        raise _too_large(packed, limit_bytes)


def _too_large(packed: Contents, limit_bytes: int) -> UserError:
    sizes = sorted(((path.stat().st_size, name) for name, path in packed.files.items()), reverse=True)
    largest = ", ".join(f"{name} ({format_bytes(size)})" for size, name in sizes[:_NUM_NAMED])
    return UserError(
        f"The working directory is too large for a job: {len(sizes)} files, {format_bytes(sum(size for size, _ in sizes))}, and "
        f"Ray takes {format_bytes(limit_bytes)} compressed. The largest: {largest}. Put data and weights where every node sees "
        f"them, or name what the job does not need in .rayignore (patterns as in .gitignore)."
    )
