"""When a run diverges, and what is done then. What a spike is, `spikes` says.

As with `stopping`, the history is that of metrics.jsonl: an attempt that resumes reads back what was measured until its
checkpoint, and so decides as a run that was never interrupted. Only steps by the period of `training.logging_steps` are looked
at. That a run was rolled back stands there too, in the line that a segment of an attempt begins with, and holds for what follows
whatever the config says by then.
"""

import math
from collections.abc import Sequence
from typing import Self

import torch

from raytune.config.sections.divergence import DivergenceSection
from raytune.errors import TrainingError
from raytune.metrics.history import History
from raytune.metrics.points import RollBack, standing
from raytune.plan.run_plan import RunPlan
from raytune.training.checkpoints.checkpoint import Checkpoints, Report
from raytune.training.engines.engine import Engine
from raytune.training.steps.loop import StepNumbers, StepResult
from raytune.training.steps.spikes import (
    WATCHED,
    Logged,
    Spike,
    highest_ordinary,
    spikes_in_a_row,
    where_it_diverged,
    why_it_diverged,
)
from raytune.training.steps.stopping import Noted

SKIPPED = "train/skipped"


# --- The rules ---------------------------------------------------------------------------------------------------------------


def rate_scale(roll_backs: Sequence[RollBack]) -> float:
    """What rates are multiplied by after these."""
    return math.prod(back.rate_factor for back in roll_backs)


def logged_steps(history: History, log_every: int, last_step: int | None = None) -> list[Logged]:
    """What a run has logged by a step; without one, all of it."""
    return [
        Logged(step=point.step, values={metric: point.values[metric] for metric in WATCHED["both"]})
        for point in history.points
        if point.step % log_every == 0
        and (last_step is None or point.step <= last_step)
        and all(metric in point.values for metric in WATCHED["both"])
    ]


def findings(history: History, rule: DivergenceSection | None, log_every: int) -> tuple[Noted, ...]:
    """What the guard found and did in a run, in words, as it stands in its result."""
    found = [
        Noted(
            step=back.bad_step,
            reason=f"rolled back to step {back.to}; rates from there on are those of the schedule times "
            f"{rate_scale(history.roll_backs[: number + 1]):g}",
        )
        for number, back in enumerate(history.roll_backs)
    ]
    if skipping := [(step, int(number)) for step, number in history.series(SKIPPED) if number]:
        total = sum(number for _, number in skipping)
        updates = f"{total} update{'s were' if total > 1 else ' was'}"
        reason = f"{updates} not made, because the norm of the gradient was a spike"
        found.append(Noted(step=skipping[-1][0], reason=reason))
    if rule and rule.policy == "warn":
        found += where_it_diverged(logged_steps(history, log_every), rule)
    return tuple(found)


# --- In a run ----------------------------------------------------------------------------------------------------------------


class Guard:
    """The guard of a run while it trains, the same on every rank: what rank 0 measured counts. Without a section it only keeps
    the rate where roll backs have brought it.

    Args:
        logged: what was logged before this attempt.
        roll_backs: those of the run so far.
        report: told what is found and done, as `EventLog.write`.
    """

    def __init__(
        self, plan: RunPlan, engine: Engine, report: Report, logged: Sequence[Logged] = (), roll_backs: Sequence[RollBack] = ()
    ) -> None:
        self._rule, self._log_every, self._engine, self._report = plan.divergence, plan.logging_steps, engine, report
        self._skips = plan.skips_spikes
        self._logged, self._roll_backs = list(logged), list(roll_backs)
        self._spiking: list[StepResult] = []
        self._norm_limit = math.inf
        self._bound_norms()

    @classmethod
    def resumed(cls, plan: RunPlan, engine: Engine, report: Report, metrics: str, last_step: int) -> Self:
        """The guard of an attempt that goes on after a step. Every rank calls it.

        Args:
            metrics: the metrics file of the run.
        """
        past: tuple[list[Logged], list[RollBack]] = [], []
        if engine.rank == 0:
            history = History.read(metrics)
            logged = logged_steps(history, plan.logging_steps, last_step) if plan.divergence else []
            past = logged, standing(history.roll_backs, last_step)
        logged, roll_backs = engine.gather_objects(past)[0]
        return cls(plan, engine, report, logged, roll_backs)

    @property
    def rolls_back(self) -> bool:
        return self._rule is not None and self._rule.policy == "roll_back"

    @property
    def rate_scale(self) -> float:
        """What the schedule's rate is multiplied by."""
        return rate_scale(self._roll_backs)

    def norm_limit(self) -> float:
        """Largest norm of a gradient that the next update is made with."""
        return self._norm_limit

    def look(self, result: StepResult, numbers: StepNumbers) -> None:
        """Look at a step that was read. Every rank calls it.

        Raises:
            TrainingError: on every rank, if the run diverges and is not to go on.
        """
        rule = self._rule
        for skipped in numbers.skipped:
            self._report("update_skipped", step=skipped.step, grad_norm=skipped.grad_norm, norm_limit=skipped.norm_limit)
        if rule is None or result.step % self._log_every:
            return
        self._logged.append(Logged(step=result.step, values=self._of_rank_0(numbers)))
        self._bound_norms()
        if self._skips:
            return
        spikes = spikes_in_a_row(self._logged, rule)
        self._spiking = [*self._spiking, result][-rule.patience :] if spikes else []
        if len(spikes) < rule.patience:
            return
        if rule.policy != "warn":
            raise self._diverged(spikes, rule)
        if len(spikes) == rule.patience:
            self._report("divergence", step=result.step, reason=why_it_diverged(spikes[-1], rule))

    def go_back(self, error: TrainingError, checkpoints: Checkpoints) -> RollBack:
        """Have the run where it was before it diverged. Every rank calls it, without holding on to the steps since.

        Raises:
            TrainingError: on every rank, if that has been done too often, or there is no checkpoint from before.
            CheckpointError: as `Checkpoints.go_back`.
        """
        rule, num_before = self._rule, len(self._roll_backs)
        assert rule is not None
        assert error.bad_step is not None
        if num_before >= rule.max_roll_backs:
            raise TrainingError(
                f"{error} The run was rolled back {num_before} time{'s' * (num_before > 1)} before, the last time to step "
                f"{self._roll_backs[-1].to} with {self.rate_scale:g} of the rate: that is training.divergence.max_roll_backs."
            ) from error
        commit = checkpoints.go_back(error.bad_step)
        if commit is None:
            raise TrainingError(
                f"{error} No checkpoint is left from before step {error.bad_step - 1} to roll back to."
            ) from error
        back = RollBack(bad_step=error.bad_step, to=commit.step, rate_factor=rule.rate_factor)
        self._roll_backs.append(back)
        self._logged = [one for one in self._logged if one.step <= back.to]
        self._spiking = []
        self._report("rolled_back", step=back.bad_step, to=back.to, rate_scale=self.rate_scale, reason=str(error))
        return back

    def _bound_norms(self) -> None:
        if self._skips and self._rule:
            norms = [one.values["train/grad_norm"] for one in self._logged[-self._rule.window :]]
            self._norm_limit = highest_ordinary(norms, self._rule)

    def _of_rank_0(self, numbers: StepNumbers) -> dict[str, float]:
        """What is watched; where another rank has rounded otherwise, it does not go a way of its own."""
        own = [numbers.loss, numbers.grad_norm] if self._engine.rank == 0 else [0.0, 0.0]
        shared = self._engine.all_reduce_sum(torch.tensor(own, dtype=torch.float64, device=self._engine.device))
        return dict(zip(WATCHED["both"], shared.tolist(), strict=True))

    def _diverged(self, spikes: Sequence[Spike], rule: DivergenceSection) -> TrainingError:
        """The error that every rank raises."""
        rows = "; ".join(f"step {result.step}, {result.rows_of_ranks(self._engine)}" for result in self._spiking)
        error = TrainingError(
            f"The run diverges: {why_it_diverged(spikes[-1], rule)}. Learning rate {self._spiking[-1].learning_rate:g}. The rows "
            f"were: "
            f"{rows}. Look at these rows, or lower training.learning_rate or training.max_grad_norm."
        )
        # Steps that were not logged may have gone wrong before the one that was.
        error.bad_step = spikes[0].step - self._log_every + 1
        return error
