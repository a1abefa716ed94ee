"""Penalties on how far weights have moved from those of the base: L2-SP (Li et al. 2018) and, by the importance of each weight,
EWC (Kirkpatrick et al. 2017).

Their gradient is added where gradients are complete and not yet clipped, by whoever updates: to whole weights or to a rank's
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
    importance: Tensor | None = None
    """By which each counts under EWC, in fp32."""

    def part(self, own: slice) -> "Held":
        """Of a shard that is flat."""
        return Held(self.start[own], None if self.importance is None else self.importance[own])

    @property
    def tensors(self) -> list[Tensor | None]:
        return [self.start, self.importance]


class Penalty:
    """1/2 sum (l2_sp + ewc F) (w - w0)^2 over what an engine trains, with F the importance of each weight.

    Args:
        l2_sp: strength of the first term; 0: there is none.
        ewc: of the second.
    """

    def __init__(self, l2_sp: float, ewc: float = 0.0) -> None:
        self._l2_sp, self._ewc = l2_sp, ewc
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
        if self._l2_sp:
            gradient.add_(moved, alpha=self._l2_sp * scale)
            self._count(0.5 * self._l2_sp * torch.linalg.vector_norm(moved).square())
        if self._ewc:
            assert held.importance is not None, "importance is estimated before the first step"
            gradient.addcmul_(moved, held.importance, value=self._ewc * scale)
            self._count(0.5 * self._ewc * moved.square_().mul_(held.importance).sum())

    def _count(self, cost: Tensor) -> None:
        self._value = cost if self._value is None else self._value + cost


def penalty_of(plan: OptimizationPlan) -> Penalty | None:
    """The penalty of a plan; None without, and then nothing is held or computed for it."""
    return Penalty(plan.l2_sp_strength, plan.ewc_strength) if plan.l2_sp_strength or plan.ewc_strength else None
