"""`strategy.unfreeze`: the phases of a run, each of which trains more of the base than the one before it. Pure.

Phases are nested, so that a checkpoint of a phase holds every weight that was ever changed, and a parameter's optimizer state has
one beginning: that of the first phase which trains it (`age`).
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from raytune.config.sections.adapter import Adapter
from raytune.config.sections.run import RunConfig
from raytune.config.sections.strategy import FreezeSection, PhaseSection, StrategySection
from raytune.errors import UserError
from raytune.plan.methods import trained_by
from raytune.plan.model.shapes import ModelShape
from raytune.plan.model.trained import Trained
from raytune.plan.run_plan import PhasePlan, RunPlan
from raytune.plan.strategies.freezing import frozen_names, trained_with

UNFREEZE = "strategy.unfreeze"
STARTS = ("from_epoch", "from_step", "from_fraction")
_HALF_A_STEP_AT_MOST = 1e-6
"""Of a step: what a product of decimal fractions may be above the whole number that it means."""


# --- what each phase trains


def trained_by_phase(adapter: Adapter, shape: ModelShape, config: RunConfig) -> tuple[Trained, ...]:
    """What is trained in each phase; empty without phases.

    Args:
        adapter: as `freezing.narrowed` gives it.

    Raises:
        UserError: (or ModelError) if the phases cannot be, whatever the data are.
    """
    strategy = config.strategy
    if not strategy.unfreeze:
        return ()
    _check_method(adapter, shape, config)
    _check_starts(strategy.unfreeze)
    _check_layers(strategy, shape)
    phases = tuple(trained_with(adapter, shape, _freeze_of(phase, strategy, shape)) for phase in strategy.unfreeze)
    _check_changes(strategy.unfreeze, phases)
    return phases


def has_own_rates(config: RunConfig) -> bool:
    """Whether every phase has a rate of its own, so that `training.learning_rate` is none's."""
    phases = config.strategy.unfreeze
    return bool(phases) and all(phase.learning_rate is not None for phase in phases)


def words_of(phase: PhaseSection, trained: Trained, shape: ModelShape) -> str:
    """What a phase trains, in words."""
    if phase.last_layers == "all":
        return "all"
    top = [name for name in (shape.head.name, shape.final_norm.name) if name in trained.whole]
    layers = ["the last layer" if phase.last_layers == 1 else f"the last {phase.last_layers} layers"] if phase.last_layers else []
    return " and ".join([", ".join([*layers, *top][:-1]), [*layers, *top][-1]]).removeprefix(" and ")


def phase_notes(config: RunConfig, shape: ModelShape) -> Iterator[str]:
    """What is not to be expected of phases, in sentences."""
    unfreeze = config.strategy.unfreeze
    if not unfreeze or not shape.is_tied or config.strategy.freeze.embeddings:
        return
    until = next((number for number, phase in enumerate(unfreeze, 1) if phase.last_layers == "all"), None)
    when = f"until phase {until} trains all" if until else "in all phases"
    yield f"{shape.head.name} is {shape.embeddings[0].name} (tied): one matrix, which is frozen {when}."


def _freeze_of(phase: PhaseSection, strategy: StrategySection, shape: ModelShape) -> FreezeSection:
    """What a phase leaves as it is: the layers below its own and the embeddings, and what stays so in the whole run."""
    freeze = strategy.freeze
    if phase.last_layers == "all":
        return freeze
    below = max(freeze.first_layers, shape.num_layers - phase.last_layers)
    return freeze.model_copy(update={"embeddings": True, "first_layers": below})


def _check_method(adapter: Adapter, shape: ModelShape, config: RunConfig) -> None:
    """Refuse what cannot be trained in phases, with what can."""
    if not trained_by(adapter, shape).is_base:
        in_layers = "; or train updates of the last layers alone, in the whole run: strategy.freeze.first_layers"
        raise UserError(
            f"{UNFREEZE} trains more and more of the base's own weights, and adapter.method {adapter.method} leaves them as they "
            f"are. Set adapter.method to full{in_layers * hasattr(adapter, 'target_modules')}.",
            keys=(UNFREEZE,),
        )
    if config.strategy.freeze.train_only:
        raise UserError(
            f"strategy.freeze.train_only and {UNFREEZE} both say what is trained. Leave one of them out; strategy.freeze.modules "
            f"freezes by name in all phases.",
            keys=("strategy.freeze.train_only", UNFREEZE),
        )
    for name in ("offload_optimizer", "offload_parameters"):
        if getattr(config.training.zero, name) == "nvme":
            raise UserError(
                f"training.zero.{name} is nvme, and state in files is not carried from one phase of {UNFREEZE} to the next. Set "
                f"it to cpu or none.",
                keys=(f"training.zero.{name}", UNFREEZE),
            )
    is_written = "learning_rate" in config.training.model_fields_set and config.preset is None
    if is_written and config.training.learning_rate != "auto" and has_own_rates(config):
        raise UserError(
            f"training.learning_rate has no effect: every phase of {UNFREEZE} has a learning_rate of its own. Leave it out, or "
            f"leave out those of phases that are to have it.",
            keys=("training.learning_rate",),
        )


def _check_starts(phases: Sequence[PhaseSection]) -> None:
    """Refuse phases that do not say where they begin, or begin before the one before, as far as that is seen without data."""
    for index, phase in enumerate(phases):
        given = [name for name in STARTS if getattr(phase, name) is not None]
        if len(given) > 1:
            raise UserError(
                f"{_of(index)} says where it begins by {' and by '.join(given)}. Leave one.", keys=(_key(index, given[1]),)
            )
        if index and not given:
            raise UserError(
                f"{_of(index)} does not say where it begins. Give it one of {', '.join(STARTS)}.", keys=(_key(index),)
            )
        if not index and given and getattr(phase, given[0]):
            raise UserError(
                f"{_of(0)} begins after {_start_in_words(phase)}, and nothing is trained until then. Leave {given[0]} out, or "
                f"put a phase before it.",
                keys=(_key(0, given[0]),),
            )
    if phases[0].warmup_steps:
        raise UserError(
            f"{_of(0)} begins with the run, whose warm-up is training.warmup_steps or training.warmup_ratio. Set one of these in "
            f"place of its warmup_steps.",
            keys=(_key(0, "warmup_steps"),),
        )
    for index, (before, phase) in enumerate(pairwise(phases), 1):
        name = _start_key(phase)
        if name == _start_key(before) and getattr(phase, name) <= getattr(before, name):
            raise UserError(
                f"{_of(index)} begins after {_start_in_words(phase)}, and the one before it after {_start_in_words(before)}. "
                f"Give phases in the order in which they begin, each one after the one before it.",
                keys=(_key(index, name),),
            )


def _check_layers(strategy: StrategySection, shape: ModelShape) -> None:
    """Refuse numbers of layers that are not there, or fewer than before."""
    before, most = 0, shape.num_layers - strategy.freeze.first_layers
    for index, phase in enumerate(strategy.unfreeze):
        number = phase.last_layers
        if number != "all" and number > most:
            frozen = f", and strategy.freeze.first_layers {strategy.freeze.first_layers} freezes the others" * (
                number <= shape.num_layers
            )
            raise UserError(
                f"{_of(index)} trains the last {number} layers, but the model has {shape.num_layers}{frozen}. Set last_layers to "
                f"{most} or less, or to all.",
                keys=(_key(index, "last_layers"),),
            )
        reach = math.inf if number == "all" else number
        if reach < before:
            raise UserError(
                f"{_of(index)} trains fewer layers than the one before it. Phases only unfreeze: set last_layers to "
                f"{'all' if before == math.inf else f'{before} or more'}.",
                keys=(_key(index, "last_layers"),),
            )
        before = reach


def _check_changes(phases: Sequence[PhaseSection], trained: Sequence[Trained]) -> None:
    """Refuse phases that change nothing."""
    if len(phases) == 1:
        raise UserError(
            f"{UNFREEZE} has one phase, in which nothing is unfrozen. Add one that trains more, or say with strategy.freeze what "
            f"stays as it is in the whole run (embeddings: true, first_layers).",
            keys=(UNFREEZE,),
        )
    for index, (before, phase) in enumerate(pairwise(phases), 1):
        if trained[index].parts == trained[index - 1].parts and before.learning_rate == phase.learning_rate:
            raise UserError(
                f"{_of(index)} trains the same as the one before it, at the same rate. Leave it out, raise its last_layers, or "
                f"give it a learning_rate.",
                keys=(_key(index, "last_layers"),),
            )


# --- where each phase begins


def phase_plans(
    config: RunConfig, trained: Sequence[Trained], shape: ModelShape, learning_rate: float, *, num_steps: int, epoch_steps: float
) -> list[PhasePlan]:
    """The phases with the steps at which they begin.

    Args:
        trained: in each phase, as `trained_by_phase` gives it.
        learning_rate: peak, of phases that have none of their own.
        num_steps: of the run.
        epoch_steps: steps, and parts of one, that an epoch has.

    Raises:
        UserError: if a phase begins before the one before it does, or when the run is over, or ends in its warm-up.
    """
    phases = config.strategy.unfreeze
    firsts = [_first_step(phase, num_steps, epoch_steps) for phase in phases]
    for index, (first, phase) in enumerate(zip(firsts, phases)):
        name = _start_key(phase)
        if first >= num_steps:
            raise UserError(
                f"{_of(index)} begins after {_start_in_words(phase)}, which is step {first}, but the run has {num_steps} steps. "
                f"Let it begin earlier, or train for longer (training.num_train_epochs, training.max_steps).",
                keys=(_key(index, name),),
            )
        if index and first <= firsts[index - 1]:
            raise UserError(
                f"{_of(index)} begins after {_start_in_words(phase)}, which is step {first} of {num_steps}, and the one before "
                f"it after step {firsts[index - 1]}: each phase needs a step. Let it begin later.",
                keys=(_key(index, name),),
            )
    for index, (phase, (first, end)) in enumerate(zip(phases, pairwise([*firsts, num_steps]))):
        if phase.warmup_steps and phase.warmup_steps >= end - first:
            raise UserError(
                f"{_of(index)} has {phase.warmup_steps} warm-up steps, and {end - first} steps in all. Set its warmup_steps to "
                f"less.",
                keys=(_key(index, "warmup_steps"),),
            )
    return [
        PhasePlan(
            first_step=first,
            frozen=frozen_names(own, shape),
            learning_rate=learning_rate if phase.learning_rate is None else phase.learning_rate,
            warmup_steps=phase.warmup_steps,
        )
        for first, phase, own in zip(firsts, phases, trained, strict=True)
    ]


def _first_step(phase: PhaseSection, num_steps: int, epoch_steps: float) -> int:
    if phase.from_epoch is not None:
        return math.ceil(phase.from_epoch * epoch_steps - _HALF_A_STEP_AT_MOST)
    if phase.from_fraction is not None:
        return math.ceil(phase.from_fraction * num_steps - _HALF_A_STEP_AT_MOST)
    return phase.from_step or 0


def _start_key(phase: PhaseSection) -> str:
    return next((name for name in STARTS if getattr(phase, name) is not None), "")


def _start_in_words(phase: PhaseSection) -> str:
    name = _start_key(phase)
    value = getattr(phase, name)
    units = {"from_epoch": f"{value:g} epochs", "from_step": f"{value} steps", "from_fraction": f"{value:g} of all steps"}
    return units[name]


def _key(index: int, name: str = "") -> str:
    return f"{UNFREEZE}.{index}.{name}".removesuffix(".")


def _of(index: int) -> str:
    return f"Phase {index + 1} of {UNFREEZE}"


# --- a plan in one of its phases


def phase_at(step: int, phases: Sequence[PhasePlan]) -> int:
    """The number, from 0, of the phase that makes a step, counted from 0; 0 without phases."""
    return max((index for index, phase in enumerate(phases) if phase.first_step <= step), default=0)


def phase_of_state(num_made: int, phases: Sequence[PhasePlan]) -> int:
    """The number of the phase that left the state after so many steps: at a border, the one that ends there."""
    return phase_at(max(0, num_made - 1), phases)


def age(name: str, phases: Sequence[PhasePlan]) -> int:
    """The number of the first phase that trains a parameter.

    Args:
        name: of the parameter, which some phase trains.
    """
    return next((index for index, phase in enumerate(phases) if not _is_in(name, phase.frozen)), 0)


def in_phase(plan: RunPlan, index: int) -> RunPlan:
    """A plan that trains what one of its phases does; the plan itself without phases."""
    if not plan.optimization.phases:
        return plan
    phase, needs = plan.optimization.phases[index], plan.phase_needs[index]
    model = plan.model.model_copy(update={"frozen": phase.frozen, "lowest_layer": needs.lowest_layer})
    return plan.model_copy(update={"model": model, "num_trainable": needs.num_trainable})


def _is_in(name: str, modules: Sequence[str]) -> bool:
    return any(f"{name}.".startswith(f"{module}.") for module in modules)
