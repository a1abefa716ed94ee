"""The loss of a model: an objective summed over the target positions of a batch. Others are never projected onto the vocabulary.

While a loss is computed, two methods of the model are replaced: its output head's `forward` picks the hidden states that predict
a target, and its own `forward` returns the loss. All else (engine, PEFT, hooks, checkpointing) runs as it always does.

With `chunk_tokens` the head goes over the targets a chunk at a time and computes the gradients of the hidden states and of its
weights while a chunk's logits exist. So all logits never exist together and nothing is recomputed. What a model does to its
logits after the head (soft caps, scales) is done to each chunk.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from raytune.data.batches.batches import Batch
from raytune.errors import ModelError
from raytune.training.losses.objectives import CrossEntropy, TokenLoss, TokenTargets, loss_dtype
from raytune.training.losses.projections import Projection, causal_model, output_head, projection_of, transform_after_head

# Shapes: N tokens of a batch, M targets among them, C targets of a chunk, D width, V vocabulary.


def attach_loss(model: nn.Module, chunk_tokens: int | None, objective: TokenLoss | None = None) -> "LossLayer":
    """The loss of a causal language model, adapted by PEFT or not.

    Args:
        model: the model itself; `LossLayer.loss_sum` takes what calls it (an engine, a compiled module).
        chunk_tokens: targets that are projected at a time; None: all of them.
        objective: what is minimised; by default cross-entropy.

    Raises:
        ModelError: if the model has no output head, or its logits cannot be computed in chunks.
    """
    return LossLayer(model, chunk_tokens, objective or CrossEntropy())


class LossLayer:
    """Turns a forward pass of its model into a loss."""

    def __init__(self, model: nn.Module, chunk_tokens: int | None, objective: TokenLoss) -> None:
        assert chunk_tokens is None or chunk_tokens > 0
        self._model = causal_model(model)
        self._head = output_head(self._model)
        self._chunk_tokens = chunk_tokens
        self._objective = objective
        self._transform = None if chunk_tokens is None else transform_after_head(self._model)
        # M differs from batch to batch; compiled for each, the head would never stop compiling.
        self._new_head_forward = torch.compiler.disable(self._forward_head)
        self._new_model_forward = self._forward_model
        self._pass: _Pass | None = None

    def loss_sum(
        self,
        module: nn.Module,
        batch: Batch,
        inputs: dict[str, Any],
        extras: Mapping[str, Tensor] | None = None,
        objective: TokenLoss | None = None,
    ) -> Tensor:
        """Run `module` and return the sum over the batch's targets of their loss times their weight: an fp32 scalar.

        Without targets the sum is 0 but still hangs on the weights, so that every rank runs the same collectives.

        Args:
            module: what is called for a forward pass; leads to the model that this layer was made for.
            inputs: arguments of the forward pass.
            extras: `TokenTargets.extras`, if the objective needs any.
            objective: in place of the layer's own, for this pass.

        Raises:
            ModelError: if the model computes its logits past its output head.
        """
        return self._run(module, batch, inputs, extras or {}, objective or self._objective, for_each=False)

    def losses(self, module: nn.Module, batch: Batch, inputs: dict[str, Any]) -> Tensor:
        """Run `module` and return the loss of each target of the batch, (M,) in fp32, without its weight and without a gradient.

        Raises:
            ModelError: if the model computes its logits past its output head.
        """
        with torch.no_grad():
            return self._run(module, batch, inputs, {}, self._objective, for_each=True)

    def _run(
        self,
        module: nn.Module,
        batch: Batch,
        inputs: dict[str, Any],
        extras: Mapping[str, Tensor],
        objective: TokenLoss,
        *,
        for_each: bool,
    ) -> Tensor:
        targets = TokenTargets(batch.target_ids, batch.target_weights, extras)
        self._pass = _Pass(batch.target_positions, targets, objective, for_each, self._head.forward, self._model.forward)
        after_head = self._head.register_forward_hook(self._keep_hooked_output)
        try:
            with forward_replaced(self._head, self._new_head_forward), forward_replaced(self._model, self._new_model_forward):
                return module(**inputs)
        finally:
            after_head.remove()
            self._pass = None

    def _forward_model(self, *args: Any, **kwargs: Any) -> Tensor:
        now = self._pass
        assert now is not None
        output = now.model_forward(*args, **kwargs)
        if now.head_output is None:
            raise ModelError(
                f"{type(self._model).__name__} computed its logits without calling its output head "
                f"({type(self._head).__name__}), so raytune cannot compute its loss."
            )
        if self._chunk_tokens is not None:
            return now.head_output
        logits_MV = output.logits.flatten(0, -2)
        return (now.objective.losses if now.for_each else now.objective.loss)(logits_MV, now.targets)

    def _forward_head(self, hidden_1ND: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        now = self._pass
        assert now is not None
        hidden_MD = hidden_1ND.flatten(0, -2).index_select(0, now.target_positions)
        if self._chunk_tokens is None:
            now.head_output = now.head_forward(hidden_MD[None], *args, **kwargs)
            return now.head_output
        projection = projection_of(self._head, self._transform)
        if now.for_each:
            now.head_output = _losses_in_chunks(now.objective, projection, hidden_MD, now.targets, self._chunk_tokens)
            return now.head_output
        grad = torch.is_grad_enabled()
        loss = cast(
            Tensor,
            _ChunkedLoss.apply(now.objective, projection, hidden_MD, now.targets, self._chunk_tokens, grad, *projection.weights),
        )
        now.head_output = loss
        return loss if projection.weights else loss.detach()

    def _keep_hooked_output(self, head: nn.Module, arguments: Any, output: Tensor) -> None:
        """Take the loss as it left the head's hooks: those of ZeRO-3 gather the head again, to receive its weights' gradients.

        A frozen head receives none. Its loss bypasses the hooks, and it is gathered once per step instead of twice.
        """
        if output.requires_grad and self._pass is not None:
            self._pass.head_output = output


@dataclass(slots=True)
class _Pass:
    """One forward pass."""

    target_positions: Tensor
    targets: TokenTargets
    objective: TokenLoss
    for_each: bool
    """Whether the loss of each target is asked for, and not their sum."""
    head_forward: Callable[..., Tensor]
    model_forward: Callable[..., Any]
    head_output: Tensor | None = None
    """The loss, or without chunks the logits of the targets."""


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Context in which a module's forward pass is another."""
    previous = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if previous is None:
            del module.forward
        else:
            module.forward = previous


# --- chunks


class _ChunkedLoss(torch.autograd.Function):
    """Loss and its gradients in the forward pass; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        objective: TokenLoss,
        projection: Projection,
        hidden_MD: Tensor,
        targets: TokenTargets,
        chunk_tokens: int,
        with_gradient: bool,
        *weights: nn.Parameter,
    ) -> Tensor:
        loss = torch.zeros((), dtype=loss_dtype(hidden_MD), device=hidden_MD.device)
        # Products in 16 bits see ratios of weights only: a weight of 1e-5 would be 0 in them, and one of 1e5 infinite.
        targets, scale = targets.scaled() if len(targets) else (targets, None)
        hidden_gradient_MD = torch.empty_like(hidden_MD) if with_gradient else None
        # fp32: 16 bits would lose what late chunks add to a large sum, and fp16 overflow before the loss is divided.
        weight_gradients = [torch.zeros_like(weight, dtype=loss_dtype(weight)) for weight in weights if with_gradient]
        for chunk in _chunks(len(targets), chunk_tokens):
            with torch.set_grad_enabled(with_gradient):
                logits_CV, pull_back = projection.project(hidden_MD[chunk].detach())
            chunk_loss, gradient_CV = objective.loss_and_gradient(logits_CV, targets.chunk(chunk), with_gradient=with_gradient)
            loss += chunk_loss
            if hidden_gradient_MD is not None and gradient_CV is not None:
                hidden_gradient_MD[chunk] = pull_back(gradient_CV, weight_gradients)
            del logits_CV, gradient_CV, pull_back  # before the next chunk's exist
        ctx.gradients, ctx.scale = (hidden_gradient_MD, *weight_gradients), scale
        ctx.dtypes = (hidden_MD.dtype, *(weight.dtype for weight in weights))
        return loss if scale is None else loss * scale

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place, hence once
        loss_gradient = loss_gradient if ctx.scale is None else loss_gradient * ctx.scale
        of_hidden, *of_weights = (gradient.mul_(loss_gradient).to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes))
        return None, None, of_hidden, None, None, None, *of_weights


def _losses_in_chunks(
    objective: TokenLoss, projection: Projection, hidden_MD: Tensor, targets: TokenTargets, chunk_tokens: int
) -> Tensor:
    """The loss of each target, (M,)."""
    losses_M = torch.empty(len(targets), dtype=loss_dtype(hidden_MD), device=hidden_MD.device)
    for chunk in _chunks(len(targets), chunk_tokens):
        losses_M[chunk] = objective.losses(projection.project(hidden_MD[chunk])[0], targets.chunk(chunk))
    return losses_M


def _chunks(num_targets: int, chunk_tokens: int) -> Iterator[slice]:
    """Cut evenly: 1,025 targets in chunks of 1,024 are 512 and 513."""
    num_chunks = -(-num_targets // chunk_tokens)
    for chunk in range(num_chunks):
        yield slice(chunk * num_targets // num_chunks, (chunk + 1) * num_targets // num_chunks)
