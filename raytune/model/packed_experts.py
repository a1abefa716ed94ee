"""Frozen fused experts in 4 bits: packed as they are loaded, expanded a layer at a time while they are computed with.

bitsandbytes packs linear layers, and transformers asks it for no more. A fused parameter keeps its place and its name, as packed
numbers; while its module computes, an attribute of the same name hides it with the expanded weights. (bitsandbytes' own
`replace_parameter_4bit` renames it, and leaves every layer's expanded weights with autograd until the backward pass.)
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_module_registration_hook, register_module_parameter_registration_hook
from transformers import BitsAndBytesConfig, PreTrainedModel

from raytune.config.sections.adapter import Adapter
from raytune.model.adapters import adapting
from raytune.model.parts.experts import expert_matrices, expert_parameters, shape_of
from raytune.model.parts.quantize import expanded, is_quantized, packed
from raytune.plan.methods.experts import fits_4_bits


@contextmanager
def packing_experts(adapter: Adapter, config: BitsAndBytesConfig | None) -> Iterator[None]:
    """Context in which a model is built and loaded, and each parameter of frozen experts packed as soon as it is read.

    Args:
        adapter: that the model is to get.
        config: of a quantised base; None: nothing is packed.
    """
    if config is None:
        yield
        return
    around: dict[nn.Module, tuple[nn.Module, str]] = {}
    to_pack: dict[nn.Module, set[str]] = {}

    def place(module: nn.Module, name: str) -> tuple[nn.Module, str]:
        """The model that a parameter belongs to, and its full name there."""
        while module in around:
            module, part = around[module]
            name = f"{part}.{name}"
        return module, name

    def note(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if child is not None:
            around[child] = (parent, name)

    def pack(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta or parameter.dim() != 3:
            return None
        model, full = place(module, name)
        if not isinstance(model, PreTrainedModel):
            return None
        if model not in to_pack:
            to_pack[model] = {*experts_to_pack(model, adapter, bool(config.load_in_4bit))}
        if full not in to_pack[model]:
            return None
        replacement: Any = packed(parameter, config)
        replacement._is_hf_initialized = True  # so that transformers does not start it anew
        return replacement

    handles = [register_module_module_registration_hook(note), register_module_parameter_registration_hook(pack)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def experts_to_pack(model: PreTrainedModel, adapter: Adapter, is_4_bit: bool) -> list[str]:
    """Names of the parameters of fused experts that are held in 4 bits in training with this adapter.

    Args:
        is_4_bit: whether the base is quantised to 4 bits; 8 pack linear layers only.
    """
    sizes = {name: math.prod(shape_of(parameter)) for name, parameter in expert_parameters(model).items()}
    frozen = adapting(adapter).frozen_experts(model, adapter) if is_4_bit else []
    return [name for name in frozen if fits_4_bits(sizes[name])]


def expand_packed_experts(model: nn.Module, *, keeps_nothing: bool) -> None:
    """Let the modules of packed experts expand them for each of their passes.

    Args:
        keeps_nothing: whether autograd keeps no expanded weights until the backward pass, but expands them again there. Not with
            activation checkpointing, whose recomputation does that already, and which has a way of its own to keep tensors.
    """
    for path in sorted({name.rpartition(".")[0] for name in packed_experts(model)}):
        module = model.get_submodule(path)
        names = [name for name, parameter in expert_matrices(module).items() if is_quantized(parameter)]
        module.forward = partial(_forward, module, module.forward, names, keeps_nothing)


def packed_experts(model: nn.Module) -> list[str]:
    """Names of the parameters of fused experts that are held in 4 bits."""
    return [name for name, parameter in expert_parameters(model).items() if is_quantized(parameter)]


def _forward(
    module: nn.Module, forward: Callable[..., Tensor], names: list[str], keeps_nothing: bool, *args: Any, **kwargs: Any
) -> Tensor:
    weights = {name: _weight(module, name) for name in names}
    # An attribute of the instance is found before its parameter of the same name, which `nn.Module` looks up last.
    module.__dict__ |= weights
    try:
        with _keeping_packed(module, weights) if keeps_nothing and torch.is_grad_enabled() else nullcontext():
            return forward(*args, **kwargs)
    finally:
        for name in names:
            del module.__dict__[name]


def _weight(module: nn.Module, name: str) -> Tensor:
    parameter: Any = module._parameters[name]  # at stage 3 this asks DeepSpeed, which has put its own dictionary there
    return expanded(parameter)


@dataclass(frozen=True, slots=True)
class _View:
    """Of an expanded weight."""

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


def _keeping_packed(module: nn.Module, weights: dict[str, Tensor]) -> AbstractContextManager:
    """Context in which autograd keeps where to find an expanded weight, or a view of one, instead of its numbers."""
    names = {weight.untyped_storage().data_ptr(): name for name, weight in weights.items()}

    def pack(tensor: Tensor) -> Tensor | _View:
        name = names.get(tensor.untyped_storage().data_ptr())
        return tensor if name is None else _View(name, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def unpack(kept: Tensor | _View) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        return _weight(module, kept.name).as_strided(kept.shape, kept.strides, kept.offset)

    return saved_tensors_hooks(pack, unpack)
