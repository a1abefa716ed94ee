"""A base that bitsandbytes holds in 4 or 8 bits, in a plan: its dtypes, its bytes, and what cannot be done with it. Pure."""

from dataclasses import replace

from raytune.config.sections.model import Quantization
from raytune.config.sections.quantization import HeldBase
from raytune.config.sections.training import Precision
from raytune.errors import UserError
from raytune.plan.defaults import Choice
from raytune.plan.model.shapes import LINEAR_KINDS, ModelShape
from raytune.plan.model.stage_limit import StageLimit
from raytune.plan.model.trained import Trained


def resolve_quantization(held: HeldBase, precision: Precision) -> Choice[HeldBase]:
    """How the base is held, with its dtypes resolved."""
    asked = held.quantization
    if asked is None:
        return Choice(held)
    compute = precision if asked.compute_dtype == "auto" else asked.compute_dtype
    storage = precision if asked.quant_storage == "auto" else asked.quant_storage
    reasons = []
    if held.preset:
        reasons.append(f"adapter.method {held.preset} is lora over a base with model.quantization {asked.format}.")
    if asked.is_4_bit and asked.compute_dtype == "auto":
        reasons.append(f"{held.key('compute_dtype')} is {compute}, the run's precision.")
    if asked.is_4_bit and asked.quant_storage == "auto":
        reasons.append(f"{held.key('quant_storage')} is {storage}, as all other weights, so that ZeRO-3 could shard the base.")
    resolved = asked.model_copy(update={"compute_dtype": compute, "quant_storage": storage})
    return Choice(replace(held, quantization=resolved), " ".join(reasons) or None)


def check_quantization(held: HeldBase, trained: Trained, precision: Precision) -> None:
    """Refuse a quantised base that could not be trained over as asked.

    Args:
        held: with its dtypes resolved.

    Raises:
        UserError: with the setting that works.
    """
    quantization = held.quantization
    if quantization is None:
        return
    storage = quantization.quant_storage
    if quantization.is_4_bit and storage not in ("uint8", precision):
        raise UserError(
            f"{held.key('quant_storage')} is {storage}, but the other weights are in {precision}: "
            f"casting one to the other would destroy the packed numbers. Set it to auto, {precision} or uint8."
        )
    whole = next((part for part in trained.parts if part.how == "whole" and part.kind in LINEAR_KINDS), None)
    if whole:
        raise UserError(
            f"adapter.modules_to_save takes in {whole.name}, which {held.key('format')} "
            f"{quantization.format} quantises, so that it cannot be trained in full. Name embeddings, norms or the output head "
            f"only, or {held.to_undo}."
        )


def quantization_limits(held: HeldBase, precision: Precision) -> list[StageLimit]:
    """ZeRO stages that a quantised base leaves.

    Args:
        held: with its dtypes resolved.
    """
    quantization = held.quantization
    if quantization is None:
        return []
    if not quantization.is_4_bit:
        return [StageLimit(0, 2, f"{held.key('format')} is int8, whose weights cannot be sharded")]
    if quantization.quant_storage == precision:
        return []
    because = f"{held.key('quant_storage')} is {quantization.quant_storage}, which cannot be sharded with weights in {precision}"
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
