"""Rules that may end a run early, as they are planned: refused where nothing feeds them, and put into words. Pure."""

from collections.abc import Iterator

from raytune.config.sections.row_sources import replayed_sources
from raytune.config.sections.run import RunConfig
from raytune.config.sections.training import SCHEDULE_FREE
from raytune.config.words.metric_names import is_of_validation
from raytune.errors import PlanError, UserError
from raytune.plan.calendar import divides, in_steps
from raytune.plan.run_plan import CheckpointPlan, EvaluationPlan, OptimizationPlan, StoppingPlan
from raytune.plan.strategies.distillation import distillation_of

_GAP = "training.overfitting.max_gap"


def check_gap(config: RunConfig) -> None:
    """Refuse a gap between two losses that are not of the same loss, rows and weights, and so do not tell overfitting.

    Raises:
        PlanError: with what to set instead.
    """
    overfitting = config.training.overfitting
    if overfitting is None or overfitting.max_gap is None:
        return
    for key, why, instead in (*_other_loss(config), *_other_rows(config), *_other_weights(config)):
        raise PlanError(
            f"{_GAP} compares the validation loss, {why}. Leave max_gap out: a validation loss that rises is told without "
            f"it{instead}.",
            keys=(_GAP, key),
        )


Difference = tuple[str, str, str]
"""The key that makes the losses differ, how they do, and what would be another way out."""


def _other_loss(config: RunConfig) -> Iterator[Difference]:
    weights = config.data.token_weights
    others = {
        "strategy.objective": config.strategy.objective is not None,
        "strategy.distillation": distillation_of(config) is not None,
        "data.token_weights": any(weight != 1 for weight in (weights.numbers, weights.code_syntax, *weights.patterns.values())),
    }
    for key in (key for key, is_asked in others.items() if is_asked):
        yield key, f"which is cross-entropy, with the training loss, which with {key} is something else", ""


def _other_rows(config: RunConfig) -> Iterator[Difference]:
    """Rows that are held out count as training counts their sources; those of `data.validation` do not."""
    train = config.data.train
    others = {
        "strategy.replay": ("strategy.replay", bool(replayed_sources(config))),
        "loss_weight of data.train": ("data.train", len({source.loss_weight for source in train}) > 1),
        "proportion of data.train": ("data.train", any(source.proportion is not None for source in train)),
        "passes of data.train": ("data.train", any(source.passes is not None for source in train)),
        "data.mixing.temperature": ("data.mixing.temperature", config.data.mixing.temperature is not None),
    }
    for words, (key, is_asked) in others.items():
        if is_asked and not config.data.holds_out:
            yield (
                key,
                f"which is of the rows of data.validation, with the training loss, in which {words} says what rows count",
                ", or hold rows out by data.validation_fraction, which count as they do in training",
            )


def _other_weights(config: RunConfig) -> Iterator[Difference]:
    training = config.training
    others = {"training.averaging": training.averaging is not None, "training.optimizer": training.optimizer in SCHEDULE_FREE}
    for key in (key for key, is_asked in others.items() if is_asked):
        words = key if key == "training.averaging" else f"{key} {training.optimizer}"
        yield key, f"which is of the average that {words} makes, with the training loss, which is of other weights", ""


def rules_of(config: RunConfig) -> StoppingPlan:
    """The rules as they are written: nothing of them needs resolving."""
    return StoppingPlan(early_stopping=config.training.early_stopping, overfitting=config.training.overfitting)


def stopping_of(config: RunConfig, measured: list[str]) -> StoppingPlan:
    """The rules that a config asks for.

    Args:
        measured: metrics that are measured while training goes on.

    Raises:
        UserError: if no evaluation gives what a rule looks at.
    """
    rules = rules_of(config)
    given = [name for name in ("early_stopping", "overfitting") if getattr(rules, name)]
    has_validation = any(map(is_of_validation, measured))
    if given and not (measured if given == ["early_stopping"] else has_validation):
        raise UserError(
            f"training.{given[-1]} looks at evaluations, but nothing is evaluated: there is neither data.validation nor "
            f"data.validation_fraction. Give one of the two, or leave training.{given[-1]} out."
        )
    if rules.early_stopping and rules.early_stopping.metric not in measured:
        raise UserError(
            f"training.early_stopping.metric is {rules.early_stopping.metric!r}, which no evaluation of this run gives. Set it "
            f"to one of: {', '.join(measured)}."
        )
    return rules


def rules_in_words(rules: StoppingPlan, evaluation: EvaluationPlan) -> str:
    """What ends the run early, or warns, for the table of a plan; empty without rules."""
    words, early, overfitting = [], rules.early_stopping, rules.overfitting
    if early:
        better = ("below" if early.mode == "min" else "above") + " its best"
        by = f" by more than {early.min_delta:g}" if early.min_delta else ""
        steps = f"{in_steps(early.patience * evaluation.every_steps)} steps"
        words.append(f"after {_evaluations(early.patience)} in a row ({steps}) with {early.metric} not {better}{by}")
    if overfitting:
        gap = "" if overfitting.max_gap is None else f", or is more than {overfitting.max_gap:g} above it"
        does = "ends the run" if overfitting.policy == "stop" else "is told"
        words.append(
            f"overfitting {does}: at {_evaluations(overfitting.patience)} in a row the validation loss rises while the training "
            f"loss falls{gap}"
        )
    return "; ".join(words)


def stopping_notes(
    rules: StoppingPlan, evaluation: EvaluationPlan, checkpoint: CheckpointPlan, optimization: OptimizationPlan
) -> Iterator[str]:
    """What a reader of the plan may not expect of the rules."""
    if not rules.are_given:
        return
    num_counted = int(optimization.num_steps / evaluation.every_steps + 1e-9)
    for name, rule in (("early_stopping", rules.early_stopping), ("overfitting", rules.overfitting)):
        if rule and num_counted <= rule.patience:
            yield (
                f"training.{name} cannot come to anything: its patience is {_evaluations(rule.patience)} after a first one, but "
                f"{optimization.num_steps} steps have {num_counted} by evaluation.every_steps {in_steps(evaluation.every_steps)}."
            )
    if not rules.may_end:
        return
    yield (
        "The run may end before its last step. Schedule, time and money are those of all steps. If it ended early, it goes on "
        "when it is asked for again under rules by which it had not ended."
    )
    if optimization.phases:
        yield (
            f"A rule that ends the run in an earlier phase leaves out the later ones: the last phase of strategy.unfreeze begins "
            f"after step {optimization.phases[-1].first_step} of {optimization.num_steps}."
        )
    if not divides(checkpoint.every_steps, evaluation.every_steps):
        yield (
            f"Only what is saved can become the model: every {in_steps(checkpoint.every_steps)} steps, and where a rule ends the "
            f"run. Without checkpoint.every_steps and every_epochs, whatever is evaluated is saved."
        )


def _evaluations(number: int) -> str:
    return f"{number} evaluation{'s' * (number != 1)}"
