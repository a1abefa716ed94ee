"""What is minimised: a loss per target token. The loss layer hands a token loss the logits of all targets, or of a chunk of them.

An objective is a frozen value with the methods of `TokenLoss`. It never sees a position that is no target, and knows nothing of
models, chunks and ranks: sums over targets are added up by the loss layer and divided by the sum of their weights in the loop.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# Shapes: C targets, V vocabulary.


@dataclass(frozen=True, slots=True)
class TokenTargets:
    """Some of the targets of a batch."""

    ids_C: Tensor
    weights_C: Tensor | None = None
    """fp32; None: each weighs 1."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """What else an objective compares with, a row per target: a teacher's logits, for example."""

    def chunk(self, part: slice) -> "TokenTargets":
        weights_C = None if self.weights_C is None else self.weights_C[part]
        return TokenTargets(self.ids_C[part], weights_C, {name: extra[part] for name, extra in self.extras.items()})

    def scaled(self) -> "tuple[TokenTargets, Tensor | None]":
        """The same with weights of at most 1, and what they were divided by; None where there are no weights. Of at least one
        target."""
        if self.weights_C is None:
            return self, None
        largest = self.weights_C.max()
        return TokenTargets(self.ids_C, self.weights_C / largest, self.extras), largest

    def __len__(self) -> int:
        return len(self.ids_C)


class TokenLoss(Protocol):
    """A loss per target token. Values are in fp32 at least, whatever the dtype of the logits."""

    def losses(self, logits_CV: Tensor, targets: TokenTargets) -> Tensor:
        """The loss of each target, (C,), without its weight. For looking at them; needs no gradient."""
        ...

    def loss(self, logits_CV: Tensor, targets: TokenTargets) -> Tensor:
        """The sum of loss times weight, a scalar that autograd can follow. Of no targets it is 0."""
        ...

    def loss_and_gradient(self, logits_CV: Tensor, targets: TokenTargets, *, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        """The same sum, and its gradient by the logits in their dtype, made without autograd: called for a chunk at a time.

        Args:
            with_gradient: whether it is needed; else it is None.
        """
        ...


@dataclass(frozen=True, slots=True)
class CrossEntropy:
    """Minus the logarithm of the target's probability, in nats."""

    def losses(self, logits_CV: Tensor, targets: TokenTargets) -> Tensor:
        return -_log_softmax(logits_CV).gather(1, targets.ids_C[:, None])[:, 0]

    def loss(self, logits_CV: Tensor, targets: TokenTargets) -> Tensor:
        log_likelihoods_C1 = _log_softmax(logits_CV).gather(1, targets.ids_C[:, None])
        if targets.weights_C is not None:
            log_likelihoods_C1 = log_likelihoods_C1 * targets.weights_C[:, None]
        # Summed by the kernel of F.cross_entropy, in its order, so that a run equals transformers.Trainer bit for bit.
        return F.nll_loss(log_likelihoods_C1, torch.zeros_like(targets.ids_C), reduction="sum")

    def loss_and_gradient(self, logits_CV: Tensor, targets: TokenTargets, *, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        ids_C1 = targets.ids_C[:, None]
        log_probabilities_CV = _log_softmax(logits_CV)
        losses_C1 = -log_probabilities_CV.gather(1, ids_C1)
        if targets.weights_C is not None:
            losses_C1 *= targets.weights_C[:, None]
        if not with_gradient:
            return losses_C1.sum(), None
        # Softmax, minus one at the target. Subtracted before the cast to 16 bits, which would round the small difference of a
        # confident prediction away.
        gradient_CV = log_probabilities_CV.exp_()
        gradient_CV.scatter_add_(1, ids_C1, gradient_CV.new_full(ids_C1.shape, -1.0))
        if targets.weights_C is not None:
            gradient_CV *= targets.weights_C[:, None]
        return losses_C1.sum(), gradient_CV.to(logits_CV.dtype)


def loss_dtype(logits: Tensor) -> torch.dtype:
    """The dtype that losses of such logits are computed in."""
    return torch.promote_types(logits.dtype, torch.float32)


def _log_softmax(logits_CV: Tensor) -> Tensor:
    return torch.log_softmax(logits_CV, -1, dtype=loss_dtype(logits_CV))
