"""What merging and exporting can write, and what they take of memory and disk, before they begin. Pure."""

from dataclasses import dataclass
from typing import Literal

from raytune.units import MIB, format_bytes

ExportFormat = Literal["safetensors", "gguf", "awq-ready"]
ExportDtype = Literal["bf16", "fp16", "fp32", "q8_0"]
"""Of weights; the last one in GGUF only."""

LIBRARIES_BYTES = 700 * MIB
"""torch, transformers and PEFT in memory; measured: 490 MiB once imported, and what they make of small models."""
BYTES_PER_MERGED_VALUE = 13
"""Of a tensor that an update is laid into: itself, its update and their sum in fp32, and whether each number is finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewriting:
    """Weights that are read tensor by tensor, changed, and written shard by shard."""

    total_bytes: int
    """Of what is written."""
    shard_bytes: int
    """Of a file at most."""
    largest_bytes: int
    """Of the largest tensor, as it is read or as it is written, whichever is more."""
    largest_merged: int = 0
    """Numbers of the largest tensor that an update is laid into; fused experts of a layer count together."""
    adapter_values: int = 0
    """Numbers of all adapters, which are held in fp32."""

    @property
    def weights_bytes(self) -> int:
        """Bytes of tensors in memory at the fullest moment: a shard, a tensor as it was and as it becomes, and the adapters."""
        shard = min(self.shard_bytes, self.total_bytes)
        # What several adapters make is held beside them, and is read again.
        return shard + 2 * self.largest_bytes + BYTES_PER_MERGED_VALUE * self.largest_merged + 8 * self.adapter_values

    @property
    def memory_bytes(self) -> int:
        return LIBRARIES_BYTES + self.weights_bytes

    @property
    def sentence(self) -> str:
        return (
            f"It takes about {format_bytes(self.memory_bytes)} of memory, whatever the size of the model (a shard of "
            f"{format_bytes(min(self.shard_bytes, self.total_bytes))}, the largest tensor and the libraries), and "
            f"{format_bytes(self.total_bytes)} of disk."
        )

    def to_json(self) -> dict[str, int]:
        return {"memory_bytes": self.memory_bytes, "disk_bytes": self.total_bytes}
