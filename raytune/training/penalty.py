"""A penalty on how far weights have moved from those of the base: L2-SP (Li et al. 2018).

Its gradient is added where gradients are complete and not yet clipped, by whoever updates: to whole weights or to a rank's
shards, which is the same, since each number has its own term.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from raytune.plan.run_plan import OptimizationPlan


@dataclass(frozen=True, slots=True)
class Held:
    """Weights, or a shard of them, that are held where they began."""

    start: Tensor
    """Their values in the base, in any dtype that has them exactly."""


class Penalty:
    """strength / 2 * sum (w - w0)^2 over what an engine trains.

    Args:
        strength: what the square of a weight's way from the base counts, halved.
    """

    def __init__(self, strength: float) -> None:
        self._strength = strength
        self._value: Tensor | None = None

    @property
    def value(self) -> Tensor | None:
        """What the last step's weights cost before its update, of those that this rank updates, in fp32; None before a step."""
        return self._value

    def begin_step(self) -> None:
        self._value = None

    def add_gradient(self, gradient: Tensor, weights: Tensor, held: Held, *, scale: float = 1.0) -> None:
        """Add the penalty's gradient, in place, and count what these weights cost.

        Args:
            gradient: in fp32, of the loss times `scale`; of the shape of the weights and of `held`.
            weights: in fp32.
            scale: what fp16 multiplies gradients by.
        """
        moved = weights - held.start
        gradient.add_(moved, alpha=self._strength * scale)
        cost = 0.5 * self._strength * torch.linalg.vector_norm(moved).square()
        self._value = cost if self._value is None else self._value + cost


def penalty_of(plan: OptimizationPlan) -> Penalty | None:
    """The penalty of a plan; None without, and then nothing is held or computed for it."""
    return Penalty(plan.l2_sp_strength) if plan.l2_sp_strength else None
