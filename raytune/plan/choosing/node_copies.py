"""`training.zero.copy_per_node` in a plan: a second copy of sharded weights among the workers of each node (ZeRO++ hpZ, Wang et
al. 2023), so that weights are gathered inside it. Pure.

DeepSpeed drops the copy of a trained weight with each update, so that the first pass of a step gathers it from all workers; a
frozen base is gathered inside nodes only. MiCS, which had no other copy, is gone from DeepSpeed 0.19.
"""

from raytune.config.sections.run import RunConfig
from raytune.errors import PlanError
from raytune.plan.choosing.requirements import Device
from raytune.plan.facts.machine import Machine
from raytune.plan.run_plan import ZeroStage

KEY = "training.zero.copy_per_node"


def copies_of(config: RunConfig, machine: Machine, device: Device, workers: int) -> tuple[int, ...]:
    """Over how many workers a second copy may be divided, where weights are sharded; 1: there is none.

    Raises:
        PlanError: if one is asked for where there cannot be any.
    """
    wanted = config.training.zero.copy_per_node
    if wanted is False:
        return (1,)
    obstacle = _obstacle(config, machine, device, workers)
    if obstacle and wanted is True:
        raise PlanError(f"{KEY} is true, but {obstacle}. Set it to auto or false.", keys=(KEY,))
    if obstacle:
        return (1,)
    on_node = machine.num_gpus // machine.num_nodes
    return (on_node,) if wanted is True else (1, on_node)


def possible_copies(copies: tuple[int, ...], stage: ZeroStage) -> tuple[int, ...]:
    """Those of a stage: below 3, weights are whole on every worker."""
    return copies if stage == 3 else (1,)


def _obstacle(config: RunConfig, machine: Machine, device: Device, workers: int) -> str | None:
    """Why a node cannot have a copy of its own."""
    if device == "cpu":
        return "workers on CPUs have no places of their own on nodes"
    if (place := config.training.zero.offload_parameters) != "none":
        return f"training.zero.offload_parameters is {place}, and a copy would lie there as well"
    on_node = machine.num_gpus // machine.num_nodes
    if on_node * machine.num_nodes != machine.num_gpus:
        return f"{machine.num_gpus} GPUs are not alike on {machine.num_nodes} nodes"
    if workers <= on_node:
        return f"all {workers} workers are on one node, which has all weights anyway"
    if on_node == 1:
        return "each node has one GPU, which would have to hold all weights"
    if workers % on_node or (workers != machine.num_gpus and "spread" in config.cluster.placement):
        return f"{workers} workers do not fill nodes of {on_node} GPUs"
    return None
