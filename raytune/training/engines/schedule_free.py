"""Optimizers that take gradients at other weights than those that are the model, which is an average that they make as they go
(Defazio et al. 2024, *The Road Less Scheduled*): how an engine shows the model, and what they count beside the state of weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch

COUNTED = ("k", "weight_sum", "lr_max")
"""Entries of a group: steps made, the sum of what they count in the average, and the highest rate until now."""


@runtime_checkable
class ScheduleFree(Protocol):
    """What schedulefree's optimizers have beside those of PyTorch."""

    param_groups: list[dict[str, Any]]
    state: Mapping[torch.Tensor, Any]

    def train(self) -> None:
        """Put the weights that gradients are taken at in place."""
        ...

    def eval(self) -> None:
        """Put the average in place."""
        ...


@contextmanager
def at_average(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Context in which the weights are the average that the optimizer makes; of any other optimizer, as they are.

    Afterwards they are as before, bit for bit: the optimizer's own way back rounds, and it would matter how often a run is
    evaluated. What is kept for that takes the room of the gradients, of which there are none between steps.
    """
    if not isinstance(optimizer, ScheduleFree):
        yield
        return
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    kept = {weight: weight.detach().clone() for weight in weights if weight in optimizer.state}
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        for weight, value in kept.items():
            weight.data.copy_(value)


def counts(optimizer: torch.optim.Optimizer) -> list[dict[str, float]]:
    """What the optimizer counts, by group; nothing of any other optimizer."""
    if not isinstance(optimizer, ScheduleFree):
        return []
    return [{key: group[key] for key in COUNTED} for group in optimizer.param_groups]


def take_counts(optimizer: torch.optim.Optimizer, counted: Sequence[Mapping[str, float]]) -> None:
    """Go on from what `counts` gave."""
    for group, values in zip(optimizer.param_groups if counted else (), counted, strict=True):
        group.update(values)
