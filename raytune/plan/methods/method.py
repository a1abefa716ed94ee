"""A row of the table of methods: all that a plan asks of one way to train."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from raytune.config.sections.model import Quantization
from raytune.config.sections.quantization import HeldBase
from raytune.config.sections.run import RunConfig
from raytune.plan.model.shapes import ModelShape
from raytune.plan.model.stage_limit import StageLimit
from raytune.plan.model.trained import Trained


def no_limits(adapter: Any, shape: ModelShape, quantization: Quantization | None) -> list[StageLimit]:
    """For methods that every ZeRO stage can shard."""
    return []


def nothing_unread(adapter: Any, shape: ModelShape) -> Iterator[str]:
    """For methods whose settings all models read."""
    return iter(())


def same_at_any_step(adapter: Any, num_steps: int) -> Iterator[str]:
    """For methods that train alike in all steps."""
    return iter(())


def no_exclusions(adapter: Any, shape: ModelShape) -> list[str]:
    """For methods that leave fused experts as they are."""
    return []


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What is asked of a method; `adapter` is its section of the config, without a preset's words about the base."""

    trained: Callable[[Any, ModelShape, Quantization | None], Trained]
    """What is trained. Raises ModelError if a name matches nothing, or a pattern is no regular expression."""
    check: Callable[[Any, RunConfig, HeldBase, ModelShape], None]
    """Refuse what could not be started, trained, saved or loaded, with the setting that works."""
    in_words: Callable[[Any, str, str], str]
    """The line of a plan: of the section, what the base is held in (" over a base in nf4" or nothing), and what is trained."""
    expert_notes: Callable[[Any, ModelShape, Trained, Quantization | None], list[str]]
    """What happens to the fused experts of a mixture, in sentences."""
    learning_rate: Callable[[int], float]
    """The usual peak rate, by parameters of the base."""
    epochs: Callable[[int], float]
    """The usual passes, by target tokens of the data."""
    weight_decay: float
    """The usual one."""
    when: str
    """What the method is good for, and what it costs, in a line."""
    recomputes: bool = True
    """Whether layers can compute their activations again."""
    keeps_base: Callable[[Any], bool] = lambda adapter: True
    """Whether the model computes what its base does once what is trained is switched off."""
    stage_limits: Callable[[Any, ModelShape, Quantization | None], list[StageLimit]] = no_limits
    """ZeRO stages that the method leaves."""
    unread: Callable[[Any, ModelShape], Iterator[str]] = nothing_unread
    """A sentence for each setting that has no effect on this model's targets."""
    reasons: Callable[[Any, ModelShape], Iterator[str]] = nothing_unread
    """A sentence for each value that the method chose."""
    if_ended_early: Callable[[Any, int], Iterator[str]] = same_at_any_step
    """What a run of so many steps leaves if a rule ends it before its last one, where that is of another kind, in sentences."""
    exclusions: Callable[[Any, ModelShape], list[str]] = no_exclusions
    """`adapter.exclude_modules` with which fused experts that a group takes in stay frozen; empty: none are taken in."""
