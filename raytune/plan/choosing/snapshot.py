"""Memory of the host that each checkpoint is copied into, so that training goes on while its files are written: how much a worker
needs, and whether it is there. What is trained and how it is divided never hangs on it: without it, training waits for the files.
"""

from dataclasses import replace

from raytune.errors import PlanError
from raytune.plan.choosing.fitting import Fit, room_of_worker
from raytune.plan.choosing.setting import Setting
from raytune.plan.costs.memory import bytes_in
from raytune.plan.defaults import Choice
from raytune.plan.facts.machine import USABLE_SHARE
from raytune.plan.run_plan import MemoryPart, Place, SnapshotPlan
from raytune.units import format_bytes

KEY = "checkpoint.in_background"
COPY = "copy of a checkpoint"

SPARE = 1.03
"""For what the arithmetic leaves out: step counters, tables of 8-bit Adam, and the way to where the next tensor may begin."""


def snapshot_plan(setting: Setting, fit: Fit) -> Choice[SnapshotPlan | None]:
    """What each rank copies its checkpoints into; None where training waits for the files.

    Raises:
        PlanError: if it is asked for and cannot be.
    """
    wanted = setting.config.checkpoint.in_background
    if wanted is False:
        return Choice(None)
    why_not = _why_not(setting, fit)
    if why_not is None:
        return Choice(_needed(fit))
    if wanted is True:
        raise PlanError(
            f"{KEY} is true, but {why_not}. Set {KEY} to auto or false: training then waits while checkpoints are written.",
            keys=(KEY,),
        )
    return Choice(None, f"{KEY} is false, and training waits while checkpoints are written: {why_not}.")


def with_copy(fit: Fit, snapshot: SnapshotPlan | None, setting: Setting) -> Fit:
    """The same with the copy in its memory, in every phase: it is allocated once."""
    if snapshot is None:
        return fit
    part = MemoryPart(name=COPY, num_bytes=snapshot.first_rank, place=_place(setting))
    return replace(fit, phases=tuple(replace(one, memory=[*one.memory, part]) for one in fit.phases))


def _needed(fit: Fit) -> SnapshotPlan:
    """Of the largest phase."""
    first, other = max(one.saved_by_ranks for one in fit.phases)
    return SnapshotPlan(first_rank=round(SPARE * first), other_ranks=round(SPARE * other))


def _why_not(setting: Setting, fit: Fit) -> str | None:
    zero = setting.config.training.zero
    for name, offload in {"offload_optimizer": zero.offload_optimizer, "offload_parameters": zero.offload_parameters}.items():
        if offload == "nvme":
            return f"the state lies in files of its own (training.zero.{name}: nvme), which are copied"
    room, place = room_of_worker(setting), _place(setting)
    limit = room.device if place == "device" else room.host
    if limit is None:
        return None
    needed, taken = _needed(fit).first_rank, max(bytes_in(one.memory, place) for one in fit.phases)
    if needed + taken <= limit:
        return None
    beside = f" beside the {format_bytes(taken)} of training" if taken else ""
    return (
        f"a copy of a checkpoint needs {format_bytes(needed)} of the host's memory per worker{beside}, and {format_bytes(limit)} "
        f"({USABLE_SHARE:.0%}) can be used"
    )


def _place(setting: Setting) -> Place:
    """What the plan calls the memory of the host."""
    return "host" if setting.device == "cuda" else "device"
