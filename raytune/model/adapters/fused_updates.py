"""Low-rank updates added within the products that make them, in fp32.

PEFT 0.21 makes the product of a layer's base and that of the update, scales the latter and adds the two, and autograd does as
much backwards. Here the last product of the update, and that of its gradient, adds to what the base's product made: no passes
over tensors as wide as the layer beside them. Sums are those of PEFT in another order.

Only where it is the same: a frozen linear layer that is read for products, without hooks (ZeRO-3 gathers weights by them), in
training and outside of autocast. In 16 bits it would round less often than PEFT does, and so to other numbers, and on a CPU gain
little (0 to 4 % of a layer's time).
"""

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from raytune.model.adapters.input_casts import reads_for_products_only


def fuse_updates(model: nn.Module) -> None:
    """Have the linear layers that PEFT made for low-rank updates add them within their products."""
    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) is nn.Linear and reads_for_products_only(module):
            # By its class: torch.compile takes a `forward` of each layer's own for code of its own, compiles it for eight of
            # them, and leaves the others as they are.
            module.__class__ = FusedLinear


class FusedLinear(Linear):
    """PEFT's layer, computing in this way where it may."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else None
        if args or kwargs or name is None or name not in self.lora_A or not _is_plain(self, name, x):
            return super().forward(x, *args, **kwargs)
        layer: Any = self
        base, first, second = layer.base_layer, layer.lora_A[name].weight, layer.lora_B[name].weight
        output: Any = _UpdatedProduct.apply(x.flatten(0, -2), base.weight, base.bias, first, second, layer.scaling[name])
        return output.unflatten(0, x.shape[:-1])


def _is_plain(layer: Any, name: str, x: Tensor) -> bool:
    parts = (layer.base_layer, layer.lora_A[name], layer.lora_B[name])
    return (
        torch.is_grad_enabled()
        and not torch.is_autocast_enabled(x.device.type)
        and not torch.compiler.is_compiling()
        and not layer.disable_adapters
        and not layer.merged
        and layer.lora_B[name].bias is None
        and all(value.dtype == torch.float32 for value in (x, *(part.weight for part in parts)))
        and not any(value.requires_grad for value in layer.base_layer.parameters())
        and not any(_has_hooks(part) for part in parts)
    )


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


class _UpdatedProduct(torch.autograd.Function):
    """x W' + b + s (x A') B'. Shapes: N tokens, I inputs, O outputs, R ranks."""

    @staticmethod
    def forward(
        ctx: Any, x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scaling: float
    ) -> Tensor:
        output_NO = torch.nn.functional.linear(x_NI, weight_OI, bias_O)
        inner_NR = x_NI @ a_RI.T
        output_NO.addmm_(inner_NR, b_OR.T, alpha=scaling)
        ctx.save_for_backward(x_NI, weight_OI, a_RI, b_OR, inner_NR)
        ctx.scaling = scaling
        return output_NO

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_NO: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_NI, weight_OI, a_RI, b_OR, inner_NR = ctx.saved_tensors
        inner_gradient_NR = (gradient_NO @ b_OR).mul_(ctx.scaling)
        of_x_NI = None
        if ctx.needs_input_grad[0]:
            of_x_NI = gradient_NO @ weight_OI
            of_x_NI.addmm_(inner_gradient_NR, a_RI)
        of_a_RI = inner_gradient_NR.T @ x_NI if ctx.needs_input_grad[3] else None
        of_b_OR = (gradient_NO.T @ inner_NR).mul_(ctx.scaling) if ctx.needs_input_grad[4] else None
        return of_x_NI, None, None, of_a_RI, of_b_OR, None
