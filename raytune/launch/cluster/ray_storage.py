"""Where Ray keeps files of its own, and through which client."""

from typing import Any

from raytune.object_store import file_system
from raytune.storage import is_local


def ray_storage(folder: str) -> dict[str, Any]:
    """Arguments of Ray's RunConfig for a folder that every node reaches.

    Left to itself Ray opens a URL with a client of pyarrow's. For S3 that takes credentials and addresses as s3fs does; of other
    stores it knows fewer: of Azure neither connection strings nor keys (pyarrow 26).

    Raises:
        UserError: if the kind of URL is unknown, or its package is not installed.
    """
    if is_local(folder) or folder.startswith(("s3://", "s3a://")):
        return {"storage_path": folder.replace("s3a://", "s3://", 1)}
    from pyarrow.fs import FSSpecHandler, PyFileSystem  # only runs on other object stores pay for it

    files, name = file_system(folder)
    return {"storage_path": name, "storage_filesystem": PyFileSystem(FSSpecHandler(files))}
