"""Steps, rates and what draws weights: `optimization` of a plan. Pure."""

import math

from raytune.config.sections.run import RunConfig
from raytune.config.sections.training import TrainingSection
from raytune.errors import UserError
from raytune.plan.choosing.reasons import Reasons
from raytune.plan.choosing.setting import Setting
from raytune.plan.defaults import default_epochs, default_learning_rate, default_warmup_ratio, default_weight_decay
from raytune.plan.facts.data_facts import DataFacts
from raytune.plan.methods import method_of
from raytune.plan.rates.optimizers import schedule_of
from raytune.plan.run_plan import OptimizationPlan
from raytune.plan.strategies.averaging import averaging_of
from raytune.plan.strategies.penalty import ewc_documents, ewc_strength, l2_sp_strength, penalty_keys
from raytune.plan.strategies.phases import has_own_rates, phase_plans
from raytune.plan.strategies.update_groups import update_groups


def rows_in_epochs(config: RunConfig, data: DataFacts, reasons: Reasons) -> int | None:
    """Rows over all epochs; None when the number of steps is given instead."""
    training = config.training
    if training.max_steps is not None:
        return None
    epochs = training.num_train_epochs
    if epochs == "auto":
        method, num_targets = config.adapter.method, data.train.num_targets
        epochs = reasons.taken(default_epochs(method, method_of(config.adapter).epochs(num_targets), num_targets))
    return math.ceil(epochs * data.train.num_rows)


def optimization_plan(
    setting: Setting, data: DataFacts, num_steps: int, num_rows: int, epoch_steps: float, reasons: Reasons
) -> OptimizationPlan:
    """Resolve rates, schedule and weight decay of so many steps.

    Args:
        epoch_steps: steps of one pass over the data, maybe broken.

    Raises:
        UserError: if a warm-up takes all steps.
    """
    training, trained, num_parameters = setting.config.training, setting.trained, setting.shape.num_parameters
    name, method = setting.config.adapter.method, method_of(setting.adapter)
    rate, phases = training.learning_rate, setting.config.strategy.unfreeze
    if has_own_rates(setting.config):
        rate = phases[0].learning_rate or 0.0
    if rate == "auto":
        rate = reasons.taken(default_learning_rate(name, method.learning_rate(num_parameters), num_parameters))
    decay = training.weight_decay
    if decay == "auto" and (keys := penalty_keys(setting.config)):
        decay = 0.0
        draw = f"{' and '.join(keys)} draw{'s' * (len(keys) == 1)}"
        reasons.append(f"training.weight_decay is 0: {draw} weights to the base, in place of drawing them to 0.")
    elif decay == "auto":
        decay = reasons.taken(default_weight_decay(name, method.weight_decay))
    reasons += method.reasons(setting.adapter, setting.shape)
    return OptimizationPlan(
        num_steps=num_steps,
        num_rows=num_rows,
        optimizer=training.optimizer,
        learning_rate=rate,
        lora_plus_ratio=trained.way_back_rate_scale,
        lora_plus_embedding_rate=trained.embedding_rate,
        update_groups=update_groups(trained),
        phases=phase_plans(setting.config, setting.phases, setting.shape, rate, num_steps=num_steps, epoch_steps=epoch_steps),
        schedule=reasons.taken(schedule_of(training)),
        warmup_steps=_warmup_steps(training, num_steps, reasons),
        min_lr_ratio=training.min_lr_ratio,
        decay_ratio=training.decay_ratio,
        polynomial_power=training.polynomial_power,
        num_cycles=training.num_cycles,
        weight_decay=decay,
        beta1=training.adam_beta1,
        beta2=training.adam_beta2,
        epsilon=training.adam_epsilon,
        max_grad_norm=training.max_grad_norm,
        objective=setting.objective,
        l2_sp_strength=l2_sp_strength(setting.config),
        ewc_strength=ewc_strength(setting.config),
        ewc_documents=ewc_documents(setting.config, data),
        averaging=reasons.taken(averaging_of(training.averaging, num_steps)),
    )


def _warmup_steps(training: TrainingSection, num_steps: int, reasons: Reasons) -> int:
    if training.warmup_steps is not None:
        if training.warmup_steps > num_steps:
            raise UserError(
                f"training.warmup_steps is {training.warmup_steps}, but the run has {num_steps} steps. Set it to less, or use "
                f"training.warmup_ratio."
            )
        if training.warmup_steps == num_steps == 1:
            raise UserError(
                "training.warmup_steps is 1, but the run has one step, and a warm-up begins at rate 0: nothing would be learned. "
                "Set it to 0, or train for more steps (training.max_steps, training.num_train_epochs)."
            )
        return training.warmup_steps
    ratio = training.warmup_ratio
    if ratio == "auto":
        choice = default_warmup_ratio(num_steps)
        warmup_steps = math.ceil(choice.value * num_steps)
        if warmup_steps > 1:
            reasons.taken(choice)
            return warmup_steps
        reasons.append(
            f"The warm-up has no step: training.warmup_ratio is {choice.value:g} of {num_steps}, which is one, at rate 0."
        )
        return 0
    if num_steps == 1 and ratio:
        # The first step of a warm-up has rate 0: the only step of a run must not be it.
        reasons.append(f"The warm-up has no step: training.warmup_ratio is {ratio:g}, but the only step would have rate 0.")
        return 0
    return math.ceil(ratio * num_steps)
