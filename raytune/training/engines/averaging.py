"""A running average of weights, held beside them: of whole weights, or of a rank's shards of them, which is the same, since each
number has its own average. Which steps it is over, and with what shares, says `plan.strategies.averaging`.
"""

from collections.abc import Collection, Hashable, Mapping
from pathlib import Path
from typing import Generic, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from raytune.training.engines.state_files import Write, fill_with_tensors

Key = TypeVar("Key", bound=Hashable)

_EXCHANGED_AT_ONCE = 1 << 24
"""Numbers that are on their way between two places: 64 MiB, which whoever evaluates has room for."""


class Average(Generic[Key]):
    """In fp32. Empty, and without any cost, until something is averaged; the average is then what the weights are.

    Weights are given by a key, always all that are trained, in one order.
    """

    def __init__(self) -> None:
        self._values: dict[Key, Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._values)

    @property
    def values(self) -> Collection[Tensor]:
        return self._values.values()

    @torch.no_grad()
    def add(self, weights: Mapping[Key, Tensor], share: float) -> None:
        """Draw the average to the weights, all the way the first time."""
        if not self._values:
            self.begin(weights)
        else:
            torch._foreach_lerp_([self._values[key] for key in weights], [weight.data for weight in weights.values()], share)

    def begin(self, weights: Mapping[Key, Tensor]) -> None:
        """Take weights that have been as they are until now for their average, as far as they have none."""
        for key, weight in weights.items():
            if key not in self._values:
                self._values[key] = weight.detach().to(torch.float32, copy=True)

    @torch.no_grad()
    def exchange(self, weights: Mapping[Key, Tensor]) -> None:
        """Put the average where the weights are, and these where it was; a second time puts both back, bit for bit."""
        for key, weight in weights.items():
            ours, theirs = torch.atleast_1d(self._values[key], weight.data)
            num_rows = max(1, len(ours) * _EXCHANGED_AT_ONCE // max(1, ours.numel()))
            for own, other in zip(ours.split(num_rows), theirs.split(num_rows), strict=True):
                kept = own.clone()
                own.copy_(other)
                other.copy_(kept)

    def save(self, weights: Mapping[Key, Tensor], file: Path, write: Write) -> None:
        """Write it, in the order of the weights; nothing if there is none."""
        if self._values:
            write(file, {str(index): self._values[key].contiguous() for index, key in enumerate(weights)}, fill_with_tensors)

    def load(self, weights: Mapping[Key, Tensor], file: Path) -> None:
        """Go on from what was saved with weights in the same order; where no file is, nothing was averaged by then."""
        saved = load_file(file) if file.exists() else {}
        self._values = {key: saved[str(index)].to(weight.device) for index, (key, weight) in enumerate(weights.items()) if saved}
