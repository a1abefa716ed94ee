"""Suites that are measured while training goes on, as they are planned: when, where, and what that takes. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass

from raytune.config.sections.evaluation import suites_while_training
from raytune.config.sections.run import RunConfig
from raytune.config.sections.while_training import WhileTrainingSection
from raytune.config.words.metric_names import modes_of_suites
from raytune.errors import PlanError
from raytune.plan.calendar import Epoch, Period, in_steps, saves_miss, steps_of_epochs
from raytune.plan.choosing.fitting import Fit
from raytune.plan.choosing.setting import Setting
from raytune.plan.choosing.suites import cache_bytes
from raytune.plan.costs.cost import STORAGE_BYTES_PER_S
from raytune.plan.costs.workload import BYTES
from raytune.plan.defaults import Choice
from raytune.plan.facts.machine import USABLE_SHARE, Machine
from raytune.plan.run_plan import MOMENTS, ClusterPlan, EvaluationPlan, MeasuredWhere, RunPlan, WhileTrainingPlan
from raytune.units import format_bytes, format_seconds

_KEY = "evaluation.while_training"
MOST_EXPORTS = 3
"""That lie in the run folder at once: the one that is measured, the newest, and one that is being written."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """What is measured, if anything, and why so."""

    plan: WhileTrainingPlan | None = None
    reasons: tuple[str, ...] = ()


def while_training_plan(setting: Setting, fit: Fit, cluster: ClusterPlan, evaluation: EvaluationPlan, epoch: Epoch) -> Chosen:
    """The suites that a config wants measured while training goes on.

    Args:
        evaluation: of validation rows, and at the end.

    Raises:
        PlanError: if it has no room.
    """
    config, section = setting.config, setting.config.evaluation.while_training
    if section is None:
        return Chosen()
    every_steps = _period_of(section, evaluation.every_steps, epoch)
    where, num_gpus, why = _place_of(section, setting.machine, cluster, fit.batch.workers)
    names = [suite.title for suite in suites_while_training(config.evaluation).values()]
    plan = WhileTrainingPlan(
        every_steps=every_steps.value,
        at_saves=ranks_checkpoints(config) and saves_miss(config.checkpoint, every_steps.value, epoch),
        at_start=section.at_start,
        suites=tuple(suite for suite in evaluation.suites if suite.name in names),
        where=where,
        num_cpus=section.num_cpus,
        num_gpus=num_gpus,
        wait_s=section.wait_at_end,
        export_bytes=_export_bytes(setting),
    )
    if where == "between_steps" and setting.device == "cuda":
        _check_room(config, setting, fit)
    return Chosen(plan, tuple(reason for reason in (every_steps.reason, why) if reason))


def _period_of(section: WhileTrainingSection, evaluate_every: Period, epoch: Epoch) -> Choice[Period]:
    if section.every_epochs is not None:
        return steps_of_epochs(_KEY, section.every_epochs, epoch)
    if section.every_steps == "auto":
        return Choice(evaluate_every, f"{_KEY}.every_steps is {in_steps(evaluate_every)}: as evaluation.every_steps.")
    return Choice(section.every_steps)


def _place_of(
    section: WhileTrainingSection, machine: Machine, cluster: ClusterPlan, workers: int
) -> tuple[MeasuredWhere, int, str]:
    """Where suites are measured, on how many GPUs, and why there."""
    num_gpus = cluster.gpus_per_worker if section.num_gpus == "auto" else section.num_gpus
    if section.where != "auto":
        return section.where, num_gpus, ""
    # On CPUs workers compute on more of them than Ray is asked for.
    used = max(cluster.cpus_per_worker, cluster.threads_per_worker) if cluster.device == "cpu" else cluster.cpus_per_worker
    left = _Left(machine, cluster, workers, used)
    wanted = _resources(section.num_cpus, num_gpus)
    if left.holds(section.num_cpus, num_gpus):
        return "spare", num_gpus, f"{_KEY}.where is spare: {left}, and measuring takes {wanted}."
    more = "cluster.threads_per_worker" if cluster.device == "cpu" else "cluster.workers"
    return "between_steps", 0, f"{_KEY}.where is between_steps: {left}, and measuring takes {wanted}. A lower {more} leaves more."


class _Left:
    """CPUs and GPUs of the cluster that no worker has."""

    def __init__(self, machine: Machine, cluster: ClusterPlan, workers: int, cpus_per_worker: float) -> None:
        self._workers = workers
        self._cpus = max(0, int(machine.num_cpus - workers * cpus_per_worker))
        self._gpus = max(0, machine.num_gpus - workers * cluster.gpus_per_worker)

    def holds(self, num_cpus: int, num_gpus: int) -> bool:
        return self._cpus >= num_cpus and self._gpus >= num_gpus

    def __str__(self) -> str:
        workers = f"{self._workers} workers leave" if self._workers > 1 else "the worker leaves"
        return f"{workers} {_resources(self._cpus, self._gpus) or 'nothing'} of what is there"


def _resources(num_cpus: int, num_gpus: int) -> str:
    counts = {"CPU": num_cpus, "GPU": num_gpus}
    return " and ".join(f"{count} {name}{'s' * (count != 1)}" for name, count in counts.items() if count)


def _check_room(config: RunConfig, setting: Setting, fit: Fit) -> None:
    """Refuse to measure between steps where a GPU has no room for a whole model in 16 bits beside the one in training, and for
    the keys and values of what it writes. Activations are gone by then."""
    shape, memory = setting.shape, setting.machine.gpu_memory_bytes
    resident = sum(part.num_bytes for part in fit.memory if part.place == "device" and part.moments == MOMENTS)
    whole = 2 * shape.num_parameters
    cache = max(cache_bytes(suite, shape) for suite in suites_while_training(config.evaluation).values())
    if memory is not None and resident + whole + cache > USABLE_SHARE * memory:
        raise PlanError(
            f"{_KEY} measures between steps, which takes {format_bytes(whole)} for a whole model and {format_bytes(cache)} for "
            f"keys and values beside the {format_bytes(resident)} of the one in training, but of a GPU's memory "
            f"{format_bytes(int(USABLE_SHARE * memory))} can be used. Leave a GPU to it (a lower cluster.workers, and where: "
            f"spare), or leave {_KEY} out: the same suites are measured at the end.",
            keys=(_KEY, f"{_KEY}.where"),
        )


def _export_bytes(setting: Setting) -> int:
    """Size of the model as it is saved: whole in the run's precision, or what an adapter has in fp32."""
    if setting.trained.is_base:
        return BYTES[setting.precision] * setting.shape.num_parameters
    return 4 * setting.trained.num_trainable


def ranks_checkpoints(config: RunConfig) -> bool:
    """Whether checkpoints are ranked by what a suite measures."""
    return config.checkpoint.metric in modes_of_suites(config)


def room_for_exports(plan: RunPlan) -> int:
    """Bytes that exports take on the disk, at most."""
    while_training = plan.evaluation.while_training
    if while_training is None:
        return 0
    return (MOST_EXPORTS if while_training.where == "spare" else 1) * while_training.export_bytes


def while_training_in_words(plan: RunPlan) -> str:
    """What is measured while training goes on, for the table of a plan; empty without."""
    measured = plan.evaluation.while_training
    if measured is None:
        return ""
    at_saves = f" and every {in_steps(plan.checkpoint.every_steps)}" if measured.at_saves else ""
    at_start = " and before the first" if measured.at_start else ""
    names = ", ".join(suite.name for suite in measured.suites)
    size = f"{format_bytes(measured.export_bytes)}, {format_seconds(measured.export_bytes / STORAGE_BYTES_PER_S)} at 1 GB/s"
    whole = format_bytes(BYTES[plan.model.compute_dtype] * plan.num_parameters)
    if measured.where == "spare":
        on = f"{measured.num_cpus} CPU{'s' * (measured.num_cpus != 1)}" + f" and {measured.num_gpus} GPU" * bool(
            measured.num_gpus
        )
        how = (
            f"by an actor on {on} beside the workers (the whole model there: {whole}), from exports of the weights, for which "
            f"training waits ({size} each; up to {MOST_EXPORTS} at once)"
        )
    else:
        how = (
            f"by the workers between steps, for which training waits: each loads the saved model ({whole}) beside the one in "
            f"training, and has a share of the rows (files {size})"
        )
    return f"{names}: every {in_steps(measured.every_steps)}{at_saves} steps, after the last{at_start}; {how}"


def while_training_notes(config: RunConfig, plan: RunPlan, machine: Machine) -> Iterator[str]:
    """What a reader of the plan may not expect of it."""
    measured = plan.evaluation.while_training
    if measured is None or measured.where != "spare":
        return
    left = _Left(machine, plan.cluster, plan.batch.workers, plan.cluster.cpus_per_worker)
    if not left.holds(measured.num_cpus, measured.num_gpus):
        yield (
            f"{_KEY}.where is spare, but {left}: nothing is measured while training goes on, unless the cluster grows by "
            f"{_resources(measured.num_cpus, measured.num_gpus)}."
        )
    if ranks_checkpoints(config):
        yield (
            f"Checkpoints are ranked by {plan.checkpoint.metric}, which is known later than they are saved, and never of steps "
            f"that the actor leaves out: what checkpoint.keep_last does not keep until then is not the best. After its last step "
            f"the run waits for what is being measured, {format_seconds(measured.wait_s)} at most ({_KEY}.wait_at_end)."
        )
