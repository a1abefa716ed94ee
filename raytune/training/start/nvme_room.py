"""Whether the local disks have room for what ZeRO offloads to them: asked on every node before anything is loaded."""

import errno
import os
from pathlib import Path

from raytune import storage
from raytune.errors import PlanError
from raytune.local_files import local_errors
from raytune.plan.run_plan import RunPlan
from raytune.training.checkpoints.peers import Peers
from raytune.training.engines.engine import gather_objects
from raytune.units import format_bytes

SWAP_FOLDER = "zero_stage_3"
"""Where DeepSpeed puts its files below `nvme_path`; what an earlier run left there is written over, or removed."""


def refuse_small_nvme(plan: RunPlan, rank: int, world_size: int) -> None:
    """Refuse NVMe offload where the ranks of a node need more than its disk has. Every rank calls it.

    Raises:
        PlanError: on every rank alike, with the numbers of every such node.
        UserError: on every rank alike, if a node's folder cannot be used.
    """
    path = plan.engine.nvme_path
    if path is None or "nvme" not in (plan.engine.offload_optimizer, plan.engine.offload_parameters):
        return
    peers = Peers(rank, lambda value: gather_objects(value, world_size), PlanError)
    rooms = peers.together(lambda: (os.uname().nodename, _room(Path(path))))
    parts = plan.bytes_on_nvme
    needed_by_rank, short = sum(parts.values()), []
    for node in sorted({node for node, _ in rooms}):
        num_ranks = sum(other == node for other, _ in rooms)
        room = min(found for other, found in rooms if other == node)
        if num_ranks * needed_by_rank > room:
            short.append(f"{node} needs {num_ranks} x {format_bytes(needed_by_rank)} and has {format_bytes(room)}")
    if short:
        listed = ", ".join(f"{name} {format_bytes(count)}" for name, count in parts.items())
        raise PlanError(
            f"{path} has no room for what training.zero offloads to nvme: {'; '.join(short)} ({listed} per worker). "
            f"Free some space there, name a larger disk in training.zero.nvme_path, use more workers on other nodes, or set "
            f"training.zero.offload_optimizer and offload_parameters to cpu."
        )


def _room(path: Path) -> int:
    """Bytes that DeepSpeed may have there: those that are free, and its own old files."""
    with local_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    return (storage.free_bytes(path) or 0) + sum(storage.file_sizes(path / SWAP_FOLDER).values())
