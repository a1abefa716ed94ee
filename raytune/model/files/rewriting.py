"""What merging and exporting will take, told by the headers of files. No weight is read."""

from collections import Counter
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch

from raytune.errors import ModelError
from raytune.model.files.export import ADAPTER_WEIGHTS
from raytune.model.files.files import local_files, resolve_model_path
from raytune.model.files.saved_adapter import adapter_config
from raytune.model.files.stored_weights import StoredWeights, tensor_bytes
from raytune.model.files.weight_files import stored_tensors
from raytune.plan.model.base_model import is_on_hub
from raytune.plan.saved.rewriting import Rewriting


def rewriting_of(weights: StoredWeights, dtype: torch.dtype | None, shard_bytes: int, adapters: Sequence[Path] = ()) -> Rewriting:
    """What it takes to write a model anew, with adapters laid into it.

    Args:
        dtype: that it is written in; None: as it is stored.
        adapters: their folders.
    """
    held = [tensor for folder in adapters for tensor in stored_tensors([folder / ADAPTER_WEIGHTS]).items()]
    changed = {_changed_layer(name) for name, _ in held}
    merged: Counter[str] = Counter()
    for name, tensor in weights.tensors.items():
        parts = name.split(".")
        # Matrices of experts, which lie apart in files, count as the module that an adapter names.
        layer = next((".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1) if ".".join(parts[:end]) in changed), None)
        if layer is not None and len(tensor.shape) > 1:
            merged[layer] += prod(tensor.shape)
    sizes = [prod(tensor.shape) * (dtype.itemsize if dtype else 1) for tensor in weights.tensors.values()]
    return Rewriting(
        total_bytes=weights.bytes_in(dtype),
        shard_bytes=shard_bytes,
        largest_bytes=max(*(tensor_bytes(tensor) for tensor in weights.tensors.values()), *sizes, 0),
        largest_merged=max(merged.values(), default=0),
        adapter_values=sum(prod(tensor.shape) for _, tensor in held),
    )


def merging_of(adapters: Sequence[Path], base: str | None, dtype: torch.dtype | None, shard_bytes: int) -> Rewriting:
    """What it takes to lay adapters into their base.

    Args:
        base: as the user names it; None: that which the first adapter names.

    Raises:
        ModelError: if there is no such base, or it is not on this machine yet.
    """
    config = adapter_config(adapters[0])
    named = base or config.base_model_name_or_path
    if not named:
        raise ModelError(f"{adapters[0]} does not name its base model. Name it with --base.")
    path = resolve_model_path(named, None)
    folder = local_files(path, config.revision if is_on_hub(path) else None)
    if folder is None:
        raise ModelError(f"The base {named} is not on this machine, so nothing tells its sizes: hf download {named}")
    return rewriting_of(StoredWeights(folder), dtype, shard_bytes, adapters)


def _changed_layer(name: str) -> str:
    """The layer of the base that a tensor of an adapter belongs to: `a.q_proj` of `base_model.model.a.q_proj.lora_A.weight`."""
    parts = name.removeprefix("base_model.model.").replace(".base_layer", "").split(".")
    return ".".join(parts[:-2] if parts[-1] == "weight" else parts[:-1])
