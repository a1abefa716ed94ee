"""The files of a training state between an engine, which knows what is in them, and whoever decides when they are written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save_file
from torch import Tensor

Fill = Callable[[Any, Path], None]
"""Writes a content into the file of a path, whose folder is there."""


class Write(Protocol):
    """What an engine gives its files to, one after the other."""

    def __call__(self, path: Path, content: Any, fill: Fill) -> None:
        """Take a file, to be written now or later.

        Args:
            content: may change as soon as this returns. Tensors and values, in whatever can be pickled.
        """
        ...


def write_now(path: Path, content: Any, fill: Fill) -> None:
    fill(content, path)


def fill_with_tensors(content: dict[str, Tensor], path: Path) -> None:
    save_file(content, path)


def fill_with_tensors_and_values(content: tuple[dict[str, Tensor], dict[str, str]], path: Path) -> None:
    """
    Args:
        content: tensors and metadata of a file of safetensors.
    """
    tensors, values = content
    save_file(tensors, path, metadata=values)
