"""Weights of a model that stay as they are, and layers that no backward pass has to reach."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raytune.model.parts.layers import layers_of
from raytune.plan.strategies.freezing import ITSELF


def freeze(model: nn.Module, names: Sequence[str]) -> None:
    """Take the gradient from every parameter in the modules of these names (`plan.freezing.folded`)."""
    for name in names:
        module = model.get_submodule(name.removesuffix(ITSELF))
        for parameter in module.parameters(recurse=not name.endswith(ITSELF)):
            parameter.requires_grad_(False)


def freeze_only(model: nn.Module, names: Sequence[str]) -> None:
    """Let all of a base learn but the modules of these names: those that another phase had frozen learn again."""
    model.requires_grad_(True)
    freeze(model, names)


def recompute_from(model: nn.Module, lowest_layer: int) -> None:
    """Let activation checkpointing begin at a layer, below which nothing is trained.

    Reentrant checkpointing gives gradients only where what enters a layer has one, so PEFT has the embeddings begin one, which
    takes backward passes through every frozen layer. Here it begins where something is trained; nothing is recomputed below.

    Args:
        model: with checkpointing enabled.
        lowest_layer: the lowest one that a backward pass has to reach; the number of layers where only what follows is trained.
    """
    found = layers_of(model)
    if found is None:
        return
    layers = found[1]
    for module in model.modules():
        if getattr(module, "_require_grads_hooks", None):
            module.disable_input_require_grads()  # pyright: ignore[reportCallIssue]
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = index >= lowest_layer  # pyright: ignore[reportArgumentType]
        for key, hook in [*layer._forward_pre_hooks.items()]:  # of a kept base, or a phase before
            if hook is _begin_gradient:
                del layer._forward_pre_hooks[key], layer._forward_pre_hooks_with_kwargs[key]
    if lowest_layer < len(layers):
        layers[lowest_layer].register_forward_pre_hook(_begin_gradient, with_kwargs=True)


def _begin_gradient(layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    stream = arguments[0] if arguments else named.get("hidden_states")
    if isinstance(stream, Tensor) and torch.is_grad_enabled():
        stream.requires_grad_(True)
