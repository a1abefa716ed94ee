"""Folders that are there whole or not at all: room is looked for first, files are written beside, and the name comes last."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raytune.errors import ModelError, StorageFullError
from raytune.local_files import is_full, local_errors, make_folder
from raytune.printable import in_a_line
from raytune.storage import free_bytes
from raytune.units import format_bytes


def refuse_taken(output: Path, what: str) -> None:
    """Refuse a folder that holds something already.

    Args:
        what: would be written there, for the message.
    """
    with local_errors(output):
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ModelError(f"{output} already holds files. Name a new folder for {what}.")
        if os.path.ismount(os.path.realpath(output)):
            raise ModelError(
                f"A disk is mounted at {output}, so that no folder can be given that name once it is whole. Name one below it, "
                f"such as {output / 'model'}, for {what}."
            )


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
def scratch_beside(output: Path, kind: str) -> Iterator[Path]:
    """A folder on the disk of another, which is gone in the end.

    Args:
        kind: of what lies there, for its name.

    Raises:
        RaytuneError: if the disk refuses, saying where.
    """
    make_folder(output.parent)
    with local_errors(output):
        made = Path(tempfile.mkdtemp(prefix=f"{output.name}.", suffix=f".{kind}", dir=output.parent))
    try:
        yield made
    except Exception as error:
        if is_full(error) and not isinstance(error, StorageFullError):
            raise StorageFullError(
                f"The disk of {output.absolute().parent} is full ({in_a_line(error)}): nothing of {output} was kept. Free some "
                f"space, or name an --output on another disk."
            ) from error
        raise
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextmanager
def written_whole(output: Path) -> Iterator[Path]:
    """A folder to write into, which gets the name `output` once all is written; nothing is left if it is not.

    Args:
        output: a link stays one, to what is written.

    Raises:
        RaytuneError: if the disk refuses, saying where.
    """
    output = Path(os.path.realpath(output))
    with scratch_beside(output, "partial") as unfinished:
        yield unfinished
        unfinished.chmod(0o755)
        for entry in unfinished.rglob("*"):  # which safetensors keeps from others
            entry.chmod(0o755 if entry.is_dir() else 0o644)
        if output.exists():
            output.rmdir()
        unfinished.rename(output)
