"""A base that bitsandbytes holds in 4 or 8 bits, in a plan: its dtypes, its bytes, and what cannot be done with it. Pure."""

from raytune.config.adapter import own_quantization
from raytune.config.model import Quantization
from raytune.config.quantization import quantization_key, quantization_of, without_quantization
from raytune.config.run import RunConfig
from raytune.config.training import Precision
from raytune.errors import UserError
from raytune.plan.defaults import Choice
from raytune.plan.shapes import ModelShape
from raytune.plan.stage_limit import StageLimit
from raytune.plan.trained import Trained

QUANTISED_KINDS = ("attention", "mlp", "mixer")
"""Kinds of modules that bitsandbytes holds; embeddings, fused experts and the output head stay as they are."""


def resolve_quantization(config: RunConfig, precision: Precision) -> Choice[Quantization | None]:
    """How the base is held, with its dtypes resolved.

    Raises:
        UserError: if two sections contradict each other.
    """
    asked = quantization_of(config.model, config.adapter)
    if asked is None:
        return Choice(None)
    compute = precision if asked.compute_dtype == "auto" else asked.compute_dtype
    storage = precision if asked.quant_storage == "auto" else asked.quant_storage
    reasons = []
    if own_quantization(config.adapter) is not None:
        reasons.append(f"adapter.method {config.adapter.method} is lora over a base with model.quantization {asked.format}.")
    if asked.is_4_bit and asked.compute_dtype == "auto":
        reasons.append(f"{quantization_key('compute_dtype', config.adapter)} is {compute}, the run's precision.")
    if asked.is_4_bit and asked.quant_storage == "auto":
        reasons.append(
            f"{quantization_key('quant_storage', config.adapter)} is {storage}, as all other weights, so that ZeRO-3 could shard "
            f"the base."
        )
    resolved = asked.model_copy(update={"compute_dtype": compute, "quant_storage": storage})
    return Choice(resolved, " ".join(reasons) or None)


def check_quantization(config: RunConfig, trained: Trained, precision: Precision) -> None:
    """Refuse a quantised base that could not be trained over as asked.

    Raises:
        UserError: with the setting that works.
    """
    quantization = quantization_of(config.model, config.adapter)
    if quantization is None:
        return
    storage = quantization.quant_storage
    if quantization.is_4_bit and storage not in ("auto", "uint8", precision):
        raise UserError(
            f"{quantization_key('quant_storage', config.adapter)} is {storage}, but the other weights are in {precision}: "
            f"casting one to the other would destroy the packed numbers. Set it to auto, {precision} or uint8."
        )
    whole = next((part for part in trained.parts if part.how == "whole" and part.kind in QUANTISED_KINDS), None)
    if whole:
        raise UserError(
            f"adapter.modules_to_save takes in {whole.name}, which {quantization_key('format', config.adapter)} "
            f"{quantization.format} quantises, so that it cannot be trained in full. Name embeddings, norms or the output head "
            f"only, or {without_quantization(config.adapter)}."
        )


def quantization_limits(config: RunConfig, precision: Precision) -> list[StageLimit]:
    """ZeRO stages that a quantised base leaves."""
    quantization = quantization_of(config.model, config.adapter)
    if quantization is None:
        return []
    if not quantization.is_4_bit:
        key = quantization_key("format", config.adapter)
        return [StageLimit(0, 2, f"{key} is int8, whose weights cannot be sharded")]
    if quantization.quant_storage in ("auto", precision):
        return []
    key = quantization_key("quant_storage", config.adapter)
    because = f"{key} is {quantization.quant_storage}, which cannot be sharded with weights in {precision}"
    return [StageLimit(0, 2, because)]


def num_quantised(shape: ModelShape, trained: Trained) -> int:
    """Weights that a quantised base holds as packed numbers: of linear layers, and of fused experts."""
    return shape.num_quantizable + trained.num_packed


def quantized_bytes(quantization: Quantization, shape: ModelShape, trained: Trained) -> float:
    """Weights that bitsandbytes quantises, with their constants."""
    return packed_bytes(quantization, shape, trained) + constant_bytes(quantization, shape, trained)


def packed_bytes(quantization: Quantization, shape: ModelShape, trained: Trained) -> float:
    """Weights that bitsandbytes quantises: half a byte each, or one in int8."""
    return num_quantised(shape, trained) * (0.5 if quantization.is_4_bit else 1)


def constant_bytes(quantization: Quantization, shape: ModelShape, trained: Trained) -> float:
    """What it takes to read packed weights; ZeRO-3 leaves it whole on every rank.

    Dettmers et al. 2023 (QLoRA), section 3: blocks of 64 with an fp32 scale are 0.5 bit per parameter; double quantisation makes
    that 8 / 64 + 32 / (64 * 256) = 0.127 bit. int8 has an fp32 scale per output.
    """
    if not quantization.is_4_bit:
        return 4 * sum(module.outputs for layer in shape.layers() for module in layer if module.is_linear)
    bits = 8 / 64 + 32 / (64 * 256) if quantization.double_quantization else 32 / 64
    return num_quantised(shape, trained) * bits / 8
