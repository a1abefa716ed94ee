"""What suites are judged by, in one table of their kinds: metrics of answers, of choices by likelihood, and of losses; and what
tasks of lm_eval are judged by, which their files say.

Shapes: N rows, K counts of a metric.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from raytune.config.sections.evaluation import GENERATION, SuiteKind
from raytune.errors import UserError
from raytune.evaluation.answer_metrics import ANSWER_METRICS, AnswerMetric, Mean
from raytune.evaluation.bert_score import BertScore
from raytune.evaluation.lm_eval_tasks import TaskMetric, chosen_metrics
from raytune.missing import OPTIONAL, install_command
from raytune.plan.run_plan import SuitePlan
from raytune.user_code import UserCode, load, told


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What a model made of a row."""

    text: str
    """Its answer; of choices the likeliest one; of a loss that in words."""
    num_tokens: int | None = None
    """Of a written answer."""
    has_ended: bool | None = None
    """Whether the model ended a written answer; else it is as long as was allowed."""
    per_character: str = ""
    """Of choices the likeliest one per character."""
    numbers: tuple[float, ...] = ()
    """Of choices the log-likelihood of each, in nats; of a loss the sum over targets, and their number."""
    values: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Of a task of lm_eval what it makes of that, by metric: a sum, and how many it is of."""
    failed: str = ""
    """Why a task of lm_eval has made nothing of it."""


class SuiteMetric(Protocol):
    """A number for many rows."""

    @property
    def words(self) -> str:
        """Its name in tables."""
        ...

    @property
    def lower_is_better(self) -> bool: ...

    @property
    def is_share(self) -> bool:
        """Whether it lies in 0..1, and is shown in per cent."""
        ...

    def refusal(self, expected: str) -> str | None:
        """Why nothing can be judged by what is expected of a row; None if it can."""
        ...

    def counts(self, given: Sequence[Given], expected: Sequence[str]) -> np.ndarray:
        """What each row adds, (N, K)."""
        ...

    def value(self, sums: np.ndarray) -> np.ndarray:
        """Of sums over rows, (..., K): the metric, (...)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class OfText:
    """A metric of answers, of the text that a model gave or chose."""

    metric: AnswerMetric
    words: str
    is_share: bool = True
    lower_is_better: bool = False
    read: Callable[[Given], str] = lambda given: given.text

    def refusal(self, expected: str) -> str | None:
        return self.metric.refusal(expected)

    def counts(self, given: Sequence[Given], expected: Sequence[str]) -> np.ndarray:
        return self.metric.counts([self.read(one) for one in given], expected)

    def value(self, sums: np.ndarray) -> np.ndarray:
        return self.metric.value(sums)


@dataclass(frozen=True, slots=True, kw_only=True)
class OfLoss:
    """A function of the mean loss over all targets."""

    words: str
    of_mean: Callable[[np.ndarray], np.ndarray]
    is_share: bool = False
    lower_is_better: bool = True

    def refusal(self, expected: str) -> str | None:
        return None

    def counts(self, given: Sequence[Given], expected: Sequence[str]) -> np.ndarray:
        return np.array([one.numbers for one in given])

    def value(self, sums: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # the perplexity of a model that diverged
            return self.of_mean(sums[..., 0] / sums[..., 1])


@dataclass(frozen=True, slots=True, kw_only=True)
class OfTask:
    """A metric of a task of lm_eval, which has judged each row itself."""

    words: str
    metric: TaskMetric

    @property
    def is_share(self) -> bool:
        return self.metric.is_share

    @property
    def lower_is_better(self) -> bool:
        return not self.metric.higher_is_better

    def refusal(self, expected: str) -> str | None:
        return None

    def counts(self, given: Sequence[Given], expected: Sequence[str]) -> np.ndarray:
        """
        Raises:
            UserError: if the task, or lm_eval, has failed on a row.
        """
        if reason := next((one.failed for one in given if one.failed), None):
            raise UserError(reason)
        return np.array([one.values[self.words] for one in given])

    def value(self, sums: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):  # of rows that have no value there is no mean
            return self.metric.aggregation.of_mean(sums[..., 0] / sums[..., 1])


def _of_text(name: str, **changes: Any) -> OfText:
    metric = ANSWER_METRICS[name]  # pyright: ignore[reportArgumentType]
    return OfText(**{"metric": metric, "words": metric.words, **changes})


_RIGHT = Mean("accuracy", lambda answer, expected: float(answer == expected))
_PER_CHARACTER = OfText(metric=_RIGHT, words="accuracy per character", read=lambda given: given.per_character)

METRICS: Mapping[SuiteKind, Mapping[str, SuiteMetric]] = {
    "answers": {name: _of_text(name) for name in ANSWER_METRICS},
    "choices": {"accuracy": OfText(metric=_RIGHT, words="accuracy"), "accuracy_per_character": _PER_CHARACTER},
    "labels": {
        **{name: _of_text(name) for name in ("accuracy", "macro_precision", "macro_recall", "macro_f1")},
        "accuracy_per_character": _PER_CHARACTER,
    },
    "loss": {
        "loss": OfLoss(words="loss", of_mean=lambda mean: mean),
        "perplexity": OfLoss(words="perplexity", of_mean=np.exp),
    },
    "lm_eval": {},
}


def metrics_of(suite: SuitePlan, *, key: str = "", device: str = "cpu") -> dict[str, SuiteMetric]:
    """The metrics of a suite by their names.

    Args:
        key: of the config, that errors are about. Default: the section that the suite is in.
        device: where a metric that has a model runs it.

    Raises:
        UserError: if a package that one of them needs is not installed in this Python, or code of the user's cannot be used.
    """
    key = key or ("evaluation.generation" if suite.name == GENERATION else "evaluation.suites")
    if suite.task:
        try:
            chosen = chosen_metrics(suite.task, suite.metrics)
        except UserError as error:
            raise UserError(f"{key}: {error}", keys=(f"{key}.metrics", key)) from error
        return {name: OfTask(words=name, metric=metric) for name, metric in chosen.items()}
    return {name: _metric(suite, name, f"{key}.metrics", device) for name in suite.metrics}


def _metric(suite: SuitePlan, name: str, key: str, device: str) -> SuiteMetric:
    if name in suite.code:
        return of_user(suite.code[name].code, key)
    if suite.bertscore and name == "bertscore":
        if not Path(suite.bertscore.model).expanduser().is_dir():
            place = f"{key.rpartition('.')[0]}.bertscore.model"
            raise UserError(f"{place}: there is no folder {suite.bertscore.model} on {os.uname().nodename}.", keys=(place,))
        metric: AnswerMetric = BertScore(suite.bertscore.model, suite.bertscore.layer, device)
        found = OfText(metric=metric, words=metric.words)
    else:
        found = METRICS[suite.kind][name]
    package = found.metric.package if isinstance(found, OfText) else ""
    if package and find_spec(package) is None:
        raise UserError(
            f"{key}: {name} needs the package {package}, which the Python of this process does not have. Install it on every "
            f"node: {install_command(OPTIONAL[package])}",
            keys=(key,),
        )
    return found


def counted(
    metrics: Mapping[str, SuiteMetric], given: Sequence[Given], expected: Sequence[str]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """What each row adds by each metric, (N, K); and why, of the metrics that fail, which are functions of the user's. What was
    trained and answered is worth no less for these.

    Args:
        given: what a model made of the rows, of which there is at least one.
    """
    counts, failed = {}, {}
    for name, metric in metrics.items():
        try:
            counts[name] = metric.counts(given, expected)
        except UserError as error:
            failed[name] = str(error)
    return counts, failed


def of_user(code: UserCode, key: str) -> OfText:
    """A metric of the user's: the mean of what a function gives for an answer and the expected one.

    It may say by an attribute `lower_is_better` that it counts errors.

    Raises:
        UserError: if it cannot be loaded or called.
    """
    try:
        function = load(code)
    except UserError as error:
        raise UserError(str(error), keys=(key,)) from error
    if not callable(function):
        raise UserError(f"{key}: {code} is no function.", keys=(key,))
    return OfText(
        metric=Mean(code.name, partial(_called, code, key, function)),
        words=code.name,
        is_share=False,
        lower_is_better=bool(getattr(function, "lower_is_better", False)),
    )


def _called(code: UserCode, key: str, function: Callable[..., Any], answer: str, expected: str) -> float:
    try:
        value = function(answer, expected)
        number = float(value)
    except Exception as error:  # whatever it raises is the user's
        raise UserError(
            f"{key}: {code} fails for the answer {answer[:200]!r} where {expected[:200]!r} is expected. {told(error, code)}",
            keys=(key,),
        ) from error
    if not math.isfinite(number):
        raise UserError(
            f"{key}: {code} gives {value!r} for the answer {answer[:200]!r} where {expected[:200]!r} is expected. It has to be "
            f"a finite number.",
            keys=(key,),
        )
    return number
