"""`SweepPlan`: everything about a sweep that is resolved before its first trial starts. Pure: values in, a value out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from raytune.config.sections.run import RunConfig
from raytune.config.sections.sweep import AshaStopping, HyperbandStopping, NoStopping, SweepSection
from raytune.errors import UserError
from raytune.plan.data.data_report import DataReport
from raytune.plan.facts.machine import Machine
from raytune.plan.run_plan import RunPlan
from raytune.sweeps.cost import ExpectedCost, expected_cost
from raytune.sweeps.halving import Halving, Mode
from raytune.sweeps.rungs import rungs_of

DEFAULT_RUNGS = 3
"""Where `grace` is automatic, this many comparisons lie before the end of a trial."""
DEFAULT_FACTOR = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlan:
    """How trials are compared, and how many run at once."""

    name: str
    num_trials: int
    metric: str
    mode: Mode
    stopping: str
    unit: str
    """Of training: "steps" or "tokens"."""
    grace: float
    """A round of training, in units."""
    reduction_factor: float
    budget: float
    """Full training of the longest trial, in rounds."""
    rungs: tuple[float, ...]
    """After how many rounds trials are compared."""
    slots: int
    """Trials that run at once."""
    workers: int
    """Of a trial."""
    cost: ExpectedCost
    """Over all trials. Rules other than halving are not predicted: their worst case is the full grid."""
    data_reports: tuple[DataReport, ...] = ()
    """What became of the rows; several where trials read them differently."""
    notes: tuple[str, ...] = ()
    """What is to be noted of their models."""

    @property
    def halving(self) -> Halving:
        return Halving(rungs=self.rungs, reduction_factor=self.reduction_factor, mode=self.mode)

    @property
    def comparison(self) -> dict[str, object]:
        """What must not change while trials are compared; JSON values."""
        return {"unit": self.unit, "grace": self.grace, "rungs": list(self.rungs), "budget": self.budget}

    @property
    def waits_for_others(self) -> bool:
        """Whether trials wait at rungs. Hyperband fills its groups with trials that have not started yet; with other rules a
        trial is drawn when there is room for it."""
        return self.stopping == "hyperband"

    def rung_at(self, amount: float) -> int | None:
        """Index of the last rung at or below an amount."""
        passed = sum(rung <= amount for rung in self.rungs)
        return passed - 1 if passed else None

    def amount_at(self, plan: RunPlan, step: int) -> float:
        """Rounds of training that a trial has had after a step."""
        # Rounded, so that the step of a rung is at the rung and not a rounding error below it.
        return round(step * units_per_step(plan, self.unit) / self.grace, 9)

    def rung_steps(self, plan: RunPlan) -> tuple[int, ...]:
        """Steps of a trial after which it is compared with others: the first at or behind each rung."""
        per_step = units_per_step(plan, self.unit) / self.grace
        steps = {math.ceil(round(rung / per_step, 9)) for rung in self.rungs}
        return tuple(sorted(step for step in steps if step < plan.optimization.num_steps))


def plan_sweep(section: SweepSection, name: str, num_trials: int, plans: Sequence[RunPlan], slots: int) -> SweepPlan:
    """Resolve the stopping rule against what the trials are going to do.

    Args:
        plans: of all trials, or of the corners of the space where trials are not known yet.

    Raises:
        UserError: if the first comparison would come after the end of every trial.
    """
    stopping = section.stopping
    unit = "steps" if isinstance(stopping, NoStopping) else stopping.unit
    factor = float(stopping.reduction_factor) if isinstance(stopping, AshaStopping | HyperbandStopping) else DEFAULT_FACTOR
    budget = max(plan.optimization.num_steps * units_per_step(plan, unit) for plan in plans)
    if isinstance(stopping, NoStopping) or stopping.grace == "auto":
        grace = max(units_per_step(plans[0], unit), budget / factor**DEFAULT_RUNGS)
        grace = float(math.ceil(grace)) if unit == "steps" else grace
    else:
        grace = float(stopping.grace)
    if grace >= budget and not isinstance(stopping, NoStopping):
        raise UserError(
            f"sweep.stopping.grace is {grace:g} {unit}, but trials end after {budget:g}: none would ever be stopped. Set it to "
            f"less, train for longer, or set sweep.stopping.method to none."
        )
    budget = round(budget / grace, 9)
    rungs = rungs_of(stopping.method, budget, factor)
    halving = Halving(rungs=rungs if stopping.method == "asha" else (), reduction_factor=factor, mode=section.mode)
    return SweepPlan(
        name=name,
        num_trials=num_trials,
        metric=section.metric,
        mode=section.mode,
        stopping=stopping.method,
        unit=unit,
        grace=grace,
        reduction_factor=factor,
        budget=budget,
        rungs=rungs,
        slots=slots,
        workers=max(plan.batch.workers for plan in plans),
        cost=expected_cost(halving, num_trials, budget),
        data_reports=_distinct([plan.data_report for plan in plans if plan.data_report]),
        notes=tuple(dict.fromkeys(note for plan in plans for note in plan.notes)),
    )


def _distinct(reports: Sequence[DataReport]) -> tuple[DataReport, ...]:
    return tuple(report for index, report in enumerate(reports) if report not in reports[:index])


def units_per_step(plan: RunPlan, unit: str) -> float:
    """Training per optimizer step: one step, or the tokens of a mean global batch."""
    store = plan.data.train
    return 1.0 if unit == "steps" else store.num_tokens / store.num_rows * plan.batch.global_batch_size


def num_slots(machine: Machine, run: RunConfig, workers: int) -> int:
    """Trials that the cluster holds at once, at least one.

    Drivers of trials take no CPU that a worker could wait for: they are placed by a resource of the head node.
    """
    wanted = run.sweep.max_concurrent if run.sweep else "auto"
    uses_gpus = machine.num_gpus > 0 and run.cluster.gpus_per_worker != 0
    room = [machine.num_gpus // workers] if uses_gpus else []
    if run.cluster.cpus_per_worker:
        room.append(int(machine.num_cpus / (workers * run.cluster.cpus_per_worker)))
    most = max(1, min(room, default=1))
    return most if wanted == "auto" else min(most, wanted)


def share_of(machine: Machine, slots: int) -> Machine:
    """What one of `slots` trials that run side by side may count on: its plan must not fill the memory of the others."""
    return replace(
        machine,
        num_cpus=max(1, machine.num_cpus // slots),
        num_gpus=machine.num_gpus // slots,
        host_memory_bytes=machine.host_memory_bytes // max(1, math.ceil(slots / machine.num_nodes)),
    )
