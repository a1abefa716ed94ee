"""Bases in 4 or 8 bits: what bitsandbytes is asked for, and what a weight becomes by it."""

from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes import functional
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from raytune.errors import ModelError
from raytune.model.parts.dtypes import DTYPES
from raytune.plan.run_plan import ModelPlan


def quantization_config(model: ModelPlan) -> BitsAndBytesConfig | None:
    """The quantisation of a base as transformers is told it; None: there is none.

    Raises:
        ModelError: if the packed numbers would be held in a floating-point dtype that is not the model's: casting the model, as
            ZeRO does, would destroy them.
    """
    quantization = model.quantization
    if quantization is None:
        return None
    if not quantization.is_4_bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = model.compute_dtype if quantization.compute_dtype == "auto" else quantization.compute_dtype
    storage = model.compute_dtype if quantization.quant_storage == "auto" else quantization.quant_storage
    if storage not in ("uint8", model.dtype):
        raise ModelError(
            f"model.quant_storage is {storage} but the model is loaded in {model.dtype}; casting one to the other would destroy "
            f"the packed 4-bit numbers. Set it to auto ({model.dtype}), or to uint8."
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.format,
        bnb_4bit_use_double_quant=quantization.double_quantization,
        bnb_4bit_compute_dtype=DTYPES[compute],
        bnb_4bit_quant_storage=torch.uint8 if storage == "uint8" else DTYPES[storage],
    )


def is_quantized(parameter: nn.Parameter) -> bool:
    """Whether a parameter holds packed 4-bit numbers."""
    return isinstance(parameter, bnb.nn.Params4bit) and parameter.bnb_quantized


def packed(weight: nn.Parameter, config: BitsAndBytesConfig) -> nn.Parameter:
    """A parameter of any shape in 4 bits, as bitsandbytes holds the weight of a linear layer; frozen, on the same device."""
    kind: Any = bnb.nn.Params4bit  # whose signature is taken for that of nn.Parameter
    parameter = kind(
        weight.data,
        requires_grad=False,
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type,
        quant_storage=config.bnb_4bit_quant_storage,
    )
    return parameter.to(weight.device)  # packs it


@torch.no_grad()
def expanded(parameter: nn.Parameter) -> Tensor:
    """A packed parameter in the shape and dtype that it had."""
    return functional.dequantize_4bit(parameter.data, parameter.quant_state)  # pyright: ignore[reportAttributeAccessIssue]


def quantized_modules(model: nn.Module) -> list[str]:
    """Names of the layers that bitsandbytes holds."""
    return [name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)]


def as_seen_in_training(weight: Tensor, config: dict[str, Any]) -> Tensor:
    """What a weight becomes by being quantised and expanded again; in its own dtype.

    Args:
        weight: of a linear layer, (outputs, inputs).
        config: `BitsAndBytesConfig.to_dict()` of the run that trained on it.
    """
    if config.get("load_in_8bit"):
        numbers, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        return functional.int8_vectorwise_dequant(numbers, scales).to(weight.dtype)
    packed, state = functional.quantize_4bit(
        weight.contiguous(),
        quant_type=config["bnb_4bit_quant_type"],
        compress_statistics=config["bnb_4bit_use_double_quant"],
    )
    return functional.dequantize_4bit(packed, state).to(weight.dtype)
