"""Sums of gradients over the ranks, for an engine that keeps them whole: bucket by bucket, while the rest of them is computed.

Buckets go in one order on every rank, that in which a backward pass completes them, whatever is complete first on one of them: so
that ranks cannot wait for each other's other bucket where one of them has no gradient for some weight.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raytune.errors import TrainingError
from raytune.model.parts.collectives import arrived

ON_THE_WAY = 2
"""Buckets that are summed at once: one travels while the next is made. So many lie beside the gradients."""


@dataclass(slots=True)
class _Sent:
    """A bucket on its way."""

    work: Any
    flat: Tensor
    gradients: list[Tensor]
    is_copy: bool


class GradientSum:
    """Gradients of parameters, which every rank has whole, as sums over all ranks of the default process group.

    Args:
        parameters: in the order of the model, the same on every rank.
        bucket_bytes: of a bucket, at most; a larger gradient is one by itself.
        overlaps: whether the last backward pass of a step may send what it has completed.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, bucket_bytes: int, overlaps: bool = True) -> None:
        self._buckets = list(_buckets(parameters, bucket_bytes))
        self._index = {parameter: index for index, bucket in enumerate(self._buckets) for parameter in bucket}
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._arrived) for parameter in self._index]
        self._overlaps, self._was_seen = overlaps, False
        self._is_backward = self._sends = False
        self._seen: set[nn.Parameter] = set()
        self._missing: list[int] = []
        self._next = 0
        self._on_the_way: deque[_Sent] = deque()

    @contextmanager
    def during(self, *, is_last: bool) -> Iterator[None]:
        """Context of a backward pass.

        Args:
            is_last: whether nothing is added to the gradients of the step after it.
        """
        # The first pass is watched only: a gradient that comes in parts (as where parts of a model that are recomputed, and run
        # backward by themselves, share a weight) must not be sent with its first one.
        self._sends = is_last and self._overlaps and self._was_seen
        self._is_backward, self._missing = True, [len(bucket) for bucket in self._buckets]
        self._seen.clear()
        try:
            yield
        finally:
            self._is_backward = self._sends = False
        self._was_seen = True

    def finish(self) -> None:
        """Send what is left, and wait until all gradients are sums; those that there are not are 0. On a GPU its stream waits."""
        while self._next < len(self._buckets):
            self._send()
        while self._on_the_way:
            self._take()
        self._next = 0

    def close(self) -> None:
        """Let go of the parameters."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _arrived(self, parameter: Tensor) -> None:
        if not self._is_backward:
            return
        assert isinstance(parameter, nn.Parameter)
        index = self._index[parameter]
        if parameter in self._seen:
            self._overlaps = False
            if index < self._next:
                raise TrainingError(
                    "A weight got its gradient in two parts within a backward pass, and had one part in every pass before: the "
                    "first part is summed over the workers already. Train with training.gradient_checkpointing: false."
                )
            self._sends = False
            return
        self._seen.add(parameter)
        self._missing[index] -= 1
        while self._sends and self._next < len(self._buckets) and not self._missing[self._next]:
            self._send()

    def _send(self) -> None:
        if len(self._on_the_way) == ON_THE_WAY:
            self._take()
        gradients = []
        for parameter in self._buckets[self._next]:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        self._next += 1
        is_copy = len(gradients) > 1 or not gradients[0].is_contiguous()
        flat = torch.cat([gradient.flatten() for gradient in gradients]) if is_copy else gradients[0].view(-1)
        self._on_the_way.append(_Sent(dist.all_reduce(flat, async_op=True), flat, gradients, is_copy))

    def _take(self) -> None:
        sent = self._on_the_way.popleft()
        arrived(sent.work)
        if sent.is_copy:
            parts = sent.flat.split([gradient.numel() for gradient in sent.gradients])
            torch._foreach_copy_(sent.gradients, [part.view_as(gradient) for part, gradient in zip(parts, sent.gradients)])


def _buckets(parameters: Iterable[nn.Parameter], bucket_bytes: int) -> Iterator[list[nn.Parameter]]:
    """Parameters by bucket, the last ones first."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in reversed(list(parameters)):
        num_bytes = parameter.numel() * parameter.element_size()
        if bucket and size + num_bytes > bucket_bytes:
            yield bucket[::-1]
            bucket, size = [], 0
        bucket.append(parameter)
        size += num_bytes
    if bucket:
        yield bucket[::-1]
