"""Inputs of LoRA's layers without casts that autocast undoes.

PEFT 0.21 casts what an update reads to the dtype of the update's weights. These are fp32 where products are autocast to 16 bits:
so each target made a copy in fp32 of inputs in 16 bits, and autocast another of that with the same numbers, which autograd kept
for each target. Left out, losses and gradients are equal to the last bit (test_input_casts.py).

It stays where numbers would be others: an update with dropout draws another mask, and scales what is left in 16 bits, and DoRA
makes its whole update in the dtype of its input. Outside of autocast it is needed, and stays too; so nothing changes for who
answers with an adapter.
"""

from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn


def leave_out_casts(model: nn.Module) -> None:
    """Have the layers that PEFT made for low-rank updates of linear layers read their inputs as they come, under autocast."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and reads_for_products_only(module):
            module._cast_input_dtype = _unless_autocast  # pyright: ignore[reportAttributeAccessIssue]


def reads_for_products_only(layer: Any) -> bool:
    """Whether all that a layer's updates do with its input is to multiply it by a matrix."""
    drops = any(not isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values())
    return bool(layer.lora_A) and not drops and not layer.lora_variant


def _unless_autocast(values: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """In place of the method that casts what a layer reads."""
    if values is None or torch.is_autocast_enabled(values.device.type):
        return values
    return values.to(dtype)
