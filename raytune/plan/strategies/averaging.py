"""The average of a run's weights as it is planned: which steps it is over, refused where it means nothing, put into words. Pure.

Both kinds are one running average of w_1, w_2, ... w_n, the weights after the steps that count: the n-th is drawn to w_n by

    share(n) = (1 - decay) / (1 - decay^n), which is 1 / n for a decay of 1

so that w_i has a weight in proportion to decay^(n - i), and all weights add up to 1. Since n follows from the step, a run that
resumes or is rolled back needs nothing but the average itself. A step whose update was skipped counts with the weights that it
left as they were.
"""

from collections.abc import Iterator

from raytune.config.sections.averaging import AveragingSection
from raytune.config.sections.run import RunConfig
from raytune.errors import PlanError, UserError
from raytune.plan.defaults import Choice
from raytune.plan.model.trained import Trained
from raytune.plan.run_plan import AveragingPlan, RunPlan

_KEY = "training.averaging"
PART_OF_RUN = 10
"""Of how many parts of a run the average is over one, unless a decay is given."""
LEAST_DECAY = 0.5
LAST_QUARTER = 4


def share_after(step: int, averaging: AveragingPlan | None) -> float | None:
    """How far the average is drawn to the weights after a step, counted from 1; None: they do not count. 1 for the first."""
    if averaging is None or step < averaging.first_step or (step - averaging.first_step) % averaging.every_steps:
        return None
    number = (step - averaging.first_step) // averaging.every_steps + 1
    if averaging.decay == 1:
        return 1 / number
    return (1 - averaging.decay) / (1 - averaging.decay**number)


def check_averaging(config: RunConfig, trained: Trained) -> None:
    """Refuse to average what has no average, or where weights cannot be reached.

    Raises:
        UserError: (or PlanError) with what to set instead.
    """
    if config.training.averaging is None:
        return
    if trained.num_followed:
        raise UserError(
            f"{_KEY} averages numbers, and adapter.method {config.adapter.method} sets ranks to 0 as it trains: an average over "
            f"the steps around that is no rank of either. Set adapter.method to lora, or leave {_KEY} out.",
            keys=(_KEY, "adapter.method"),
        )
    zero = config.training.zero
    for name in ("offload_optimizer", "offload_parameters"):
        if getattr(zero, name) == "nvme":
            raise PlanError(
                f"{_KEY} reads the fp32 weights after steps, and with training.zero.{name} nvme they lie in files of DeepSpeed. "
                f"Set training.zero.{name} to cpu or none, or leave {_KEY} out.",
                keys=(_KEY, f"training.zero.{name}"),
            )
    early, overfitting = config.training.early_stopping, config.training.overfitting
    if config.training.averaging.kind == "last" and (early or (overfitting and overfitting.policy == "stop")):
        rule = "early_stopping" if early else "overfitting.policy stop"
        raise UserError(
            f"{_KEY}.kind last averages the last steps of the schedule, which training.{rule} may never reach. Set {_KEY}.kind "
            f"to ema, which is an average wherever the run ends, or leave one of the two out.",
            keys=(_KEY, f"training.{rule.partition('.')[0]}"),
        )


def averaging_of(section: AveragingSection | None, num_steps: int) -> Choice[AveragingPlan | None]:
    """The average that a config asks for, over a run of so many steps.

    Raises:
        UserError: if no weights would be averaged, or those of one step only.
    """
    if section is None:
        return Choice(None)
    return (_last if section.kind == "last" else _ema)(section, num_steps)


def _ema(section: AveragingSection, num_steps: int) -> Choice[AveragingPlan | None]:
    every, reason = section.every_steps, ""
    if num_steps < 2 * every:
        raise UserError(
            f"{_KEY}.every_steps is {every}, but the run has {num_steps} step{'s' * (num_steps != 1)}: there are no two weights "
            f"to be averaged. Set it to {num_steps // 2} or less, train for longer (training.num_train_epochs, "
            f"training.max_steps), or leave {_KEY} out."
            if num_steps > 1
            else f"{_KEY} has nothing to average: the run has one step. Train for longer (training.num_train_epochs, "
            f"training.max_steps), or leave {_KEY} out.",
            keys=(_KEY,),
        )
    decay = section.decay
    if decay == "auto":
        decay = max(LEAST_DECAY, round(1 - float(f"{PART_OF_RUN * every / num_steps:.2g}"), 12))
        reason = f"{_KEY}.decay is {decay:g}: about {_window(decay, every):.3g} of {num_steps} steps are in the average."
    return Choice(AveragingPlan(decay=decay, first_step=every, every_steps=every), reason)


def _last(section: AveragingSection, num_steps: int) -> Choice[AveragingPlan | None]:
    every, last, reason = section.every_steps, section.last_steps, ""
    if last == "auto":
        last = max(2, num_steps // LAST_QUARTER)
        reason = f"{_KEY}.last_steps is {last}: a quarter of {num_steps}."
    if last > num_steps:
        raise UserError(
            f"{_KEY}.last_steps is {last}, but the run has {num_steps} step{'s' * (num_steps != 1)}. Set it to {num_steps} or "
            f"less, or train for longer (training.num_train_epochs, training.max_steps).",
            keys=(_KEY, f"{_KEY}.last_steps"),
        )
    if every >= last:
        raise UserError(
            f"{_KEY} has weights of one step only: the last {last} step{'s' * (last != 1)} (last_steps), of which one in {every} "
            f"counts (every_steps). Set {_KEY}.last_steps to {every + 1} or more, or {_KEY}.every_steps to "
            f"{max(1, last // 2)} or less.",
            keys=(_KEY,),
        )
    first = num_steps - (last - 1) // every * every
    return Choice(AveragingPlan(decay=1.0, first_step=first, every_steps=every), reason)


def averaging_in_words(plan: RunPlan) -> str:
    """What is averaged, for the table of a plan; empty without."""
    averaging = plan.optimization.averaging
    if averaging is None:
        return ""
    every = f", every {averaging.every_steps} steps" if averaging.every_steps > 1 else ""
    if averaging.decay == 1:
        over = f"mean of the weights after steps {averaging.first_step} to {plan.optimization.num_steps}{every}"
    else:
        over = (
            f"moving average of the weights, decay {averaging.decay:g}{every}: about the last {_last_steps(averaging):.3g} steps"
        )
    return f"{over}, in fp32; it is what is validated and saved"


def averaging_notes(plan: RunPlan) -> Iterator[str]:
    """What a reader of the plan may not expect of it."""
    averaging, num_steps = plan.optimization.averaging, plan.optimization.num_steps
    if averaging is None:
        return
    measures = "validation/... and the choice of the best checkpoint are" if plan.data.validation else "it is"
    yield (
        f"The model of the run is the average of training.averaging: {measures} of the average, train/... of the weights that "
        f"are trained on, which checkpoints keep as well."
    )
    if averaging.decay == 1 and averaging.first_step > 1:
        best = f", among which the best by {plan.checkpoint.metric} becomes the model" if plan.data.validation else ""
        yield (
            f"Until step {averaging.first_step}, where the average of training.averaging begins, the model of a checkpoint is "
            f"the weights as they are{best}."
        )
    if averaging.decay < 1 and _last_steps(averaging) > num_steps / 2:
        yield (
            f"training.averaging.decay {averaging.decay:g} averages about the last {_last_steps(averaging):.3g} steps, and the "
            f"run has {num_steps}: weights of its beginning count much. Left to auto, it averages about a tenth of the run."
        )


def _last_steps(averaging: AveragingPlan) -> float:
    return _window(averaging.decay, averaging.every_steps)


def _window(decay: float, every_steps: int) -> float:
    """Steps in which weights come to count 1 / e as much."""
    return every_steps / (1 - decay)
