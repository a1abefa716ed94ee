"""What is minimised: a loss per target token. The loss layer hands a token loss the logits of all targets, or of a chunk of them.

An objective is a frozen value with the methods of `TokenLoss`. It never sees a position that is no target, and knows nothing of
models, chunks and ranks: sums over targets are added up by the loss layer and divided by the sum of their weights in the loop.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

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
    """What else an objective compares with, a row per target, by its name."""

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


TEACHER = "teacher"
"""Of `TokenTargets.extras`: the hidden states of a teacher from which it predicts the targets, (C, width of the teacher)."""


@dataclass(frozen=True, slots=True)
class Distillation:
    """(1 - weight) * cross-entropy + weight * T^2 * KL(teacher || student), both softened by the temperature T (Hinton et al.
    2015), over the tokens that both have.

    With `top_k`, over those of them that the teacher finds likeliest at each target, among which both are made to sum to 1.
    """

    weight: float
    """More than 0; at 1 the targets themselves count for nothing."""
    temperature: float
    top_k: int | None
    teacher_logits: Callable[[Tensor], Tensor]
    """Of some rows of hidden states, (C, vocabulary of the teacher); without a gradient."""
    told: Callable[[Tensor], None] = lambda divergences: None
    """Hears weight * T^2 * KL of each target, (C,), without its own weight, as sums are computed: of some targets after the
    other, in their order."""

    def losses(self, logits_CV: Tensor, targets: TokenTargets) -> Tensor:
        losses_C, _ = self._divergence(logits_CV, targets, with_gradient=False)
        return losses_C.add_(CrossEntropy().losses(logits_CV, targets), alpha=1 - self.weight) if self.weight < 1 else losses_C

    def loss(self, logits_CV: Tensor, targets: TokenTargets) -> Tensor:
        return _analytic_loss(self, logits_CV, targets)  # pyright: ignore[reportCallIssue]

    def loss_and_gradient(self, logits_CV: Tensor, targets: TokenTargets, *, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        losses_C, gradient_CV = self._divergence(logits_CV, targets, with_gradient=with_gradient)
        self.told(losses_C.clone())  # which is changed below
        ids_C1 = targets.ids_C[:, None]
        if self.weight < 1:
            log_probabilities_CV = _log_softmax(logits_CV)
            losses_C.sub_(log_probabilities_CV.gather(1, ids_C1)[:, 0], alpha=1 - self.weight)
            if gradient_CV is not None:
                hard_CV = log_probabilities_CV.exp_()
                hard_CV.scatter_add_(1, ids_C1, hard_CV.new_full(ids_C1.shape, -1.0))
                gradient_CV = gradient_CV.add_(hard_CV, alpha=1 - self.weight)
        if targets.weights_C is not None:
            losses_C *= targets.weights_C
            if gradient_CV is not None:
                gradient_CV *= targets.weights_C[:, None]
        return losses_C.sum(), None if gradient_CV is None else gradient_CV.to(logits_CV.dtype)

    @torch.no_grad()
    def _divergence(self, logits_CV: Tensor, targets: TokenTargets, *, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        """weight * T^2 * KL of each target, and its gradient by all logits, weight * T * (q - p)."""
        teacher_CV = self.teacher_logits(targets.extras[TEACHER])
        num_shared = min(logits_CV.shape[1], teacher_CV.shape[1])
        student_CK, kept_CK = logits_CV[:, :num_shared], None
        teacher_CK = teacher_CV[:, :num_shared]
        if self.top_k is not None and self.top_k < num_shared:
            teacher_CK, kept_CK = teacher_CK.topk(self.top_k, sorted=False)
            student_CK = student_CK.gather(1, kept_CK)
        del teacher_CV
        log_p_CK = _log_softmax(self._softened(teacher_CK))
        del teacher_CK
        log_q_CK = _log_softmax(self._softened(student_CK))
        p_CK = log_p_CK.exp()
        # Where a teacher rules a token out, nothing is added: 0 * log 0 is 0.
        terms_CK = log_p_CK.sub_(log_q_CK).masked_fill_(p_CK == 0, 0.0).mul_(p_CK)
        losses_C = terms_CK.sum(1).mul_(self.weight * self.temperature**2)
        if not with_gradient:
            return losses_C, None
        del terms_CK, log_p_CK
        gradient_CK = log_q_CK.exp_().sub_(p_CK).mul_(self.weight * self.temperature)
        if gradient_CK.shape == logits_CV.shape:
            return losses_C, gradient_CK
        gradient_CV = gradient_CK.new_zeros(logits_CV.shape)
        if kept_CK is None:
            gradient_CV[:, :num_shared] = gradient_CK
        else:
            gradient_CV.scatter_(1, kept_CK, gradient_CK)
        return losses_C, gradient_CV

    def _softened(self, logits_CK: Tensor) -> Tensor:
        return logits_CK.to(loss_dtype(logits_CK)) / self.temperature


class _Analytic(torch.autograd.Function):
    """The loss of an objective whose gradient is made with it; the backward pass only scales that."""

    @staticmethod
    def forward(ctx: Any, objective: TokenLoss, logits_CV: Tensor, targets: TokenTargets, with_gradient: bool) -> Tensor:
        # In 16 bits a weight of 1e-5 would be 0, and one of 1e5 infinite.
        targets, scale = targets.scaled() if len(targets) else (targets, None)
        loss, ctx.gradient_CV = objective.loss_and_gradient(logits_CV, targets, with_gradient=with_gradient)
        ctx.scale = scale
        return loss if scale is None else loss * scale

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient_CV, ctx.gradient_CV = ctx.gradient_CV, None  # scaled in place, hence once
        return None, gradient_CV.mul_(loss_gradient if ctx.scale is None else loss_gradient * ctx.scale), None, None


@torch.compiler.disable  # a compiler would not hear what an objective tells
def _analytic_loss(objective: TokenLoss, logits_CV: Tensor, targets: TokenTargets) -> Tensor:
    return _Analytic.apply(objective, logits_CV, targets, torch.is_grad_enabled())  # pyright: ignore[reportReturnType]


def loss_dtype(logits: Tensor) -> torch.dtype:
    """The dtype that losses of such logits are computed in."""
    return torch.promote_types(logits.dtype, torch.float32)


def _log_softmax(logits_CV: Tensor) -> Tensor:
    return torch.log_softmax(logits_CV, -1, dtype=loss_dtype(logits_CV))
