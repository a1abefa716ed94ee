"""Folders that are there whole or not at all: room is looked for first, files are written beside, and the name comes last."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raytune.errors import ModelError, StorageFullError
from raytune.local_files import FULL, local_errors
from raytune.storage import free_bytes
from raytune.units import format_bytes


def refuse_taken(output: Path, what: str) -> None:
    """Refuse a folder that holds something already.

    Args:
        what: would be written there, for the message.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ModelError(f"{output} already holds files. Name a new folder for {what}.")


def require_room(output: Path, num_bytes: int, what: str) -> None:
    """Refuse to begin what the disk has no room for.

    Args:
        num_bytes: that will lie beside `output` at the fullest moment.
        what: these are, for the message.
    """
    free = free_bytes(output.absolute())
    if free is not None and free < num_bytes:
        raise StorageFullError(
            f"{what} takes {format_bytes(num_bytes)} ({num_bytes} bytes), and the disk of {output.absolute().parent} has "
            f"{format_bytes(free)} left. Free some space, or name an --output on another disk."
        )


@contextmanager
def written_whole(output: Path) -> Iterator[Path]:
    """A folder to write into, which gets the name `output` once all is written; nothing is left if it is not.

    Raises:
        RaytuneError: if the disk refuses, saying where.
    """
    with local_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f"{output.name}.", suffix=".partial", dir=output.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        for entry in unfinished.rglob("*"):  # which safetensors keeps from others
            entry.chmod(0o755 if entry.is_dir() else 0o644)
        if output.exists():
            output.rmdir()
        unfinished.rename(output)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in FULL:
            raise StorageFullError(
                f"The disk of {output.absolute().parent} is full ({error.strerror}): nothing of {output} was kept. Free some "
                f"space, or name an --output on another disk."
            ) from error
        raise
