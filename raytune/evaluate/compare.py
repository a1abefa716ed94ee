"""Base against tuned on the same rows."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from raytune.config.evaluation import AnswerMetricName
from raytune.evaluate.answer_metrics import answer_metrics
from raytune.evaluate.bootstrap import difference_interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One row answered twice."""

    row: int
    prompt: str
    expected: str
    base: str
    tuned: str

    def to_json(self) -> dict:
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A metric of both models, in 0..1."""

    words: str
    """Its name in tables."""
    base: float
    tuned: float
    gain_low: float
    gain_high: float
    """Between these the gain lies with a probability of 95 %, as far as the choice of rows goes."""

    @property
    def gain(self) -> float:
        return self.tuned - self.base


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What the answers of the base and of the tuned model to the same rows are worth."""

    num_rows: int
    scores: Mapping[str, Score]
    """By the name of the metric in `evaluation.generation.metrics`, in their order."""

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        return cls(num_rows=record["num_rows"], scores={name: Score(**score) for name, score in record["scores"].items()})

    def to_json(self) -> dict:
        return asdict(self)


def compare(samples: Sequence[Sample], metrics: Sequence[AnswerMetricName]) -> Comparison:
    """What the answers of both models are worth, by each metric.

    Args:
        samples: at least one.

    Raises:
        UserError: if a package that a metric needs is not installed.
    """
    expected = [sample.expected for sample in samples]
    scores = {}
    for name, metric in answer_metrics(metrics).items():
        base, tuned = (
            metric.counts(answers, expected) for answers in ([one.base for one in samples], [one.tuned for one in samples])
        )
        low, high = difference_interval(base, tuned, metric.value)
        scores[name] = Score(
            words=metric.words,
            base=float(metric.value(base.sum(0))),
            tuned=float(metric.value(tuned.sum(0))),
            gain_low=low,
            gain_high=high,
        )
    return Comparison(num_rows=len(samples), scores=scores)


def comparisons_in(result: Mapping[str, Any]) -> dict[str, Comparison]:
    """Base against tuned as a run's result.json has it, by suite; the one comparison of an earlier raytune's is `generation`."""
    records = result.get("comparisons")
    if records is None:
        records = {"generation": result["comparison"]} if result.get("comparison") else {}
    return {suite: Comparison.from_json(record) for suite, record in records.items()}
