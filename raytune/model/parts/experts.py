"""Fused experts: a matrix of all experts of a layer in one parameter of three dimensions, as transformers 5 holds mixtures.

They are no linear layers, so that neither a LoRA target nor bitsandbytes finds them by class; PEFT's `target_parameters`
names them.
"""

import re
from collections.abc import Iterator

from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING
from torch import nn

WAY_BACK = "down_proj"
ROUTER = re.compile(r"gate|router|wg")
_LAYERS = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)


def expert_matrices(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that hold the matrices of all experts, if the module is such a mixture; the way back is the last."""
    matrices = {name: value for name, value in module.named_parameters(recurse=False) if len(shape_of(value)) == 3}
    return matrices if WAY_BACK in matrices and not isinstance(module, _LAYERS) else {}


def shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """Of the whole parameter as it is computed with, of which ZeRO-3 may have left this rank a share, and bitsandbytes packed
    numbers."""
    state = getattr(parameter, "quant_state", None)
    return tuple(state.shape if state is not None else getattr(parameter, "ds_shape", parameter.shape))


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter of fused experts, under its full name."""
    return {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        for name, parameter in expert_matrices(module).items()
    }


def bare_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that PEFT's `target_parameters` may name: matrices of fused experts and of routers that are no linear layers."""
    routers = {
        f"{path}.weight": module._parameters["weight"]
        for path, module in model.named_modules()
        if is_router_name(path) and not isinstance(module, _LAYERS) and module._parameters.get("weight") is not None
    }
    return expert_parameters(model) | {name: weight for name, weight in routers.items() if weight is not None}


def linear_routers(model: nn.Module) -> Iterator[str]:
    """Names of linear layers that choose among fused experts: as many outputs as there are experts."""
    counts = {shape_of(parameter)[0] for parameter in expert_parameters(model).values()}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.out_features in counts and is_router_name(path):
            yield path


def is_router_name(path: str) -> bool:
    """Whether a module is called a router, by its own name or that of the module around it."""
    return any(ROUTER.fullmatch(part) for part in path.split(".")[-2:])


def names_of_experts(model_type: str) -> tuple[str, ...]:
    """Last parts of names that PEFT takes for an expert's layers in this architecture, as they were before transformers 5.

    PEFT 0.21 would replace such a target by the fused experts (at another rank) or the router, in training and in loading, so
    that a linear layer of the same name, as of a shared expert, cannot be one.
    """
    return tuple(sorted(_MOE_TARGET_MODULE_MAPPING.get(_MODEL_TO_CONVERSION_PATTERN.get(model_type, ""), ())))
