"""What is decided or refused before minutes go into tokenising data: one pass, in the order in which choices need each other."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from raytune.config.adapter import Adapter, without_preset
from raytune.config.model import Attention, Quantization
from raytune.config.run import RunConfig
from raytune.config.training import Precision
from raytune.plan.deepspeed_keys import check_overrides
from raytune.plan.division import Begun, most_that_divide
from raytune.plan.dropouts import check_drops, resolve_dropout
from raytune.plan.freezing import narrowed, trained_with
from raytune.plan.lone_documents import check_lone_documents
from raytune.plan.machine import Machine
from raytune.plan.methods import method_of
from raytune.plan.quantization import check_quantization, resolve_quantization
from raytune.plan.requirements import (
    Device,
    check_cluster,
    check_kernels,
    choose_attention,
    choose_device,
    choose_precision,
    choose_row_length,
    choose_workers,
    possible_stages,
)
from raytune.plan.run_plan import ZeroStage
from raytune.plan.shapes import ModelShape
from raytune.plan.stored_quantization import check_stored_quantization
from raytune.plan.trained import Trained
from raytune.plan.update_groups import with_rates

Value = TypeVar("Value")


class Of(Protocol):
    """How a look is taken: its value, or None where what it raised is kept for later."""

    def __call__(self, look: Callable[[], Value], /) -> Value | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is decided before data and memory are looked at."""

    device: Device
    workers: int
    precision: Precision
    adapter: Adapter
    """Without a preset's words about the base, and with the targets that `strategy.freeze` leaves."""
    quantization: Quantization | None
    dropout: dict[str, float]
    """Keys of the base's config with the rates that they are to have in training."""
    trained: Trained
    attention: Attention
    row_length: int
    """Tokens that a packed row holds at most."""
    stages: tuple[ZeroStage, ...]
    """ZeRO stages that the settings leave, lowest first."""
    begun: Begun | None
    """The run that is continued."""
    reasons: tuple[str, ...]
    """Why each automatic choice was made, a sentence each."""


def settle(config: RunConfig, shape: ModelShape, machine: Machine, begun: Begun | None = None) -> Setting:
    """Decide what needs no data.

    Args:
        begun: the run that is continued; `config` is then what `division.continued` made of it.

    Raises:
        UserError: (or PlanError, ModelError) if it cannot work whatever the rows are, with what to set instead.
    """
    setting = look_at(config, shape, machine, _at_once, begun)
    assert setting is not None, "what is missing was raised"
    return setting


def look_at(config: RunConfig, shape: ModelShape, machine: Machine | None, of: Of, begun: Begun | None = None) -> Setting | None:
    """Take each look by itself; None if one of them gave nothing, or without a machine, which some of them need."""
    row_length = of(lambda: choose_row_length(config, shape))
    of(lambda: check_lone_documents(config, shape))
    section, freeze = without_preset(config.adapter), config.strategy.freeze
    adapter = of(lambda: narrowed(section, shape, freeze))

    def trained_over(held: Quantization | None) -> Trained | None:
        if adapter is None:
            return None
        return with_rates(trained_with(adapter, shape, freeze, held), config.strategy, shape)

    as_it_is = of(lambda: trained_over(None))
    dropout = of(lambda: resolve_dropout(config.model, shape))
    of(lambda: check_drops(config.model))
    of(lambda: check_overrides(config.training.zero))
    of(lambda: method_of(section).check(section, config, shape))
    of(lambda: check_cluster(config.cluster))
    device: Device | None = None if machine is None else of(lambda: choose_device(config, machine))
    if machine is None or device is None:
        return None
    workers = of(lambda: choose_workers(config, machine, device))
    precision = of(lambda: choose_precision(config, machine, device))
    if workers is None or precision is None:
        return None
    num_workers = workers.value
    if begun and config.cluster.workers == "auto":
        num_workers = most_that_divide(begun.rows_per_step, num_workers, config.training)
    quantization = of(lambda: resolve_quantization(config, precision.value))
    held = quantization.value if quantization else None
    trained = as_it_is if held is None else of(lambda: trained_over(held))
    attention = of(lambda: choose_attention(config, shape, machine, device, precision.value))
    stages = of(lambda: possible_stages(config, shape, device, num_workers, precision.value))
    if quantization is not None and trained is not None:
        of(lambda: check_quantization(config, trained, precision.value))
        of(lambda: check_stored_quantization(shape.stored_quantization, held, config.adapter, config.model.base))
    of(lambda: check_kernels(config, shape, device))
    if row_length is None or adapter is None or trained is None or dropout is None:
        return None
    if quantization is None or attention is None or stages is None:
        return None
    reasons = [workers.reason, precision.reason, quantization.reason, attention.reason]
    if num_workers != workers.value and begun:
        reasons[0] = f"cluster.workers is {num_workers}: the most that share the {begun.rows_per_step} rows of a step evenly."
    if config.data.max_length == "auto":
        reasons.append(f"data.max_length is {row_length}; the model has {shape.max_positions} positions.")
    return Setting(
        device=device,
        workers=num_workers,
        precision=precision.value,
        adapter=adapter,
        quantization=quantization.value,
        dropout=dropout,
        trained=trained,
        attention=attention.value,
        row_length=row_length,
        stages=tuple(stages),
        begun=begun,
        reasons=tuple(reason for reason in reasons if reason),
    )


def _at_once(look: Callable[[], Value], /) -> Value:
    return look()
