"""Phases of a run, on every rank: the engine is made anew where one begins, around the same model."""

from dataclasses import dataclass

from raytune.model.parts.freezing import freeze_only, recompute_from
from raytune.plan.run_plan import RunPlan
from raytune.plan.strategies.phases import in_phase, phase_at, phase_of_state
from raytune.training.engines.engine import Engine
from raytune.training.engines.optimizer import build_optimizer


@dataclass(slots=True)
class Phases:
    """The phase that an engine is in, and the way into the next one. Without phases nothing ever happens."""

    plan: RunPlan
    """Of the whole run."""
    engine: Engine
    """As it was started: in the first phase."""
    index: int = 0

    def reach_state(self, num_made: int) -> None:
        """Have the engine ready to load what was left after so many steps. Every rank calls it."""
        self._reach(phase_of_state(num_made, self.plan.optimization.phases))

    def reach_step(self, step: int) -> None:
        """Have the engine ready to make a step, counted from 0. Every rank calls it, between steps."""
        self._reach(phase_at(step, self.plan.optimization.phases))

    def _reach(self, index: int) -> None:
        assert index >= self.index, "weights that were trained since then are not those of the base any more"
        if index == self.index:
            return
        self.index = index
        plan, model = in_phase(self.plan, index), self.engine.model
        freeze_only(model, plan.model.frozen)
        if plan.model.gradient_checkpointing:
            recompute_from(model, plan.model.lowest_layer)
        self.engine.train_more(build_optimizer(model, plan.optimization, self.engine.device), plan)
