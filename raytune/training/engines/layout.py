"""How a training state is cut, beside its files: written by engines, read again before one loads it. No torch: the launcher asks
before it starts workers."""

from dataclasses import asdict
from pathlib import Path

from raytune.errors import CheckpointError, UnfitCheckpointError
from raytune.plan.identity.division import Layout
from raytune.run_folder import LAYOUT_FILE
from raytune.storage import read_json, write_json


def fill_with_layout(content: Layout, path: Path) -> None:
    """Write `LAYOUT_FILE`."""
    write_json(path, asdict(content))


def read_layout(folder: Path | str) -> Layout:
    """The layout of the state in a folder.

    Raises:
        CheckpointError: if there is none.
    """
    try:
        return Layout(**read_json(f"{folder}/{LAYOUT_FILE}"))
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder} holds no training state: {LAYOUT_FILE} cannot be read ({error}).") from error


def refuse_other_layout(own: Layout, folder: Path) -> None:
    """Refuse a state that was cut another way than an engine cuts it.

    Raises:
        UnfitCheckpointError: with what to set.
        CheckpointError: if the folder holds no state.
    """
    saved = read_layout(folder)
    if not own.loads(saved):
        raise UnfitCheckpointError(
            f"The training state in {folder} was saved by {saved}, but this run has {own}. Resume with the same number of "
            f"workers, training.zero.stage and training.precision, or start a new run from the saved model."
        )
