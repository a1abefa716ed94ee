"""The learning rate as a function of the step number, and of nothing else: a resumed run needs no scheduler state.

Values are those of transformers' schedulers: step 0 of a warm-up has rate 0, and step `num_steps` would be the end.
"""

import math
from collections.abc import Callable

from raytune.config.sections.training import Schedule
from raytune.plan.run_plan import OptimizationPlan
from raytune.plan.strategies.phases import phase_at


def learning_rate(step: int, plan: OptimizationPlan) -> float:
    """Learning rate of an optimizer step, counted from 0.

    A phase has a peak of its own, which the schedule of the whole run shapes, and may have a warm-up of its own.
    """
    if not plan.phases:
        return plan.learning_rate * _share_of_peak(step, plan)
    phase = plan.phases[phase_at(step, plan.phases)]
    num_made = step - phase.first_step
    warmed_up = num_made / phase.warmup_steps if num_made < phase.warmup_steps else 1.0
    return phase.learning_rate * warmed_up * _share_of_peak(step, plan)


def _share_of_peak(step: int, plan: OptimizationPlan) -> float:
    if step < plan.warmup_steps:
        return step / plan.warmup_steps
    progress = min(1.0, (step - plan.warmup_steps) / max(1, plan.num_steps - plan.warmup_steps))
    return plan.min_lr_ratio + (1 - plan.min_lr_ratio) * SHAPES[plan.schedule](progress, plan)


def _linear(progress: float, plan: OptimizationPlan) -> float:
    return 1 - progress


def _cosine(progress: float, plan: OptimizationPlan) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _constant(progress: float, plan: OptimizationPlan) -> float:
    return 1.0


def _wsd(progress: float, plan: OptimizationPlan) -> float:
    """Warm-up, stable, decay (Hu et al. 2024): constant, then a straight line down over the last `decay_ratio` of all steps."""
    num_steps = plan.num_steps - plan.warmup_steps
    num_decay_steps = min(round(plan.decay_ratio * plan.num_steps), num_steps)
    num_steps_left = round((1 - progress) * num_steps)
    return min(1.0, num_steps_left / max(1, num_decay_steps))


def _polynomial(progress: float, plan: OptimizationPlan) -> float:
    return (1 - progress) ** plan.polynomial_power


def _cosine_with_restarts(progress: float, plan: OptimizationPlan) -> float:
    return 0.0 if progress >= 1 else _cosine(plan.num_cycles * progress % 1.0, plan)


SHAPES: dict[Schedule, Callable[[float, OptimizationPlan], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "constant": _constant,
    "wsd": _wsd,
    "polynomial": _polynomial,
    "cosine_with_restarts": _cosine_with_restarts,
}
"""From the progress after the warm-up, 0 to 1, to the share of the way from the minimum to the peak."""
