"""The loss: cross-entropy summed over the target positions of a batch. Other positions are never projected onto the vocabulary.

While a loss is computed, two methods of the model are replaced: its output head's `forward` picks the hidden states that predict
a target, and its own `forward` returns the loss. All else (engine, PEFT, hooks, checkpointing) runs as it always does.

With `chunk_tokens` the head goes over the targets a chunk at a time and computes the gradients of the hidden states and of its
weights while a chunk's logits exist. So all logits never exist together and nothing is recomputed. What a model does to its
logits after the head (soft caps, scales) is done to each chunk.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytune.data.batches import Batch
from raytune.errors import ModelError

# Shapes: N tokens of a batch, M targets among them, C targets of a chunk, D width, V vocabulary.

PRODUCT_ROWS = 16384
"""Rows of a 16-bit weight gradient that are computed before they are added to the fp32 sum."""

Transform = Callable[[Tensor], Tensor]
PullBack = Callable[[Tensor, list[Tensor]], Tensor]
"""From the gradient of a chunk's logits to that of its hidden states; adds to the gradients of the trained weights on the way."""


def attach_loss(model: nn.Module, chunk_tokens: int | None) -> "LossLayer":
    """The loss of a causal language model, adapted by PEFT or not.

    Args:
        model: the model itself; `LossLayer.loss_sum` takes what calls it (an engine, a compiled module).
        chunk_tokens: targets that are projected at a time; None: all of them.

    Raises:
        ModelError: if the model has no output head, or its logits cannot be computed in chunks.
    """
    return LossLayer(model, chunk_tokens)


class LossLayer:
    """Turns a forward pass of its model into a loss."""

    def __init__(self, model: nn.Module, chunk_tokens: int | None) -> None:
        assert chunk_tokens is None or chunk_tokens > 0
        self._model = _causal_model(model)
        self._head = _output_head(self._model)
        self._chunk_tokens = chunk_tokens
        self._transform = None if chunk_tokens is None else _transform_after_head(self._model)
        # M differs from batch to batch; compiled for each, the head would never stop compiling.
        self._new_head_forward = torch.compiler.disable(self._forward_head)
        self._new_model_forward = self._forward_model
        self._pass: _Pass | None = None

    def loss_sum(self, module: nn.Module, batch: Batch, inputs: dict[str, Any]) -> Tensor:
        """Run `module` and return the sum of cross-entropy over the batch's targets: nats, an fp32 scalar.

        Without targets the sum is 0 but still hangs on the weights, so that every rank runs the same collectives.

        Args:
            module: what is called for a forward pass; leads to the model that this layer was made for.
            inputs: arguments of the forward pass.

        Raises:
            ModelError: if the model computes its logits past its output head.
        """
        self._pass = _Pass(batch, self._head.forward, self._model.forward)
        after_head = self._head.register_forward_hook(self._keep_hooked_output)
        try:
            with _forward_replaced(self._head, self._new_head_forward), _forward_replaced(self._model, self._new_model_forward):
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
        return F.cross_entropy(logits_MV.to(_loss_dtype(logits_MV)), now.batch.target_ids, reduction="sum")

    def _forward_head(self, hidden_1ND: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        now = self._pass
        assert now is not None
        hidden_MD = hidden_1ND.flatten(0, -2).index_select(0, now.batch.target_positions)
        if self._chunk_tokens is None:
            now.head_output = now.head_forward(hidden_MD[None], *args, **kwargs)
            return now.head_output
        projection = _projection(self._head, self._transform)
        ids_M, grad = now.batch.target_ids, torch.is_grad_enabled()
        loss = cast(Tensor, _ChunkedLoss.apply(projection, hidden_MD, ids_M, self._chunk_tokens, grad, *projection.weights))
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

    batch: Batch
    head_forward: Callable[..., Tensor]
    model_forward: Callable[..., Any]
    head_output: Tensor | None = None
    """The loss, or without chunks the logits of the targets."""


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    previous = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if previous is None:
            del module.forward
        else:
            module.forward = previous


def _loss_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


# --- chunks


class _ChunkedLoss(torch.autograd.Function):
    """Loss and its gradients in the forward pass; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        projection: "Projection",
        hidden_MD: Tensor,
        target_ids: Tensor,
        chunk_tokens: int,
        with_gradient: bool,
        *weights: nn.Parameter,
    ) -> Tensor:
        loss = torch.zeros((), dtype=_loss_dtype(hidden_MD), device=hidden_MD.device)
        hidden_gradient_MD = torch.empty_like(hidden_MD) if with_gradient else None
        # fp32: 16 bits would lose what late chunks add to a large sum, and fp16 overflow before the loss is divided.
        weight_gradients = [torch.zeros_like(weight, dtype=_loss_dtype(weight)) for weight in weights if with_gradient]
        for chunk in _chunks(len(target_ids), chunk_tokens):
            with torch.set_grad_enabled(with_gradient):
                logits_CV, pull_back = projection.project(hidden_MD[chunk].detach())
            chunk_loss, gradient_CV = _cross_entropy(logits_CV, target_ids[chunk], with_gradient)
            loss += chunk_loss
            if hidden_gradient_MD is not None and gradient_CV is not None:
                hidden_gradient_MD[chunk] = pull_back(gradient_CV, weight_gradients)
            del logits_CV, gradient_CV, pull_back  # before the next chunk's exist
        ctx.gradients = (hidden_gradient_MD, *weight_gradients)
        ctx.dtypes = (hidden_MD.dtype, *(weight.dtype for weight in weights))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place, hence once
        of_hidden, *of_weights = (gradient.mul_(loss_gradient).to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes))
        return None, of_hidden, None, None, None, *of_weights


def _cross_entropy(logits_CV: Tensor, target_ids: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """The sum over a chunk, and its gradient in the dtype of the logits."""
    ids_C1 = target_ids[:, None]
    log_probabilities_CV = torch.log_softmax(logits_CV, -1, dtype=_loss_dtype(logits_CV))
    loss = -log_probabilities_CV.gather(1, ids_C1).sum()
    if not with_gradient:
        return loss, None
    # Softmax, minus one at the target. Subtracted before the cast to 16 bits, which would round the small difference of a
    # confident prediction away.
    gradient_CV = log_probabilities_CV.exp_()
    gradient_CV.scatter_add_(1, ids_C1, gradient_CV.new_full(ids_C1.shape, -1.0))
    return loss, gradient_CV.to(logits_CV.dtype)


def _chunks(num_targets: int, chunk_tokens: int) -> Iterator[slice]:
    """Cut evenly: 1,025 targets in chunks of 1,024 are 512 and 513."""
    num_chunks = -(-num_targets // chunk_tokens)
    for chunk in range(num_chunks):
        yield slice(chunk * num_targets // num_chunks, (chunk + 1) * num_targets // num_chunks)


class Projection(Protocol):
    """From hidden states to logits, and by hand back."""

    weights: list[nn.Parameter]
    """The head's trained weights."""

    def project(self, hidden_CD: Tensor) -> tuple[Tensor, PullBack]: ...


class LinearProjection:
    """A plain linear head: its weight's gradient is summed up in place."""

    def __init__(self, linear: nn.Linear) -> None:
        self.weights = [weight for weight in linear.parameters() if weight.requires_grad]
        self._linear = linear
        kind = linear.weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else linear.weight.dtype
        self._weight_VD = linear.weight.detach().to(dtype)
        self._bias_V = None if linear.bias is None else linear.bias.detach().to(dtype)

    def project(self, hidden_CD: Tensor) -> tuple[Tensor, PullBack]:
        hidden_CD = hidden_CD.to(self._weight_VD.dtype)

        def pull_back(gradient_CV: Tensor, weight_gradients: list[Tensor]) -> Tensor:
            for weight, total in zip(self.weights, weight_gradients):
                if weight is self._linear.weight:
                    _add_product(total, gradient_CV.T, hidden_CD)
                else:
                    total.add_(gradient_CV.sum(0, dtype=total.dtype))
            return gradient_CV @ self._weight_VD

        return F.linear(hidden_CD, self._weight_VD, self._bias_V), pull_back


class ModuleProjection:
    """Any other head (adapted, quantised, with a transform after it), by autograd."""

    def __init__(self, module: nn.Module, transform: Transform | None) -> None:
        self.weights = [weight for weight in module.parameters() if weight.requires_grad]
        self._module = module
        self._transform = transform

    def project(self, hidden_CD: Tensor) -> tuple[Tensor, PullBack]:
        hidden_1CD = hidden_CD[None].requires_grad_(torch.is_grad_enabled())
        logits_1CV = self._module(hidden_1CD)
        if self._transform is not None:
            logits_1CV = self._transform(logits_1CV)

        def pull_back(gradient_CV: Tensor, weight_gradients: list[Tensor]) -> Tensor:
            of_hidden, *of_weights = torch.autograd.grad(
                logits_1CV, [hidden_1CD, *self.weights], gradient_CV[None], allow_unused=True, materialize_grads=True
            )
            for total, of_weight in zip(weight_gradients, of_weights):
                total.add_(of_weight)
            return of_hidden[0]

        return logits_1CV.detach()[0], pull_back


def _projection(head: nn.Module, transform: Transform | None) -> Projection:
    if type(head) is nn.Linear and transform is None:
        return LinearProjection(head)
    _read_weights(head)
    return ModuleProjection(_without_hooks(head), transform)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`, without a second matrix of that size when the factors have fewer bits than the total."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
        return
    for rows, left_rows in zip(total.split(PRODUCT_ROWS), left.split(PRODUCT_ROWS)):
        rows.add_(left_rows @ right)


# --- the model's parts


def _causal_model(model: nn.Module) -> nn.Module:
    get_base_model = getattr(model, "get_base_model", None)  # PEFT's name for what it wraps
    return model if get_base_model is None else get_base_model()


def _output_head(model: nn.Module) -> nn.Module:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        raise ModelError(f"{type(model).__name__} has no output head onto a vocabulary; raytune trains causal language models.")
    # PEFT's `modules_to_save` puts a trained copy beside the module; the copy in use is the head.
    copies = getattr(head, "modules_to_save", None)
    return copies[head.active_adapters[0]] if isinstance(copies, nn.ModuleDict) else head


def _read_weights(head: nn.Module) -> None:
    """Read every weight below the head, so that ZeRO-3 gathers it.

    Reading a sharded weight in a forward pass makes DeepSpeed gather it and count it among those of the module whose forward pass
    it is, the head, from then on. It must not depend on the batch, for a gather needs all ranks.
    """
    for module in head.modules():
        for name in module._parameters:
            getattr(module, name)


def _without_hooks(module: nn.Module) -> nn.Module:
    """A view of a module: same class, weights and settings, but neither hooks nor a replaced `forward`.

    A head in pieces is called once per chunk, and ranks differ in their number of chunks: the hooks of ZeRO-3 on its submodules
    would gather a different number of times on each, and wait for each other for ever.
    """
    return _view(module, {name: child and _without_hooks(child) for name, child in module._modules.items()})


def _view(module: nn.Module, children: Mapping[str, nn.Module | None]) -> nn.Module:
    view = module.__class__.__new__(module.__class__)
    view.__dict__ = {name: value for name, value in module.__dict__.items() if name != "forward"}
    view.__dict__ |= {"_modules": dict(children), "_forward_hooks": OrderedDict(), "_forward_pre_hooks": OrderedDict()}
    return view


def _transform_after_head(model: nn.Module) -> Transform | None:
    """What a model does to its logits between its head and its output, such as Gemma's soft cap; None: nothing.

    The answer comes from the model's own forward method, run with stand-ins for its submodules: the head's returns the logits.

    Raises:
        ModelError: if that method needs more of its submodules than a stand-in has.
    """
    head = cast(Any, model).get_output_embeddings()
    stand_ins = {name: child and _StandIn(child, _BackboneOutput()) for name, child in model._modules.items()}
    stands_for_head = next((stand_ins[name] for name, child in model._modules.items() if child is head), None)
    view = _view(model, stand_ins)

    def transform(logits_1CV: Tensor) -> Tensor:
        assert stands_for_head is not None
        stands_for_head.output = logits_1CV
        try:
            return type(model).forward(view, input_ids=torch.zeros((1, 1), dtype=torch.long)).logits
        finally:
            stands_for_head.output = None

    probe = torch.linspace(-50, 50, 101)[None, None]
    refusal = f"The logits of {type(model).__name__} cannot be computed in chunks. Set training.loss to full."
    if stands_for_head is None:
        raise ModelError(f"{refusal} (Its output head is not a direct part of it.)")
    try:
        transformed = transform(probe)
    except Exception as error:
        raise ModelError(f"{refusal} (What it does to them after its head could not be found out: {error!r}.)") from error
    if transformed.shape != probe.shape:
        raise ModelError(f"{refusal} (It makes {tuple(transformed.shape)} of logits of shape {tuple(probe.shape)}.)")
    return None if torch.equal(transformed, probe) else transform


class _StandIn(nn.Module):
    """A module of which only the surroundings matter: has its attributes, computes nothing, returns `output`."""

    def __init__(self, module: nn.Module, output: Any) -> None:
        super().__init__()
        self.__dict__["_stands_for"] = module  # past nn.Module, which would make it a submodule
        self.output = output

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["_stands_for"], name)
        return self if isinstance(value, nn.Module) else value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


class _BackboneOutput:
    """What a head would be computed from: hidden states under any index, and no other output."""

    last_hidden_state = torch.zeros(1, 1, 1)

    def __getitem__(self, index: Any) -> Tensor:
        return self.last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None
