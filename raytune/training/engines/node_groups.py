"""Groups of neighbouring ranks, those of a node, that have a copy of sharded weights among them (plan.node_copies)."""

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from deepspeed.utils import groups

_made: dict[int, tuple[Any, Any]] = {}
"""By size: the process group of all ranks, and of those that are in it this rank's neighbours."""


def share_copies(size: int, timeout_s: float) -> None:
    """Have DeepSpeed divide a second copy of the weights that are sharded next among each `size` neighbouring ranks; 1: there is
    none. Every rank calls it.

    DeepSpeed 0.19 makes these groups once in the life of a process, refuses to make them for a second model, and uses them for
    models that have no copy too.
    """
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None if size == 1 else _group_of(size, timeout_s)
    groups._create_zero_param_parallel_group = _is_there


def _group_of(size: int, timeout_s: float) -> Any:
    everyone = dist.group.WORLD
    if size not in _made or _made[size][0] is not everyone:
        firsts = range(0, dist.get_world_size(), size)
        all_groups = [dist.new_group(range(first, first + size), timeout=timedelta(seconds=timeout_s)) for first in firsts]
        _made[size] = everyone, all_groups[dist.get_rank() // size]
    return _made[size][1]


def _is_there(group_size: int) -> None:
    """In place of DeepSpeed's function that makes a group."""
