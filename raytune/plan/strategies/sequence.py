"""`training.sequence_parallel_size` in a plan: what cannot share rows among ranks is refused. Pure."""

from collections.abc import Iterator

from raytune.config.sections.adapter import num_virtual_tokens
from raytune.config.sections.run import RunConfig
from raytune.errors import PlanError, UserError
from raytune.plan.model.shapes import ModelShape
from raytune.plan.run_plan import BatchPlan
from raytune.plan.strategies.distillation import distillation_of
from raytune.plan.strategies.penalty import ewc_strength

KEY = "training.sequence_parallel_size"
BY_LENGTH = ("dynamic", "longrope")
"""Rotary positions whose frequencies depend on how long a row or document is, which a rank does not see."""


def check_sequence(config: RunConfig, shape: ModelShape) -> None:
    """Refuse what a rank cannot compute of a part of a row, whatever the machines are.

    Raises:
        UserError: (or PlanError) with what to set instead.
    """
    size = config.training.sequence_parallel_size
    if size == 1:
        return
    _check_heads(size, shape)
    scaling = config.model.rope_scaling
    kind = scaling.type if scaling else shape.rope.kind if shape.rope else ""
    init = getattr(config.adapter, "init", None)
    obstacles = {
        "model.base": (bool(shape.why_lone), f"{shape.why_lone}, and a state would have to be handed from rank to rank"),
        "model.attention": (
            config.model.attention not in ("auto", "varlen"),
            f"model.attention is {config.model.attention}, and only varlen exchanges heads between ranks",
        ),
        "adapter.num_virtual_tokens": (
            num_virtual_tokens(config.adapter) > 0,
            f"adapter.method {config.adapter.method} lays virtual tokens in front of each document, which nobody divides",
        ),
        "adapter.init": (init == "eva", "adapter.init is eva, which looks at whole rows on every rank before training"),
        "model.rope_scaling" if scaling else "model.base ": (
            kind in BY_LENGTH,
            f"rotary positions are scaled by {kind}, which depends on lengths that a rank with a part of the row does not see",
        ),
        "strategy.ewc": (
            ewc_strength(config) > 0,
            "strategy.ewc measures the gradient of one document at a time, which one rank has whole",
        ),
        "strategy.distillation": (
            distillation_of(config) is not None,
            "strategy.distillation has a teacher, which sees whole rows",
        ),
        "training.compile": (config.training.compile, "training.compile is true, and collectives would break its graph"),
        "training.liger": (
            config.training.liger is True,
            "training.liger is true, and its kernels were not tried on parts of rows",
        ),
        "training.neftune_noise_alpha": (
            config.training.neftune_noise_alpha > 0,
            "training.neftune_noise_alpha scales its noise by lengths that a rank with a part of the row does not see",
        ),
    }
    for key, (is_there, why) in obstacles.items():
        if is_there:
            raise UserError(
                f"{KEY} is {size}, so that {size} workers share each row, but {why}. Set {KEY} to 1, or change that.",
                keys=(KEY, key.strip()),
            )


def _check_heads(size: int, shape: ModelShape) -> None:
    possible = [number for number in range(1, shape.heads + 1) if _divides(number, shape)]
    if size not in possible:
        below = max(number for number in possible if number < size)
        above = next((f" or {number}" for number in possible if number > size), "")
        raise UserError(
            f"{KEY} is {size}, but this {shape.model_type} model has {shape.heads} query heads over {shape.kv_heads} of keys and "
            f"values, which {size} workers cannot share evenly. Set it to {below}{above}.",
            keys=(KEY, "model.base"),
        )


def _divides(size: int, shape: ModelShape) -> bool:
    """Whether each rank gets as many query heads, with the keys and values that these read."""
    return shape.heads % size == 0 and (shape.kv_heads % size == 0 or size % shape.kv_heads == 0)


def check_groups(size: int, workers: int) -> None:
    """Refuse workers that do not make whole groups.

    Raises:
        PlanError: with the nearest number.
    """
    if workers % size:
        fewer = workers // size * size
        ways = [f"cluster.workers to {fewer}" if fewer else "", f"cluster.workers to {fewer + size}", f"{KEY} to 1"]
        raise PlanError(
            f"{KEY} is {size}, but {workers} worker{'s' * (workers != 1)} make no whole groups of that many. "
            f"Set {', '.join(filter(None, ways[:-1]))} or {ways[-1]}.",
            keys=(KEY, "cluster.workers"),
        )


def sequence_notes(batch: BatchPlan, num_gpus_of_node: int | None) -> Iterator[str]:
    """What a reader of the plan may not expect.

    Args:
        num_gpus_of_node: None: not known, or no GPUs.
    """
    size = batch.sequence_parallel
    if size == 1:
        return
    yield (
        f"{size} workers share each row ({KEY}): each computes 1/{size} of its tokens and, in attention, 1/{size} of the heads "
        f"over all of them. What is trained is the same; where {size} rows would pass at a time, one does."
    )
    if num_gpus_of_node and size > num_gpus_of_node:
        yield (
            f"The {size} workers that share a row lie on several nodes of {num_gpus_of_node} GPUs, and wait in every layer for "
            f"what these exchange. {KEY} {num_gpus_of_node} keeps that inside of a node."
        )
