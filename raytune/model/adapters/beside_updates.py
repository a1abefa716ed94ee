"""What a method may do in each step beside the optimizer's update: an engine asks it, and gives it whole values."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn


class BesideUpdates(Protocol):
    """A method's own part of a step. Every rank has one, sees the same values, and so does the same."""

    parameters: dict[str, nn.Parameter]
    """What it follows, by the names of `named_parameters()`."""

    def add_gradients(self, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        """Add, in place, the gradient of what the method adds to the loss of a step, whose gradients are these.

        Args:
            values: of what it follows, whole and in the precision of the updates.
            gradients: of the step over all ranks, before they are clipped.
        """
        ...

    def after_update(self, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> list[str]:
        """Do what follows an update.

        Args:
            values: after the update, which the method may change in place.
            gradients: that the update was made with, clipped.

        Returns:
            The names of what it changed.
        """
        ...

    def skipped(self) -> None:
        """Hear of a step that updated nothing, because its gradient was not finite."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What a later process needs to go on exactly."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        ...
