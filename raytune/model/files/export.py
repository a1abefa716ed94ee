"""Weights to files that plain transformers and PEFT load: a whole model as sharded safetensors, or an adapter alone."""

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, groupby
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save

from raytune.errors import ModelError
from raytune.model.adapters import adapting_with
from raytune.model.files.stopping import save_generation_config
from raytune.model.packed_experts import packed_experts
from raytune.model.parts.dropouts import set_dropouts
from raytune.model.parts.quantize import quantized_modules
from raytune.units import GIB

MAX_SHARD_BYTES = 5 * GIB
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
BASE_QUANTIZATION = "base_quantization.json"
"""How the base was quantised while an adapter was trained on it; merging reads it, PEFT does not."""
COMBINATION = "combination.json"
"""Of which adapters, and how, one was made that is several."""
ADAPTER = "default"
LAYER = re.compile(r"^(.*?\.\d+)\.")


def save_adapter(model: PeftModel, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write an adapter that plain PEFT loads onto the base as its author published it.

    Args:
        model: the adapted model; its own weights may be sharded, they are not read.
        state: trained parameters by the names of `model.named_parameters()`, whole and on the CPU.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.peft_config[ADAPTER])
    row = adapting_with(config)
    assert row is not None, "we made the adapter"
    values, config = row.for_original_base(model, dict(state), config)
    tensors = row.saved_tensors(model, values, config)
    # Entries may share memory or be transposed views, neither of which safetensors takes.
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    config.inference_mode = True
    config.save_pretrained(str(folder))
    _save_quantization(model, folder)


def _save_quantization(model: PeftModel, folder: Path) -> None:
    quantization = getattr(model.config, "quantization_config", None)
    if quantization is None:
        return
    # PEFT leaves a base that it only lays something in front of as it is, and wraps others twice.
    prefix = "base_model." if model.active_peft_config.is_prompt_learning else "base_model.model."
    # A layer with an update lies one level deeper, as its `base_layer`.
    modules = [name.removeprefix(prefix).removesuffix(".base_layer") for name in quantized_modules(model)]
    parameters = [name.removeprefix(prefix).replace(".base_layer.", ".") for name in packed_experts(model)]
    values = quantization if isinstance(quantization, dict) else quantization.to_dict()
    dtype = str(model.dtype).removeprefix("torch.")
    record = {"dtype": dtype, "modules": modules, "parameters": parameters, "config": values}
    (folder / BASE_QUANTIZATION).write_text(json.dumps(record, indent=2) + "\n")


def save_model(
    model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]], folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write config, settings of generation and weights; no more than one shard of them is held at a time.

    Args:
        model: whose configuration is written; its own weights may be sharded, they are not read.
        tensors: every parameter once, by the names of `model.named_parameters()`, which leave out a tied head.
    """
    config = copy.deepcopy(model.config)
    config.use_cache = True  # switched off for training only
    set_dropouts(config, getattr(model, "own_dropouts", {}))  # set for training only
    config.architectures = [type(model).__name__]
    save_own_code(model, config, folder)
    write_weights(config, _as_published(model, chain(tensors, _buffers(model))), folder, max_shard_bytes)
    save_generation_config(model.generation_config, folder)


def save_own_code(model: PreTrainedModel, config: PretrainedConfig, folder: Path) -> None:
    """Copy the Python files of a model that brings its own, and name them in the `auto_map` of its config, before it is saved."""
    if getattr(model, "_auto_class", None) is not None:
        folder.mkdir(parents=True, exist_ok=True)
        custom_object_save(model, folder, config=config)  # pyright: ignore[reportArgumentType]  its hint is wrong


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What belongs to a model's files besides its parameters; every rank holds it whole."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}", buffer.detach().cpu()


def _as_published(model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Undo what transformers changes when it loads (fused experts, other names), a layer at a time, as other tools expect it."""
    if not getattr(model, "_weight_conversions", None):
        yield from tensors
        return
    for _, layer in groupby(tensors, key=lambda entry: match.group(1) if (match := LAYER.match(entry[0])) else ""):
        yield from revert_weight_conversion(model, dict(layer)).items()


def write_weights(
    config: PretrainedConfig, tensors: Iterable[tuple[str, Tensor]], folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write config and sharded weights from a stream of tensors; no more than one shard is in memory.

    Args:
        tensors: names and values, each once, on the CPU.
        max_shard_bytes: size of a file at most, unless one tensor is larger.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[Path] = []
    part_of: dict[str, int] = {}
    num_bytes = 0
    dtypes: dict[torch.dtype, int] = {}
    for shard in _shards(tensors, max_shard_bytes):
        # How many files there will be is known at the end only, hence the other name until then.
        path = folder / f"model-{len(parts) + 1:05d}.partial"
        save_file(shard, path, metadata={"format": "pt"})
        part_of |= dict.fromkeys(shard, len(parts))
        parts.append(path)
        for tensor in shard.values():
            num_bytes += tensor.nbytes
            dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + tensor.numel()
        shard.clear()  # before the next one begins
    names = _file_names(len(parts))
    for path, name in zip(parts, names, strict=True):
        path.replace(folder / name)
    if len(names) > 1:
        index = {
            "metadata": {"total_size": num_bytes},
            "weight_map": {name: names[part] for name, part in sorted(part_of.items())},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    config = copy.deepcopy(config)
    config.dtype = max((dtype for dtype in dtypes if dtype.is_floating_point), key=lambda dtype: dtypes[dtype])
    config.save_pretrained(folder)


def in_dtype(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """Tensors with all that are not integers in a dtype; None: as they are.

    Raises:
        ModelError: if a number is too large for it.
    """
    for name, tensor in tensors:
        if dtype is None or dtype == tensor.dtype or not tensor.is_floating_point():
            yield name, tensor
            continue
        cast = tensor.to(dtype)
        if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max and not cast.isfinite().all() and tensor.isfinite().all():
            raise ModelError(
                f"{name} holds {tensor.abs().max().item():.3g}, and {str(dtype).removeprefix('torch.')} no number above "
                f"{torch.finfo(dtype).max:.5g}. Take --dtype bf16 or fp32."
            )
        yield name, cast


def _shards(tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    num_bytes = 0
    for name, tensor in tensors:
        if shard and num_bytes + tensor.nbytes > max_shard_bytes:
            yield shard
            shard, num_bytes = {}, 0
        shard[name] = tensor.contiguous()
        num_bytes += tensor.nbytes
    if shard:
        yield shard


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
