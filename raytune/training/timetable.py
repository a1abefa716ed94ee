"""What is due after which step. Pure: the whole policy of a run's calendar, testable without a run."""

from dataclasses import dataclass

from raytune.plan.calendar import Period, is_due
from raytune.plan.run_plan import RunPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Timetable:
    """Steps count from 1: "after step n" means after n optimizer updates."""

    num_steps: int
    log_every: int
    evaluate_every: Period | None
    evaluate_at_saves: bool
    """Where a save is due; those on request are not evaluated, since clocks would decide how much is measured."""
    save_every: Period
    rungs: tuple[int, ...]
    """Steps after which a sweep judges its trial: evaluated, and saved first."""

    @classmethod
    def of(cls, plan: RunPlan) -> "Timetable":
        return cls(
            num_steps=plan.optimization.num_steps,
            log_every=plan.logging_steps,
            evaluate_every=plan.evaluation.every_steps if plan.data.validation else None,
            evaluate_at_saves=plan.evaluation.at_saves,
            save_every=plan.checkpoint.every_steps,
            rungs=plan.rungs,
        )

    def logs_after(self, step: int) -> bool:
        return step % self.log_every == 0 or step == self.num_steps

    def evaluates_after(self, step: int) -> bool:
        if self.evaluate_every is None:
            return False
        at_save = self.evaluate_at_saves and is_due(step, self.save_every)
        return at_save or is_due(step, self.evaluate_every) or step == self.num_steps or self.is_rung(step)

    def saves_after(self, step: int) -> bool:
        return is_due(step, self.save_every) or step == self.num_steps or self.is_rung(step)

    def is_rung(self, step: int) -> bool:
        return step in self.rungs
