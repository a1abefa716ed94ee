"""What answers are worth, in one table of metrics. A row adds counts, and a value is made of their sums: so means, BLEU and F1
over classes are computed, and drawn again for an interval, alike.

Shapes: N rows, K counts of a metric.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from raytune.config.sections.evaluation import AnswerMetricName
from raytune.evaluation.overlap import BLEU, CHRF, Rouge
from raytune.evaluation.text_metrics import exact_match, is_json, json_fields, json_valid, last_number, numeric_match, token_f1


class AnswerMetric(Protocol):
    """A number in 0..1 for many answers."""

    @property
    def words(self) -> str:
        """Its name in tables."""
        ...

    @property
    def package(self) -> str:
        """What it imports of what not everybody has installed; empty: nothing."""
        ...

    def refusal(self, expected: str) -> str | None:
        """Why no answer can be judged by what is expected of a row; None if it can."""
        ...

    def counts(self, answers: Sequence[str], expected: Sequence[str]) -> np.ndarray:
        """What each row adds, (N, K)."""
        ...

    def value(self, sums: np.ndarray) -> np.ndarray:
        """Of sums over rows, (..., K): the metric, (...)."""
        ...


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean of what each row is worth."""

    words: str
    of_row: Callable[[str, str], float]
    needs: str = ""
    """What the expected answer has to be, in words."""
    has: Callable[[str], bool] = lambda expected: True
    package: str = ""

    def refusal(self, expected: str) -> str | None:
        return None if self.has(expected) else f"the expected answer has to be {self.needs}"

    def counts(self, answers: Sequence[str], expected: Sequence[str]) -> np.ndarray:
        return np.array([(self.of_row(answer, wanted), 1.0) for answer, wanted in zip(answers, expected, strict=True)])

    def value(self, sums: np.ndarray) -> np.ndarray:
        return _share(sums[..., 0], sums[..., 1])


@dataclass(frozen=True, slots=True)
class Classes:
    """A metric of classes, which are the different expected answers; an answer that is none of them is a wrong one.

    Counts are, by class: right answers, answers, and rows that expect it.
    """

    words: str
    of_classes: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    """Its value, (...), of right answers, answers and rows by class, (..., classes) each."""
    package: str = ""

    def refusal(self, expected: str) -> str | None:
        return None if expected.strip() else "the expected answer is empty, and so no class"

    def counts(self, answers: Sequence[str], expected: Sequence[str]) -> np.ndarray:
        given = np.array([answer.strip() for answer in answers])
        wanted = np.array([one.strip() for one in expected])
        classes = np.unique(wanted)
        is_given, is_wanted = given[:, None] == classes, wanted[:, None] == classes
        return np.concatenate([is_given & is_wanted, is_given, is_wanted], axis=1).astype(float)

    def value(self, sums: np.ndarray) -> np.ndarray:
        return self.of_classes(*np.split(sums, 3, axis=-1))


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """`part / whole`, 0 where `whole` is 0."""
    return np.divide(part, whole, out=np.zeros(np.shape(part)), where=whole > 0)


def _mean_over(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean of values, (..., classes), over those classes that are expected or given at all: scikit-learn's macro average."""
    return _share((values * (counts > 0)).sum(-1), (counts > 0).sum(-1))


def _accuracy(right: np.ndarray, given: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    return _share(right.sum(-1), wanted.sum(-1))


def _precision(right: np.ndarray, given: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    return _mean_over(_share(right, given), given + wanted)


def _recall(right: np.ndarray, given: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    return _mean_over(_share(right, wanted), given + wanted)


def _f1(right: np.ndarray, given: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    return _mean_over(_share(2 * right, given + wanted), given + wanted)


ANSWER_METRICS: dict[AnswerMetricName, AnswerMetric] = {
    "exact_match": Mean("exact match", exact_match),
    "token_f1": Mean("token F1", token_f1),
    "numeric_match": Mean("numeric match", numeric_match, "a text with a number", lambda text: last_number(text) is not None),
    "json_valid": Mean("valid JSON", json_valid),
    "json_fields": Mean("JSON fields", json_fields, "JSON", is_json),
    "accuracy": Classes("accuracy", _accuracy),
    "macro_precision": Classes("macro precision", _precision),
    "macro_recall": Classes("macro recall", _recall),
    "macro_f1": Classes("macro F1", _f1),
    "bleu": BLEU,
    "chrf": CHRF,
    "rouge1": Rouge("ROUGE-1", "rouge1"),
    "rouge2": Rouge("ROUGE-2", "rouge2"),
    "rougeL": Rouge("ROUGE-L", "rougeL"),
}
