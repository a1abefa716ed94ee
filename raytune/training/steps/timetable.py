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
    measure_every: Period | None = None
    """Of suites; None: they are measured at the end only."""
    measure_at_saves: bool = False
    """As `evaluate_at_saves`."""

    @classmethod
    def of(cls, plan: RunPlan) -> "Timetable":
        while_training = plan.evaluation.while_training
        return cls(
            num_steps=plan.optimization.num_steps,
            log_every=plan.logging_steps,
            evaluate_every=plan.evaluation.every_steps if plan.data.validation else None,
            evaluate_at_saves=plan.evaluation.at_saves,
            measure_every=while_training and while_training.every_steps,
            measure_at_saves=bool(while_training and while_training.at_saves),
            save_every=plan.checkpoint.every_steps,
            rungs=plan.rungs,
        )

    def logs_after(self, step: int) -> bool:
        return step % self.log_every == 0 or step == self.num_steps

    def evaluates_after(self, step: int) -> bool:
        return self._looks_after(step, self.evaluate_every, self.evaluate_at_saves)

    def measures_after(self, step: int) -> bool:
        """Whether suites are measured, while training goes on."""
        return self._looks_after(step, self.measure_every, self.measure_at_saves)

    def _looks_after(self, step: int, every_steps: Period | None, at_saves: bool) -> bool:
        if every_steps is None:
            return False
        at_save = at_saves and is_due(step, self.save_every)
        return at_save or is_due(step, every_steps) or step == self.num_steps or self.is_rung(step)

    def saves_after(self, step: int) -> bool:
        return is_due(step, self.save_every) or step == self.num_steps or self.is_rung(step)

    def is_rung(self, step: int) -> bool:
        return step in self.rungs
