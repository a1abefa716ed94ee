"""What an engine may take on at once, by the memory that there is for it."""

import math

from raytune.config.sections.training import Precision
from raytune.plan.facts.machine import USABLE_SHARE, Machine
from raytune.plan.model.shapes import ModelShape
from raytune.plan.saved.asked_model import AskedModel, on_device
from raytune.plan.saved.serving import SPARE_COLUMNS, EngineLimits, most_cached_tokens

NUMBER_BYTES: dict[Precision, int] = {"bf16": 2, "fp16": 2, "fp32": 4}
PACKED_BYTES = 0.57
"""Of a number that bitsandbytes packs into 4 bits, with its share of scales."""


def engine_limits(
    machine: Machine, shape: ModelShape, model: AskedModel, *, replicas: int, device: str, max_batch: int, max_waiting: int
) -> EngineLimits:
    """As many keys and values as there is room for beside the base, and no more than `max_batch` answers can fill.

    Args:
        model: that is served; adapters over it are small.
        replicas: on all nodes, which share them evenly. On GPUs each has one for itself.

    Raises:
        PlanError: if hardly any have room.
    """
    number_bytes = NUMBER_BYTES[on_device(model, device).model.compute_dtype]
    whole = machine.gpu_memory_bytes if device == "cuda" else machine.host_memory_bytes
    limits = EngineLimits(most_at_once=max_batch, most_waiting=max_waiting)
    most = max_batch * (shape.max_positions + SPARE_COLUMNS)
    if whole:
        share = whole if device == "cuda" else whole / math.ceil(replicas / machine.num_nodes)
        room = int(USABLE_SHARE * share - weight_bytes(shape, model, number_bytes))
        most = min(most, most_cached_tokens(room, shape, number_bytes))
    return limits.model_copy(update={"most_cached_tokens": most})


def weight_bytes(shape: ModelShape, model: AskedModel, number_bytes: int) -> float:
    packed = shape.num_quantizable if model.model.quantization else 0
    return (shape.num_parameters - packed) * number_bytes + packed * PACKED_BYTES
