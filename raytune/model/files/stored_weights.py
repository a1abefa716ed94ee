"""The weights of a model's folder, read from their files a tensor at a time.

Each is read into memory of its own: files that are mapped would stay in memory for as long as one of their tensors is used.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raytune.errors import ModelError
from raytune.model.files.weight_files import StoredTensor, stored_tensors, weight_files
from raytune.model.files.weight_numbers import NUMBERS

_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
}
"""Number formats by their names in safetensors."""


@dataclass(frozen=True)
class StoredWeights:
    """The safetensors files of a model."""

    folder: Path

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors, file after file, in the order in which they lie there."""
        for name in self.tensors:
            yield name, self.read(name)

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Shapes and formats, without any weight.

        Raises:
            ModelError: if a file is missing or damaged.
        """
        held = stored_tensors(weight_files(self.folder))
        return {name: held[name] for name in sorted(held, key=lambda name: (held[name].file.name, self._starts[name]))}

    @cached_property
    def largest_bytes(self) -> int:
        """Of all tensors, that which takes most."""
        return max(map(tensor_bytes, self.tensors.values()), default=0)

    def bytes_in(self, dtype: torch.dtype | None) -> int:
        """Of all tensors together, once they have a dtype; None: as they are."""
        return sum(
            prod(tensor.shape) * dtype.itemsize if dtype and tensor.dtype in NUMBERS else tensor_bytes(tensor)
            for tensor in self.tensors.values()
        )

    @cached_property
    def _starts(self) -> dict[str, int]:
        """In its file, the byte at which each tensor begins."""
        starts = {}
        for path in weight_files(self.folder):
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header: dict[str, Any] = json.loads(file.read(length))
            starts |= {name: 8 + length + one["data_offsets"][0] for name, one in header.items() if name != "__metadata__"}
        return starts

    def read(self, name: str) -> Tensor:
        """One of them by its name.

        Raises:
            ModelError: if its file is damaged, or its numbers are of a kind that no model is made of.
        """
        held = self.tensors[name]
        if held.dtype not in _DTYPES:
            raise ModelError(
                f"{name} in {held.file} holds numbers of the format {held.dtype}, which are not weights as they are."
            )
        tensor = torch.empty(held.shape, dtype=_DTYPES[held.dtype])
        flat: Any = tensor.view(-1).view(torch.uint8).numpy() if tensor.numel() else b""
        try:
            with held.file.open("rb", buffering=0) as file:
                file.seek(self._starts[name])
                left = memoryview(flat)
                while left:
                    if not (num_read := file.readinto(left)):
                        raise OSError("it ends too early")
                    left = left[num_read:]
        except OSError as error:
            raise ModelError(f"{held.file} cannot be read: {error}. It is damaged or incomplete; download it again.") from error
        return tensor


def tensor_bytes(tensor: StoredTensor) -> int:
    """Bytes of a tensor in its file."""
    return prod(tensor.shape) * (_DTYPES[tensor.dtype].itemsize if tensor.dtype in _DTYPES else 1)
