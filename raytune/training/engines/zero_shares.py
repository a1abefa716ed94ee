"""This rank's shares of what DeepSpeed updates at ZeRO 1 to 3, and of its complete gradients: where 0.19 keeps them."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

Group = tuple[int, ...]
"""Ids of the parameters that are updated together, laid end to end."""


def masters(optimizer: Any, stage: int) -> dict[Group, Tensor]:
    """This rank's fp32 shares, by the parameters that each is of."""
    if stage == 3:
        groups, shares = optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat
    else:
        groups, shares = optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups
    return {tuple(id(parameter) for parameter in group): share for group, share in zip(groups, shares, strict=True)}


def own_gradients(optimizer: Any, stage: int, rank: int) -> Iterator[tuple[Group, slice, Tensor]]:
    """This rank's complete gradients, piece by piece, between the two halves of a step: when DeepSpeed has neither counted nor
    clipped them.

    They become fp32, which 16 bits add too little to; the update casts to fp32 in any case.

    Yields:
        The group, where its share has the weights that the piece is of, and the piece, flat; to change it is to change what the
        weights are updated with.
    """
    for index, group in enumerate(masters(optimizer, stage)):
        begin = 0
        gradients = optimizer.averaged_gradients[index]
        pieces = []
        for piece, num_own in zip(gradients, _num_own(optimizer, stage, rank, index), strict=True):
            wide = piece.float()
            if hasattr(piece, "_zero_padding"):
                wide._zero_padding = piece._zero_padding  # pyright: ignore[reportAttributeAccessIssue]
            pieces.append(wide)
            if num_own:
                yield group, slice(begin, begin + num_own), wide.view(-1)[:num_own]
            begin += piece.numel()
        if any(wide is not piece for wide, piece in zip(pieces, gradients, strict=True)):
            optimizer.averaged_gradients[index] = pieces


def _num_own(optimizer: Any, stage: int, rank: int, index: int) -> list[int]:
    """How many numbers of each piece of this rank's gradients are of a weight: what fills up the last share is of none, and
    DeepSpeed leaves it as memory was."""
    gradients = optimizer.averaged_gradients[index]
    if stage < 3:
        return [0 if getattr(piece, "_zero_padding", False) else piece.numel() for piece in gradients]
    weights = optimizer.fp16_groups[index]
    sizes = [piece.numel() for piece in gradients]
    return [min(size, max(0, weight.ds_numel - rank * size)) for weight, size in zip(weights, sizes, strict=True)]
