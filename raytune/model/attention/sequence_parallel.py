"""Attention of rows whose tokens are divided among ranks (Jacobs et al. 2023, DeepSpeed Ulysses), which exchange heads.

Before attention each rank has all heads of its slice of tokens; in it, its share of the heads of all tokens; behind it, again all
heads of its slice. So attention computes what one process would, a head at a time, over the same packed row.

Shapes: S ranks, H heads, T tokens of the row, t = T / S of a slice, D head width.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedRows:
    """The ranks that share rows with this one."""

    group: Any
    """A process group of torch.distributed."""
    place: int
    size: int

    @classmethod
    def of(cls, size: int, rank: int, world_size: int, timeout_s: float) -> "SharedRows | None":
        """Every rank calls it, at the same point; None: nobody shares rows."""
        if size == 1:
            return None
        own = None
        for first in range(0, world_size, size):  # torch wants all ranks to make all groups
            group = dist.new_group(list(range(first, first + size)), timeout=timedelta(seconds=timeout_s))
            own = group if first <= rank < first + size else own
        return cls(group=own, place=rank % size, size=size)

    def own_heads(self, of_slice: Tensor) -> Tensor:
        """(1, H, t, D) -> (1, H / S, T, D): this rank's heads of all tokens. Where there are fewer heads (of keys and
        values) than ranks, each is given to several: those whose query heads read it."""
        num_heads = of_slice.shape[1]
        if num_heads < self.size:
            of_slice = of_slice.repeat_interleave(self.size // num_heads, dim=1)
        by_rank = of_slice[0].unflatten(0, (self.size, -1))  # (S, H / S, t, D)
        return self._exchanged(by_rank).transpose(0, 1).flatten(1, 2)[None]

    def own_tokens(self, of_heads: Tensor) -> Tensor:
        """(1, T, H / S, D) -> (1, t, H, D): all heads of this rank's tokens."""
        by_rank = of_heads[0].unflatten(0, (self.size, -1))  # (S, t, H / S, D)
        return self._exchanged(by_rank).transpose(0, 1).flatten(1, 2)[None]

    def share_of(self, of_heads: Tensor) -> Tensor:
        """(H,) -> (H / S,): what belongs to this rank's heads."""
        return of_heads.chunk(self.size)[self.place]

    def _exchanged(self, by_rank: Tensor) -> Tensor:
        exchanged = _Exchange.apply(by_rank, self.group)
        assert isinstance(exchanged, Tensor)
        return exchanged


class _Exchange(torch.autograd.Function):
    """Part i of each rank goes to rank i, and arrives there in the sender's place. Gradients go back in the same way."""

    @staticmethod
    def forward(ctx: Any, by_rank: Tensor, group: Any) -> Tensor:
        ctx.group = group
        by_rank = by_rank.contiguous()
        received = torch.empty_like(by_rank)
        dist.all_to_all_single(received, by_rank, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Exchange.forward(ctx, gradient, ctx.group), None
