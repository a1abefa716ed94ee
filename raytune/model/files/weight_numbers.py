"""Whether weights are numbers that can be trained on: none that is not finite, no matrix that one number fills."""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from raytune.errors import ModelError
from raytune.model.files.loading_report import in_file, listed
from raytune.model.files.weight_files import StoredTensor
from raytune.model.parts.sharded_base import share_of

NUMBERS = ("F64", "F32", "F16", "BF16")
"""Number formats of safetensors that weights may have as they are. Integers are packed, and like 8-bit floats need a scale."""
COMPARED_ROWS = 4096
"""Of two matrices, held at once."""
HELD_NUMBERS = 1 << 24
"""Of a tensor, held at once, unless a row has more."""


def check_numbers(weights: Mapping[str, StoredTensor], place: str) -> None:
    """Refuse matrices that hold one number everywhere, or one that is none among the few rows that are looked at.

    `check_finite` looks at all of them once they are loaded.

    Raises:
        ModelError: naming the first such tensors.
    """
    matrices: dict[Path, list[str]] = {}
    for name, tensor in weights.items():
        is_matrix = len(tensor.shape) > 2 or (len(tensor.shape) == 2 and name.endswith(".weight"))
        is_norm = "norm" in name.lower()  # of queries and keys, a row per head: 1 everywhere before it is trained
        has_rows = tensor.shape[:1] > (1,)
        if is_matrix and not is_norm and has_rows and tensor.dtype in NUMBERS:
            matrices.setdefault(tensor.file, []).append(name)
    constant: dict[str, float] = {}
    infinite: list[str] = []
    for file, names in matrices.items():
        with safe_open(file, "pt") as opened:
            for name in names:
                matrix, shape = opened.get_slice(name), weights[name].shape
                sample = _sample(matrix, shape)
                if not sample.isfinite().all():
                    infinite.append(name)
                elif _holds_one_number(sample) and _is_filled_with(sample[0], matrix, shape[0]):
                    constant[name] = float(sample[0])
    if infinite:
        raise _not_finite(infinite, place)
    if constant:
        names = list(constant)
        raise ModelError(
            f"The weights in {place} hold the same number everywhere in {listed(names)}{in_file(names[0], weights)}, "
            f"{constant[names[0]]:g}: the file was not written to its end or not filled, and such a layer says nothing. Download "
            f"or convert the model again. If it is meant, of layers that were inserted, start them with small random numbers."
        )


def _sample(matrix: Any, shape: Sequence[int]) -> torch.Tensor:
    """Some rows of a stored matrix, or of one of several that lie in one tensor: the first, the middle and the last."""
    inner = (slice(0, 1),) * (len(shape) - 2)
    return torch.cat([matrix[(slice(row, row + 1), *inner)].flatten() for row in {0, shape[0] // 2, shape[0] - 1}])


def _holds_one_number(tensor: torch.Tensor) -> bool:
    return bool((tensor == tensor.flatten()[0]).all())


def _is_filled_with(number: torch.Tensor, matrix: Any, num_rows: int) -> bool:
    """Whether a stored matrix holds one number everywhere, looked at a few rows at a time."""
    parts = (matrix[start : start + COMPARED_ROWS] for start in range(0, num_rows, COMPARED_ROWS))
    return all(bool((part == number).all()) for part in parts)


def check_stored_finite(tensors: Mapping[str, StoredTensor], place: str) -> None:
    """Refuse files that hold a number which is none; every one is read, a few rows at a time. Packed integers are not looked at.

    Raises:
        ModelError: naming the first such tensors, or the file that cannot be read.
    """
    wrong: list[str] = []
    for name, tensor in tensors.items():
        if tensor.dtype not in NUMBERS:
            continue
        with safe_open(tensor.file, "pt") as opened:
            parts = _parts(opened, name, tensor.shape)
            if not all(torch.stack(torch.aminmax(part)).isfinite().all() for part in parts if part.numel()):
                wrong.append(name)
    if wrong:
        raise _not_finite(wrong, place)


def _parts(opened: Any, name: str, shape: Sequence[int]) -> Iterator[torch.Tensor]:
    """A stored tensor, some rows at a time."""
    if not shape:
        yield opened.get_tensor(name)
        return
    stored, num_rows = opened.get_slice(name), max(1, HELD_NUMBERS // max(1, prod(shape[1:])))
    for start in range(0, shape[0], num_rows):
        yield stored[start : start + num_rows]


def check_finite(model: nn.Module, place: str) -> None:
    """Refuse weights that hold numbers which are none. Of a sharded parameter, a rank sees its own share.

    Raises:
        ModelError: naming the first such tensor.
    """
    names, extremes = [], []
    for name, tensor in _floating(model):
        names.append(name)
        extremes.append(torch.stack(torch.aminmax(tensor.detach())).float().cpu())
    if not names:
        return
    wrong = ~torch.stack(extremes).isfinite().all(dim=1)
    if wrong.any():
        found = [name for name, is_wrong in zip(names, wrong.tolist(), strict=True) if is_wrong]
        raise _not_finite(found, place)


def _not_finite(names: Sequence[str], place: str) -> ModelError:
    return ModelError(
        f"The weights in {place} hold numbers that are not finite (NaN or infinity) in {listed(names)}: the files are damaged, "
        f"or were saved from a training that had diverged. Give intact weights."
    )


def _floating(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What a model holds of weights as floating-point numbers: of quantised ones, their scales."""
    for name, parameter in model.named_parameters():
        share = getattr(parameter, "ds_tensor", share_of(parameter))  # what ZeRO-3, or a divided base, leaves on this rank
        tensors = _scales(parameter) if is_packed(parameter) else [parameter if share is None else share]
        for tensor in tensors:
            if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
                yield name, tensor


def is_packed(parameter: Any) -> bool:
    """Whether its numbers are bitsandbytes' 4-bit ones, which may lie in a floating-point dtype and are none, or 8-bit ones."""
    return getattr(parameter, "quant_state", None) is not None or getattr(parameter, "SCB", None) is not None


def _scales(parameter: Any) -> list[torch.Tensor]:
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return [parameter.SCB]
    nested = [state.state2.absmax, state.offset] if state.nested else []
    return [state.absmax, *nested]
