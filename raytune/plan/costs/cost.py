"""Hours and dollars of a run, and what an interruption costs. Pure; prices come from the hardware catalogue."""

import math

from raytune.plan.costs.hardware import Instance
from raytune.plan.run_plan import CostPlan

HOURS_BETWEEN_FAULTS = 6300.0
"""Of one node on demand: Dubey et al. 2024 (Llama 3), table 5: 419 unexpected interruptions of 2,048 nodes in 54 days."""
HOURS_BETWEEN_PREEMPTIONS = 24.0
"""Of one spot node; assumed, and different each week. Clouds publish how often, not when."""
STORAGE_BYTES_PER_S = 1e9
"""Rate at which a node writes a checkpoint to shared storage; assumed."""
RESTART_S = 300.0
"""From the loss of a node to the next step: a new node, workers, weights. Assumed."""


def cost_of(
    instance: Instance,
    *,
    num_nodes: int,
    is_spot: bool,
    num_steps: int,
    step_s: float,
    importance_s: float = 0.0,
    checkpoint_bytes: int,
    num_writers: int,
) -> CostPlan:
    """Hours and dollars of all training steps, and the best time between saves.

    Args:
        instance: what is rented.
        num_nodes: of them.
        is_spot: whether nodes can be taken away.
        num_steps: optimizer steps of the run.
        step_s: seconds of a step.
        importance_s: seconds before the first step, in which the importance of weights is estimated.
        checkpoint_bytes: of one checkpoint, over all ranks.
        num_writers: nodes that write it.
    """
    hours = (importance_s + num_steps * step_s) / 3600
    per_hour = instance.usd_per_hour * num_nodes
    spot = instance.spot_usd_per_hour
    spot_per_hour = None if spot is None else spot * num_nodes
    save_s = checkpoint_bytes / (STORAGE_BYTES_PER_S * num_writers)
    between_s = 3600 * (HOURS_BETWEEN_PREEMPTIONS if is_spot else HOURS_BETWEEN_FAULTS) / num_nodes
    every_s = min(best_save_interval_s(save_s, between_s), 3600 * hours)
    lost_s = every_s / 2 + RESTART_S
    paid_per_hour = spot_per_hour if is_spot and spot_per_hour is not None else per_hour
    return CostPlan(
        instance=instance.name,
        num_nodes=num_nodes,
        is_spot=is_spot,
        hours=hours,
        usd=hours * per_hour,
        spot_usd=None if spot_per_hour is None else hours * spot_per_hour,
        save_s=save_s,
        between_interruptions_s=between_s,
        save_every_s=every_s,
        lost_s_per_interruption=lost_s,
        lost_usd_per_interruption=lost_s / 3600 * paid_per_hour,
        price_date=instance.date,
    )


def best_save_interval_s(save_s: float, between_interruptions_s: float) -> float:
    """Seconds between saves that lose least to saving and to repeating what was not saved.

    Young 1974 (A first order approximation to the optimum checkpoint interval): sqrt(2 x save x interval of interruptions); with
    the higher order of Daly 2006 (A higher order estimate of the optimum checkpoint interval), equation 37.
    """
    if save_s >= 2 * between_interruptions_s:
        return between_interruptions_s
    ratio = save_s / (2 * between_interruptions_s)
    young = math.sqrt(2 * save_s * between_interruptions_s)
    return young * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_s
