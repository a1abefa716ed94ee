"""What is decided or refused before minutes go into tokenising data: one pass, in the order in which choices need each other."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from raytune.config.sections.adapter import Adapter, without_preset
from raytune.config.sections.model import Attention, Quantization
from raytune.config.sections.quantization import HeldBase, held_base
from raytune.config.sections.run import RunConfig
from raytune.config.sections.training import Precision
from raytune.plan.choosing.fused_kernels import choose_liger
from raytune.plan.choosing.node_copies import copies_of, with_copies
from raytune.plan.choosing.requirements import (
    Device,
    check_cluster,
    choose_attention,
    choose_device,
    choose_precision,
    choose_row_length,
    choose_workers,
)
from raytune.plan.choosing.sharded_base import limits_of_base, shardings_of
from raytune.plan.choosing.stages import Sharding, possible_stages
from raytune.plan.data.split import check_test
from raytune.plan.data.streaming import check_streaming
from raytune.plan.defaults import Choice
from raytune.plan.facts.machine import Machine
from raytune.plan.identity.deepspeed_keys import check_overrides
from raytune.plan.identity.division import Begun, most_that_divide
from raytune.plan.methods import method_of
from raytune.plan.model.dropouts import check_drops, resolve_dropout
from raytune.plan.model.lone_documents import check_lone_documents
from raytune.plan.model.quantization import check_quantization, quantization_limits, resolve_quantization
from raytune.plan.model.rope import positions_of, resolve_rope
from raytune.plan.model.shapes import ModelShape
from raytune.plan.model.stored_quantization import check_stored_quantization
from raytune.plan.model.trained import Trained, known
from raytune.plan.rates.optimizers import check_optimizer
from raytune.plan.run_plan import ObjectivePlan
from raytune.plan.strategies.averaging import check_averaging
from raytune.plan.strategies.distillation import check_distillation, teacher_section
from raytune.plan.strategies.freezing import narrowed, trained_with
from raytune.plan.strategies.new_tokens import check_rows_are_trained
from raytune.plan.strategies.objective import check_objective, objective_of
from raytune.plan.strategies.penalty import check_importance, check_penalty
from raytune.plan.strategies.phases import trained_by_phase
from raytune.plan.strategies.sequence import check_sequence
from raytune.plan.strategies.stopping import check_gap
from raytune.plan.strategies.update_groups import with_rates

Value = TypeVar("Value")


class Of(Protocol):
    """How a look is taken: its value, or None where what it raised is kept for later."""

    def __call__(self, look: Callable[[], Value], /) -> Value | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is decided before data and memory are looked at, and what it was decided from."""

    config: RunConfig
    shape: ModelShape
    machine: Machine
    begun: Begun | None
    """The run that is continued."""
    teacher: ModelShape | None = None
    """Of a model beside the one that is trained (plan.distillation)."""
    device: Device
    workers: int
    precision: Precision
    adapter: Adapter
    """Without a preset's words about the base, and with the targets that `strategy.freeze` leaves."""
    held: HeldBase
    """With its dtypes resolved."""
    dropout: dict[str, float]
    """Keys of the base's config with the rates that they are to have in training."""
    trained: Trained
    """By the end of the run."""
    phases: tuple[Trained, ...]
    """What is trained in each phase of `strategy.unfreeze`; empty without."""
    attention: Attention
    liger: bool
    """Whether Liger's kernels compute what they can."""
    row_length: int
    """Tokens that a packed row holds at most."""
    objective: ObjectivePlan | None
    """What is minimised; None: cross-entropy."""
    shardings: tuple[Sharding, ...]
    """Ways to divide the run that the settings leave, the fastest first."""
    reasons: tuple[str, ...]
    """Why each automatic choice was made, a sentence each."""

    @property
    def quantization(self) -> Quantization | None:
        """How the base is held; None: as it is."""
        return self.held.quantization


def settle(
    config: RunConfig,
    shape: ModelShape,
    machine: Machine,
    begun: Begun | None = None,
    teacher: ModelShape | None = None,
    objective: ObjectivePlan | None = None,
) -> Setting:
    """Decide what needs no data.

    Args:
        objective: what is minimised, where it was tried.
        begun: the run that is continued; `config` is then what `division.continued` made of it.
        teacher: shape of what `distillation.teacher_section` names, if it names a model.

    Raises:
        UserError: (or PlanError, ModelError) if it cannot work whatever the rows are, with what to set instead.
    """
    setting = look_at(config, shape, machine, _at_once, begun, teacher, objective)
    assert setting is not None, "what is missing was raised"
    return setting


def look_at(
    config: RunConfig,
    shape: ModelShape,
    machine: Machine | None,
    of: Of,
    begun: Begun | None = None,
    teacher: ModelShape | None = None,
    objective: ObjectivePlan | None = None,
) -> Setting | None:
    """Take each look by itself; None if one of them gave nothing, or without a machine, which some of them need."""
    teacher = teacher if teacher_section(config) else None  # whatever another method would need
    row_length = of(lambda: choose_row_length(config, shape))
    of(lambda: check_drops(config.model))
    of(lambda: check_cluster(config.cluster))
    of(lambda: check_objective(config))
    of(lambda: check_gap(config))
    of(lambda: check_streaming(config))
    of(lambda: check_test(config))
    objective = objective or of(lambda: objective_of(config))
    places = None if machine is None else _places(config, shape, machine, of)
    of(lambda: check_overrides(config.training.zero))
    of(lambda: check_sequence(config, shape))
    asked, section = of(lambda: held_base(config.model, config.adapter)), without_preset(config.adapter)
    if asked is None:
        return None
    of(lambda: check_lone_documents(config, asked, shape))
    of(lambda: check_distillation(config, shape, teacher, row_length))
    method, quantization, strategy = method_of(section), asked.quantization, config.strategy
    adapter = of(lambda: narrowed(section, shape, strategy.freeze))
    phases = adapter and of(lambda: trained_by_phase(adapter, shape, config))
    trained = adapter and of(
        lambda: with_rates(phases[-1] if phases else trained_with(adapter, shape, strategy.freeze, quantization), strategy, shape)
    )
    phases, trained = phases and tuple(map(known, phases)), trained and known(trained)
    if trained is not None:
        of(lambda: check_rows_are_trained(trained, shape, section, strategy))
        of(lambda: check_penalty(config, trained))
        of(lambda: check_averaging(config, trained))
        of(lambda: check_optimizer(config, trained))
    dropout = of(lambda: resolve_dropout(config.model, shape))
    of(lambda: resolve_rope(config.model, shape))
    of(lambda: method.check(section, config, asked, shape))
    if machine is None or places is None:
        return None
    device, workers, precision, attention, liger = places
    num_workers = workers.value
    if begun and config.cluster.workers == "auto":
        num_workers = most_that_divide(begun.rows_per_step, num_workers, config.training)
    base = resolve_quantization(asked, precision.value)
    limits = [*quantization_limits(base.value, precision.value), *method.stage_limits(adapter or section, shape, quantization)]
    limits_by_base = limits_of_base(config, num_workers)
    if trained is not None:
        of(lambda: check_quantization(base.value, trained, precision.value))
    of(lambda: check_stored_quantization(shape.stored_quantization, base.value, config.adapter.method, config.model.base))
    of(lambda: check_importance(config, precision.value))
    stages = of(lambda: possible_stages(config.training, [*limits_by_base, *limits], device, num_workers, precision.value))
    copies = of(lambda: copies_of(config, machine, device, num_workers))
    if row_length is None or adapter is None or phases is None or trained is None or stages is None or copies is None:
        return None
    shardings = of(lambda: with_copies(shardings_of(stages, config, trained, shape, limits, device, num_workers), copies))
    if dropout is None or attention is None or liger is None or shardings is None:
        return None
    reasons = [workers.reason, precision.reason, base.reason, attention.reason, liger.reason]
    if num_workers != workers.value and begun:
        reasons[0] = f"cluster.workers is {num_workers}: the most that share the {begun.rows_per_step} rows of a step evenly."
    if config.data.max_length == "auto":
        taken = f", of which virtual tokens take {trained.num_virtual}" if trained.num_virtual else ""
        reasons.append(f"data.max_length is {row_length}; the model has {positions_of(config.model, shape)} positions{taken}.")
    return Setting(
        config=config,
        shape=shape,
        machine=machine,
        begun=begun,
        teacher=teacher,
        device=device,
        workers=num_workers,
        precision=precision.value,
        adapter=adapter,
        held=base.value,
        dropout=dropout,
        trained=trained,
        phases=phases,
        attention=attention.value,
        liger=liger.value,
        row_length=row_length,
        objective=objective,
        shardings=tuple(shardings),
        reasons=tuple(reason for reason in reasons if reason),
    )


_Places = tuple[Device, Choice[int], Choice[Precision], Choice[Attention] | None, Choice[bool] | None]


def _places(config: RunConfig, shape: ModelShape, machine: Machine, of: Of) -> _Places | None:
    """What the machines decide of a run: device, workers, precision and kernels; None if one gave nothing that others need."""
    device: Device | None = of(lambda: choose_device(config, machine))
    if device is None:
        return None
    workers = of(lambda: choose_workers(config, machine, device))
    precision = of(lambda: choose_precision(config, machine, device))
    liger = of(lambda: choose_liger(config, shape, machine, device))
    if workers is None or precision is None:
        return None
    return device, workers, precision, of(lambda: choose_attention(config, shape, machine, device, precision.value)), liger


def _at_once(look: Callable[[], Value], /) -> Value:
    return look()
