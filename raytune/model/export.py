"""Weights to files that plain transformers and PEFT load: a whole model as sharded safetensors, or an adapter alone."""

import json
from collections.abc import Iterable
from pathlib import Path

from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from raytune.units import GIB

MAX_SHARD_BYTES = 5 * GIB
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def save_adapter(model: PeftModel, state: dict[str, Tensor], folder: Path) -> None:
    """Write an adapter and its config.

    Args:
        model: the adapted model; its own weights may be sharded, they are not read.
        state: the adapter's whole weights, by the names of `model.named_parameters()`.
    """
    model.save_pretrained(str(folder), state_dict=state, safe_serialization=True)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty form of a model card


def save_model(
    model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]], folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write config and weights; no more than one shard of them is held at a time.

    Args:
        model: whose config is written; its own weights may be sharded, they are not read.
        tensors: every weight once, by the names of `model.named_parameters()`, which leave out a tied head.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(folder, max_shard_bytes)
    dtype = None
    for name, tensor in tensors:
        writer.add(name, tensor)
        dtype = tensor.dtype
    writer.close()
    config = model.config.to_dict() | {"dtype": str(dtype).removeprefix("torch."), "architectures": [type(model).__name__]}
    config.pop("use_cache", None)  # switched off for training only
    type(model.config).from_dict(config).save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


class ShardWriter:
    """Writes tensors to `model-00001-of-00003.safetensors` and so on with their index, or to one file if they fit into it."""

    def __init__(self, folder: Path, max_shard_bytes: int) -> None:
        self._folder, self._max_shard_bytes = folder, max_shard_bytes
        self._shard: dict[str, Tensor] = {}
        self._shard_bytes = self._total_bytes = 0
        self._names_of_shard: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._shard and self._shard_bytes + size > self._max_shard_bytes:
            self._write()
        self._shard[name] = tensor.contiguous()
        self._shard_bytes += size
        self._total_bytes += size

    def close(self) -> None:
        """Write what is left, then give the files the names that say how many there are."""
        if self._shard:
            self._write()
        num_shards = len(self._names_of_shard)
        if num_shards == 1:
            self._draft(0).rename(self._folder / "model.safetensors")
            return
        weight_map = {}
        for index, names in enumerate(self._names_of_shard):
            file = f"model-{index + 1:05d}-of-{num_shards:05d}.safetensors"
            self._draft(index).rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        (self._folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True))

    def _draft(self, index: int) -> Path:
        return self._folder / f"shard-{index}.safetensors.tmp"

    def _write(self) -> None:
        save_file(self._shard, self._draft(len(self._names_of_shard)), metadata={"format": "pt"})
        self._names_of_shard.append(list(self._shard))
        self._shard, self._shard_bytes = {}, 0
