"""A loss of the user's as an objective: a function from logits to a loss per target, whose gradient autograd finds.

    def focal(logits, target_ids, gamma=2.0):      # (targets, vocabulary) in fp32, (targets,)
        cross_entropy = F.cross_entropy(logits, target_ids, reduction="none")
        return (1 - (-cross_entropy).exp()) ** gamma * cross_entropy      # (targets,)

Weights are applied here, and sums divided in the loop as those of cross-entropy are. So a loss has to be one of each target by
itself, whatever the others are: only then does it not depend on how a batch is cut into chunks, micro-batches and ranks.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from raytune.errors import UserError
from raytune.plan.run_plan import ObjectivePlan
from raytune.plan.strategies.objective import KEY
from raytune.training.losses.objectives import TokenLoss, TokenTargets, loss_dtype
from raytune.user_code import UserCode, load, told

# Shapes: C targets, V vocabulary.

PROBE_TARGETS = 6
MEASURED_LOGITS = 1 << 20
SAME = 1e-5
"""Of a target's loss, by how much two ways to compute it in fp32 may differ."""

LossFunction = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class FunctionLoss:
    """A function of logits and target ids that gives the loss of each target."""

    function: LossFunction

    def losses(self, logits_CV: Tensor, targets: TokenTargets) -> Tensor:
        return self._of_each(logits_CV, targets.ids_C)

    def loss(self, logits_CV: Tensor, targets: TokenTargets) -> Tensor:
        if not len(targets):  # of which some functions make NaN
            return logits_CV.sum(dtype=loss_dtype(logits_CV)) * 0
        losses_C = self._of_each(logits_CV, targets.ids_C)
        return (losses_C if targets.weights_C is None else losses_C * targets.weights_C).sum()

    def loss_and_gradient(self, logits_CV: Tensor, targets: TokenTargets, *, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        if not with_gradient:
            return self.loss(logits_CV, targets), None
        with torch.enable_grad():
            leaf_CV = logits_CV.detach().to(loss_dtype(logits_CV)).requires_grad_()
            loss = self.loss(leaf_CV, targets)
            gradient_CV = torch.autograd.grad(loss, leaf_CV)[0]
        return loss.detach(), gradient_CV.to(logits_CV.dtype)

    def _of_each(self, logits_CV: Tensor, ids_C: Tensor) -> Tensor:
        with torch.autocast(logits_CV.device.type, enabled=False):  # else products of the user's would be in 16 bits
            return self.function(logits_CV.to(loss_dtype(logits_CV)), ids_C)


def objective_from(plan: ObjectivePlan) -> TokenLoss:
    """The loss of a plan.

    Raises:
        UserError: if the code cannot be run on this machine, or is no loss.
    """
    code = plan.code
    found = load(code)
    if inspect.isclass(found):
        with _blamed(code, "cannot be made with strategy.objective.options"):
            made: Any = found(**plan.options)
        missing = [name for name in ("losses", "loss", "loss_and_gradient") if not callable(getattr(made, name, None))]
        if missing:
            raise _refused(code, f"is a class without {' and '.join(missing)}, which a `TokenLoss` has. A function is simpler")
        return cast(TokenLoss, made)
    if not callable(found):
        raise _refused(code, f"is no function, but of type {type(found).__name__}")
    return FunctionLoss(cast(LossFunction, torch.compiler.disable(_with_options(code, cast(LossFunction, found), plan.options))))


def tried(plan: ObjectivePlan, vocab: int) -> ObjectivePlan:
    """The plan of a loss that works on random logits, with the bytes that it took.

    Args:
        vocab: of the model.

    Raises:
        UserError: if it does not, with what is wrong and the line of the user's file.
    """
    code, objective = plan.code, objective_from(plan)
    generator = torch.Generator().manual_seed(0)
    logits_CV = torch.randn(PROBE_TARGETS, vocab, generator=generator)
    ids_C = torch.randint(vocab, (PROBE_TARGETS,), generator=generator)
    weights_C = torch.linspace(0.5, 2.0, PROBE_TARGETS)
    with _blamed(code, "fails on random logits"):
        losses_C = _checked(code, objective.losses(logits_CV.clone().requires_grad_(), TokenTargets(ids_C)))
        parts = [objective.losses(logits_CV[part], TokenTargets(ids_C[part])).detach() for part in (slice(2), slice(2, None))]
        if not torch.allclose(torch.cat(parts), losses_C, rtol=SAME, atol=SAME):
            raise _refused(
                code,
                "gives a target another loss when other targets are beside it, or at another call, so that a run would depend on "
                "how batches are cut. Return the loss of each target by itself, without a mean over them and without chance",
            )
        targets = TokenTargets(ids_C, weights_C)
        leaf_CV = logits_CV.clone().requires_grad_()
        loss = objective.loss(leaf_CV, targets)
        gradient_CV = _gradient(code, loss, leaf_CV)
        of_chunk, gradient_of_chunk_CV = objective.loss_and_gradient(logits_CV, targets, with_gradient=True)
        if gradient_of_chunk_CV is None or not (
            torch.allclose(of_chunk, (losses_C * weights_C).sum(), rtol=SAME, atol=SAME)
            and torch.allclose(loss, of_chunk, rtol=SAME, atol=SAME)
            and torch.allclose(gradient_of_chunk_CV, gradient_CV, rtol=1e-3, atol=SAME)
        ):
            raise _refused(code, "has methods that do not agree: loss and loss_and_gradient are the sum of losses times weights")
        bytes_per_logit = _bytes_per_logit(objective, vocab)
    return plan.model_copy(update={"bytes_per_logit": bytes_per_logit, "is_tried": True})


def _with_options(code: UserCode, function: LossFunction, options: dict[str, Any]) -> LossFunction:
    try:
        inspect.signature(function).bind(None, None, **options)
    except TypeError as error:
        asked = f" and the options {', '.join(options)}" if options else ""
        raise _refused(
            code,
            f"cannot be called with logits, target ids{asked}: {error}. Weights of targets are no argument: they are applied to "
            f"what it returns",
        ) from error
    except ValueError:  # of some functions that are not written in Python
        pass
    return lambda logits_CV, ids_C: function(logits_CV, ids_C, **options)


def _checked(code: UserCode, losses_C: Any) -> Tensor:
    if not isinstance(losses_C, Tensor):
        raise _refused(code, f"returned {type(losses_C).__name__}, and not a tensor")
    if losses_C.shape != (PROBE_TARGETS,):
        raise _refused(
            code,
            f"returned {_shape(losses_C)} for {PROBE_TARGETS} targets, and not the loss of each of them. Functions of torch take "
            f'reduction="none" for that',
        )
    if not losses_C.is_floating_point() or not losses_C.isfinite().all():
        raise _refused(code, f"returned losses that are not finite numbers: {losses_C.tolist()}")
    return losses_C.detach()


def _gradient(code: UserCode, loss: Tensor, leaf_CV: Tensor) -> Tensor:
    gradient_CV = torch.autograd.grad(loss, leaf_CV, allow_unused=True)[0] if loss.requires_grad else None
    if gradient_CV is None or not gradient_CV.any():
        raise _refused(
            code, "has no gradient by the logits. Compute it from them with differentiable functions, without detach or argmax"
        )
    if not gradient_CV.isfinite().all():
        raise _refused(code, "has a gradient that is not finite on random logits")
    return gradient_CV


def _shape(value: Tensor) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if value.dim() else "a single number"


def _refused(code: UserCode, what: str) -> UserError:
    return UserError(f"{code} ({KEY}) {what}.", keys=(KEY,))


@contextmanager
def _blamed(code: UserCode, what: str) -> Iterator[None]:
    """Say where in the user's file an error comes from."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise _refused(code, f"{what}. {told(error, code)}") from error


# --- bytes


def _bytes_per_logit(objective: TokenLoss, vocab: int) -> float:
    """Bytes that a loss and its gradient take for each logit at the fullest moment, beside the logits."""
    num_targets = max(2, MEASURED_LOGITS // vocab)
    logits_CV, ids_C = torch.zeros(num_targets, vocab), torch.arange(num_targets) % vocab
    objective.loss_and_gradient(logits_CV, TokenTargets(ids_C), with_gradient=True)  # what is made once is not counted
    with _Counting() as counting:
        objective.loss_and_gradient(logits_CV, TokenTargets(ids_C), with_gradient=True)
    return counting.most_bytes / logits_CV.numel()


class _Counting(TorchDispatchMode):
    """Counts the bytes of tensors that are made while it is entered, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self._live: Any = WeakIdKeyDictionary()
        self.most_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(value.untyped_storage()) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, Tensor) and id(value.untyped_storage()) not in given:
                self._live[value.untyped_storage()] = value.untyped_storage().nbytes()
        self.most_bytes = max(self.most_bytes, sum(self._live.values()))
        return made
