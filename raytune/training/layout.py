"""How a training state is cut, beside its files: written by engines, read again before one loads it. No torch: the launcher asks
before it starts workers."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from raytune.errors import CheckpointError, UnfitCheckpointError
from raytune.plan.division import Layout
from raytune.run_folder import LAYOUT_FILE
from raytune.storage import read_json, write_json
from raytune.training.state_files import Write, write_now


def write_layout(folder: Path, layout: Layout, write: Write = write_now) -> None:
    write(folder / LAYOUT_FILE, asdict(layout), _fill)


def _fill(content: dict[str, Any], path: Path) -> None:
    write_json(path, content)


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
