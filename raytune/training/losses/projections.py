"""The output head of a model, as the loss layer uses it: found, called chunk by chunk, and led back through by hand.

What a model does to its logits behind its head (soft caps, scales) is found out once, and done to each chunk.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytune.errors import ModelError

# Shapes: C targets of a chunk, D width, V vocabulary.

PRODUCT_ROWS = 16384
"""Rows of a 16-bit weight gradient that a CPU computes before it adds them to the fp32 sum."""

Transform = Callable[[Tensor], Tensor]
PullBack = Callable[[Tensor, list[Tensor]], Tensor]
"""From the gradient of a chunk's logits to that of its hidden states; adds to the gradients of the trained weights on the way."""


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
                    add_product(total, gradient_CV.T, hidden_CD)
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


def projection_of(head: nn.Module, transform: Transform | None) -> Projection:
    """How a head makes logits of a chunk's hidden states. Called in its forward pass: ZeRO-3 has gathered its weights."""
    if type(head) is nn.Linear and transform is None:
        return LinearProjection(head)
    _read_weights(head)
    return ModuleProjection(_without_hooks(head), transform)


def frozen_projection_of(head: nn.Module, transform: Transform | None) -> Projection:
    """How a head makes logits without a gradient, with its weights as they are now, for as long as the projection is kept.

    Called in its forward pass, as `projection_of`. Afterwards ZeRO-3 may divide them again.
    """
    if type(head) is nn.Linear and transform is None:
        return LinearProjection(head)
    _read_weights(head)
    return ModuleProjection(_without_hooks(head, is_kept=True), transform)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`, without a second matrix of that size when the factors have fewer bits than the total.

    torch 2.13 has a product of 16-bit factors that adds to a sum in fp32 itself, but not on CPUs.
    """
    if left.dtype == total.dtype:
        total.addmm_(left, right)
        return
    if total.device.type != "cpu":
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
        return
    for rows, left_rows in zip(total.split(PRODUCT_ROWS), left.split(PRODUCT_ROWS)):
        rows.add_(left_rows @ right)


# --- the parts of a model


def causal_model(model: nn.Module) -> nn.Module:
    """The language model, freed of what PEFT wraps around it."""
    get_base_model = getattr(model, "get_base_model", None)  # PEFT's name for what it wraps
    return model if get_base_model is None else get_base_model()


def output_head(model: nn.Module) -> nn.Module:
    """The module that makes logits of hidden states.

    Raises:
        ModelError: if there is none.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        raise ModelError(f"{type(model).__name__} has no output head onto a vocabulary; raytune trains causal language models.")
    # PEFT's `modules_to_save` puts a trained copy beside the module; the copy in use is the head.
    copies = getattr(head, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return head
    return head.original_module if head.disable_adapters else copies[head.active_adapters[0]]


def _read_weights(head: nn.Module) -> None:
    """Read every weight below the head, so that ZeRO-3 gathers it.

    Reading a sharded weight in a forward pass makes DeepSpeed gather it and count it among those of the module whose forward pass
    it is, the head, from then on. It must not depend on the batch, for a gather needs all ranks.
    """
    for module in head.modules():
        for name in module._parameters:
            getattr(module, name)


def _without_hooks(module: nn.Module, *, is_kept: bool = False) -> nn.Module:
    """A view of a module: same class, weights and settings, but neither hooks nor a replaced `forward`.

    A head in pieces is called once per chunk, and ranks differ in their number of chunks: the hooks of ZeRO-3 on its submodules
    would gather a different number of times on each, and wait for each other for ever.

    Args:
        is_kept: whether the weights stay as they are now when ZeRO-3 divides the module's.
    """
    children = {name: child and _without_hooks(child, is_kept=is_kept) for name, child in module._modules.items()}
    view = _view(module, children)
    if is_kept:
        values = {name: getattr(module, name) for name in module._parameters}
        view.__dict__["_parameters"] = {name: value if value is None else value.detach() for name, value in values.items()}
    return view


def _view(module: nn.Module, children: Mapping[str, nn.Module | None]) -> nn.Module:
    view = module.__class__.__new__(module.__class__)
    view.__dict__ = {name: value for name, value in module.__dict__.items() if name != "forward"}
    view.__dict__ |= {"_modules": dict(children), "_forward_hooks": OrderedDict(), "_forward_pre_hooks": OrderedDict()}
    return view


def transform_after_head(model: nn.Module) -> Transform | None:
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
