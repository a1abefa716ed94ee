"""How each trained weight is updated: the factor of its learning rate and its weight decay, in one place. Pure.

The plan resolves `strategy` to groups of modules (`with_rates`, `update_groups`); an optimizer asks for each parameter by its
name (`rate_scale`, `weight_decay`). All factors of a rate are multiplied: that of its layer, those of patterns, and LoRA+'s.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from raytune.config.sections.strategy import StrategySection
from raytune.errors import UserError
from raytune.plan.model.module_names import WORDS, is_meant, matches_end
from raytune.plan.model.shapes import ModelShape
from raytune.plan.model.trained import Trained, TrainedPart, layer_of
from raytune.plan.run_plan import OptimizationPlan, UpdateGroup
from raytune.plan.strategies.freezing import folded, is_in, meant, nothing_meant

RATES, DECAYS = "strategy.rate_scales", "strategy.weight_decay_of"
PREFIX = "base_model.model."
"""What PEFT puts before the names of the model that it wraps."""
SAVED = ".modules_to_save.default"
"""What PEFT puts behind the name of a module that it trains in full, and before those of the modules in it."""


def with_rates(trained: Trained, strategy: StrategySection, shape: ModelShape) -> Trained:
    """What is trained, with the factor of the rate and the weight decay of each part.

    Raises:
        UserError: (or ModelError) if a setting changes nothing.
    """
    decay = strategy.layer_rate_decay
    if decay == 1 and not strategy.rate_scales and not strategy.weight_decay_of:
        return trained
    layer_scale = {part.name: decay ** distance_from_top(part, trained, shape) for part in trained.parts}
    if decay != 1 and all(scale == 1 for scale in layer_scale.values()):
        raise UserError(
            f"strategy.layer_rate_decay is {decay:g}, but nothing is trained below the output head and the norm before it, which "
            f"have the full rate. Leave it out.",
            keys=("strategy.layer_rate_decay",),
        )
    if decay != 1 and trained.num_virtual:
        raise UserError(
            f"strategy.layer_rate_decay is {decay:g}, but nothing in layers is trained: virtual tokens lie in front of "
            f"documents. Leave it out; training.learning_rate is the rate of all.",
            keys=("strategy.layer_rate_decay",),
        )
    owners = [replace(part, name=_owner(part)) for part in trained.parts]
    for pattern, factor in strategy.rate_scales.items():
        if not meant(owners, pattern, shape, RATES):
            raise nothing_meant(f"{RATES} {pattern!r}: {factor:g}", pattern, trained, "nothing of that is trained", shape)
    decays = _decays(owners, strategy.weight_decay_of, trained, shape)
    parts = []
    for part, owner, own_decay in zip(trained.parts, owners, decays, strict=True):
        factors = [factor for pattern, factor in strategy.rate_scales.items() if meant([owner], pattern, shape, RATES)]
        scale = layer_scale[part.name] * math.prod(factors)
        parts.append(replace(part, rate_scale=scale, weight_decay=own_decay))
    return replace(trained, parts=tuple(parts))


def rate_notes(trained: Trained, strategy: StrategySection, shape: ModelShape) -> Iterator[str]:
    """What is not to be expected of rates, in sentences."""
    embedding = shape.embeddings[0].name
    if strategy.layer_rate_decay != 1 and trained.is_base and shape.is_tied and embedding in trained.whole:
        yield (
            f"{shape.head.name} is {embedding} (tied): strategy.layer_rate_decay lets it learn as embeddings do, slowest of all."
        )


def distance_from_top(part: TrainedPart, trained: Trained, shape: ModelShape) -> int:
    """Steps down from the output head and the norm before it: 1 to the last layer, one more than there are layers to embeddings.

    A tied head that is trained with the embedding is the embedding.
    """
    layer = layer_of(part.name, shape)
    if layer is not None:
        return shape.num_layers - layer
    is_embedding = part.name == shape.head.name and shape.is_tied and trained.is_base
    is_top = part.name in (shape.head.name, shape.final_norm.name) and not is_embedding
    return 0 if is_top else shape.num_layers + 1


def update_groups(trained: Trained) -> list[UpdateGroup]:
    """The parts that are not updated as the run's settings say, by modules that hold nothing else."""
    settings: dict[str, tuple[float, float | None]] = {}
    for part in (one for one in trained.parts if one.num_parameters):  # a layer's update comes before its bias
        settings.setdefault(_owner(part), (part.rate_scale, part.weight_decay))
    by_settings: dict[tuple[float, float | None], list[str]] = {}
    for name, setting in folded(settings).items():
        if setting != (1.0, None):
            by_settings.setdefault(setting, []).append(name)
    return [
        UpdateGroup(modules=names, rate_scale=rate_scale, weight_decay=weight_decay)
        for (rate_scale, weight_decay), names in by_settings.items()
    ]


def rate_scale(name: str, num_dimensions: int, plan: OptimizationPlan) -> float:
    """What a parameter's rate is, as a multiple of the run's.

    With LoRA+ (Hayou et al. 2024) the matrices B and parameters of one dimension learn `lora_plus_ratio` times as fast; low-rank
    updates of embeddings have a rate of their own.

    Args:
        name: of the parameter, in a model that PEFT wraps or in a plain one.
        num_dimensions: of the whole parameter.
    """
    return _lora_plus(name, num_dimensions, plan) * next((group.rate_scale for group in _groups_of(name, plan)), 1.0)


def weight_decay(name: str, num_dimensions: int, plan: OptimizationPlan, *, has_none: bool) -> float:
    """A parameter's weight decay.

    Args:
        name, num_dimensions: as of `rate_scale`.
        has_none: whether the run's setting does not hold for it, because it is a bias, a norm or the like.
    """
    own = next((group.weight_decay for group in _groups_of(name, plan) if group.weight_decay is not None), None)
    if own is None:
        return 0.0 if has_none else plan.weight_decay
    # A norm is in a group with a decay only if that was made for norms, and VeRA's factors are all that it trains of a layer; all
    # else of one dimension is a bias, or a magnitude.
    last = name.rpartition(".")[2]
    is_meant_so = (last == "weight" and "lora_" not in name) or ".vera_lambda_" in name
    return own if "bias" not in last and (num_dimensions > 1 or is_meant_so) else 0.0


def _lora_plus(name: str, num_dimensions: int, plan: OptimizationPlan) -> float:
    if plan.lora_plus_ratio is None:
        return 1.0
    if "lora_embedding_" in name:
        assert plan.lora_plus_embedding_rate is not None
        return plan.lora_plus_embedding_rate / plan.learning_rate
    return plan.lora_plus_ratio if "lora_B" in name or num_dimensions < 2 else 1.0


def _groups_of(name: str, plan: OptimizationPlan) -> Iterator[UpdateGroup]:
    own = name.removeprefix(PREFIX).replace(SAVED, "")
    return (group for group in plan.update_groups if any(is_in(own, module) for module in group.modules))


def _owner(part: TrainedPart) -> str:
    """The module of a part: PEFT's updates of a parameter lie beside it, in one place for all of that module."""
    return part.name.rpartition(".")[0] if part.is_parameter else part.name


def _decays(owners: Sequence[TrainedPart], asked: dict[str, float], trained: Trained, shape: ModelShape) -> list[float | None]:
    """Weight decay of each part by the first pattern that means it; None: the run's.

    Raises:
        UserError: (or ModelError) if a pattern decides about nothing.
    """
    first = [next((pattern for pattern in asked if _decays_part(pattern, part, shape)), None) for part in owners]
    for pattern, value in asked.items():
        if pattern not in first:
            earlier = any(_decays_part(pattern, part, shape) for part in owners)
            why = "a pattern before it means the same" if earlier else "nothing of that is trained, or biases and norms only"
            raise nothing_meant(f"{DECAYS} {pattern!r}: {value:g}", pattern, trained, why, shape)
    return [None if pattern is None else asked[pattern] for pattern in first]


def _decays_part(pattern: str, part: TrainedPart, shape: ModelShape) -> bool:
    if part.kind != "norm":
        return part.how != "bias" and is_meant(pattern, part.name, part.kind, shape, DECAYS)
    return WORDS[pattern](part.name, part.kind, shape) if pattern == "norms" else matches_end(pattern, part.name, DECAYS)
