"""When a run ends before its last step, and when it overfits: rules, as pure functions of what its evaluations have measured.

The history is that of metrics.jsonl: an attempt that resumes reads back what was measured until its checkpoint, steps that are
made again count once, and so it decides as a run that was never interrupted. Only evaluations by the period of
`evaluation.every_steps` are counted: those at the rungs of a sweep, at saves and after the last step depend on other settings,
and a trial is to end where the run that trains its winner again ends.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Literal, Self

from raytune.config.sections.stopping import EarlyStoppingSection, OverfittingSection
from raytune.config.words.metric_names import is_of_validation
from raytune.metrics.history import History
from raytune.metrics.points import is_of_suite
from raytune.plan.calendar import is_due
from raytune.plan.run_plan import RunPlan, StoppingPlan

VALIDATION_LOSS, TRAINING_LOSS = "validation/loss", "train/loss"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """One evaluation that counts."""

    step: int
    values: Mapping[str, float]
    train_loss: float
    """Mean of the logged steps since the evaluation before; NaN if none was logged."""

    @property
    def gap(self) -> float:
        """Nats by which the validation loss is above the training loss."""
        return self.values[VALIDATION_LOSS] - self.train_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted:
    """What a rule has found after a step, in words."""

    step: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped(Noted):
    """Why a run ended before its last step."""

    rule: Literal["early_stopping", "overfitting"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What the rules came to, as it stands in the result of a run."""

    stopped: Stopped | None = None
    """None: the run was trained to its last step."""
    overfitting: tuple[Noted, ...] = ()
    """Where overfitting began, each time once."""
    divergence: tuple[Noted, ...] = ()
    """What the guard against divergence found and did."""

    def to_json(self) -> dict[str, Any]:
        return {
            "stopped": self.stopped and asdict(self.stopped),
            "overfitting": [asdict(found) for found in self.overfitting],
            "divergence": [asdict(found) for found in self.divergence],
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Of a result, which of an earlier raytune has none."""
        stopped = record.get("stopped")
        return cls(
            stopped=Stopped(**stopped) if stopped else None,
            overfitting=tuple(Noted(**found) for found in record.get("overfitting", ())),
            divergence=tuple(Noted(**found) for found in record.get("divergence", ())),
        )


class Curve:
    """The evaluations that count, of what a run measures in the order of its steps.

    Args:
        every_steps: period of the evaluations that count.
        log_every: steps between two training losses that count; one at an evaluation counts as well.
        suites_every: period of the measurements of suites that count; None: there are none while training goes on.
    """

    def __init__(self, every_steps: float, log_every: int, suites_every: float | None = None) -> None:
        self._every_steps, self._log_every, self._suites_every = every_steps, log_every, suites_every
        self._losses: list[float] = []
        self.evaluations: list[Evaluated] = []
        self.of_suites: list[Evaluated] = []
        """By step; they may be known later than what follows them."""

    @classmethod
    def of(cls, plan: RunPlan) -> Self:
        suites = plan.evaluation.while_training
        return cls(plan.evaluation.every_steps, plan.logging_steps, suites.every_steps if suites else None)

    def read(self, history: History, last_step: int) -> Self:
        """Take what was measured up to a step."""
        for point in history.points:
            if point.step <= last_step:
                self.add(point.step, point.values)
        return self

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Take what was measured after a step; it may come in parts, the training loss first."""
        counts = step > 0 and is_due(step, self._every_steps)
        if TRAINING_LOSS in values and (counts or step % self._log_every == 0):
            self._losses.append(values[TRAINING_LOSS])
        if VALIDATION_LOSS in values and counts:
            mean = sum(self._losses) / len(self._losses) if self._losses else math.nan
            self.evaluations.append(Evaluated(step=step, values=dict(values), train_loss=mean))
            self._losses = []
        self._add_of_suites(step, {name: value for name, value in values.items() if is_of_suite(name)})

    def _add_of_suites(self, step: int, values: Mapping[str, float]) -> None:
        if values and self._suites_every is not None and step > 0 and is_due(step, self._suites_every):
            self.of_suites.append(Evaluated(step=step, values=values, train_loss=math.nan))
            self.of_suites.sort(key=lambda evaluated: evaluated.step)

    def seen_by(self, rule: EarlyStoppingSection) -> list[Evaluated]:
        """The evaluations that count for a rule: those of validation rows, or those of the suite that its metric is of."""
        if is_of_validation(rule.metric):
            return self.evaluations
        return [evaluated for evaluated in self.of_suites if rule.metric in evaluated.values]


# --- The rules ---------------------------------------------------------------------------------------------------------------


def num_without_better(evaluations: Sequence[Evaluated], rule: EarlyStoppingSection) -> tuple[int, Evaluated | None]:
    """Evaluations in a row, up to the last, that were no better; and the better one before them.

    A value counts as better if it beats the last better one by more than `min_delta`, so that small gains add up until they do.
    One that is not finite is never better.
    """
    sign = 1 if rule.mode == "min" else -1
    since, best, best_value = 0, None, math.inf
    for evaluated in evaluations:
        value = sign * evaluated.values.get(rule.metric, math.nan)
        if math.isfinite(value) and best_value - value > rule.min_delta:
            since, best, best_value = 0, evaluated, value
        else:
            since += 1
    return since, best


def reason_to_stop(evaluations: Sequence[Evaluated], rule: EarlyStoppingSection) -> str | None:
    """Why early stopping ends a run after the last of its evaluations; None if it goes on."""
    since, best = num_without_better(evaluations, rule)
    if since < rule.patience:
        return None
    by = f" by more than {rule.min_delta:g}" if rule.min_delta else ""
    if best is None:
        return f"{rule.metric} was not finite at {_counted(since)} in a row"
    return (
        f"{rule.metric} was not better{by} than {best.values[rule.metric]:.6g} (step {best.step}) at {_counted(since)} in a row"
    )


def overfits(evaluations: Sequence[Evaluated], rule: OverfittingSection) -> str | None:
    """How a run overfits by the last of its evaluations; None if it does not."""
    last = evaluations[-rule.patience - 1 :]
    if len(last) == rule.patience + 1:
        rises = all(after.values[VALIDATION_LOSS] > before.values[VALIDATION_LOSS] for before, after in pairwise(last))
        if rises and last[-1].train_loss < last[0].train_loss:
            first, now = last[0], last[-1]
            return (
                f"the validation loss rose at {_counted(rule.patience)} in a row, from {first.values[VALIDATION_LOSS]:.4g} "
                f"(step {first.step}) to {now.values[VALIDATION_LOSS]:.4g}, while the training loss fell from "
                f"{first.train_loss:.4g} to {now.train_loss:.4g}"
            )
    recent = evaluations[-rule.patience :]
    if rule.max_gap is not None and len(recent) == rule.patience and all(one.gap > rule.max_gap for one in recent):
        return (
            f"the validation loss was more than {rule.max_gap:g} above the training loss at {_counted(rule.patience)} in a row "
            f"({recent[-1].values[VALIDATION_LOSS]:.4g} against {recent[-1].train_loss:.4g})"
        )
    return None


def where_overfitting_began(evaluations: Sequence[Evaluated], rule: OverfittingSection) -> list[Noted]:
    """Evaluations at which a run overfits, without those that follow one that says so already."""
    found, before = [], None
    for end in range(1, len(evaluations) + 1):
        reason = overfits(evaluations[max(0, end - rule.patience - 1) : end], rule)
        if reason and not before:
            found.append(Noted(step=evaluations[end - 1].step, reason=reason))
        before = reason
    return found


def verdict(curve: Curve, rules: StoppingPlan, step: int) -> Findings:
    """What the rules say of everything that was measured by a step.

    Args:
        step: the last one that was made: a run that is continued under a shorter patience ends later than the rule would have it.
    """
    early, overfitting = rules.early_stopping, rules.overfitting
    found = where_overfitting_began(curve.evaluations, overfitting) if overfitting else []
    stopped = None
    if early and (reason := reason_to_stop(curve.seen_by(early), early)):
        stopped = Stopped(step=step, rule="early_stopping", reason=reason)
    elif overfitting and overfitting.policy == "stop" and (reason := overfits(curve.evaluations, overfitting)):
        stopped = Stopped(step=step, rule="overfitting", reason=reason)
    return Findings(stopped=stopped, overfitting=tuple(found))


def _counted(evaluations: int) -> str:
    return f"{evaluations} evaluation{'s' * (evaluations != 1)}"


# --- In a run ----------------------------------------------------------------------------------------------------------------


class Stopping:
    """The rules of a run while it trains. Rank 0 judges, and all ranks act on what it says; without rules nobody says anything.

    Args:
        num_steps: of the whole run, after which nothing is left to be ended.
        curve: what was measured before this attempt; of use on rank 0 only.
        gather: every rank's value, on every rank.
        report: told what is found, as `EventLog.write`.
    """

    def __init__(
        self, rules: StoppingPlan, num_steps: int, curve: Curve, gather: Callable[[Any], list[Any]], report: Callable[..., None]
    ) -> None:
        self._rules, self._num_steps, self._curve, self._gather, self._report = rules, num_steps, curve, gather, report
        self.findings = Findings()
        """As all ranks know them."""

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Take what was measured after a step."""
        if self._rules.are_given:
            self._curve.add(step, values)

    def has_ended(self, step: int) -> bool:
        """Whether the run had ended after the step that this attempt goes on from. Every rank calls it."""
        return self._judge(step)

    def ends_after(self, step: int) -> bool:
        """Whether the run ends after a step that was evaluated. Every rank calls it."""
        known = self.findings.overfitting
        ends = self._judge(step)
        for noted in self.findings.overfitting:
            if noted not in known:
                self._report("overfitting", step=noted.step, reason=noted.reason)
        return ends

    def _judge(self, step: int) -> bool:
        if not self._rules.are_given:
            return False
        found: Findings = self._gather(verdict(self._curve, self._rules, step))[0]
        self.findings = found if step < self._num_steps else replace(found, stopped=None)
        stopped = self.findings.stopped
        if stopped:
            self._report("stopped_early", step=step, rule=stopped.rule, reason=stopped.reason)
        return stopped is not None
