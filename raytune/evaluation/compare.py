"""Base against tuned on the same rows."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from raytune.config.sections.evaluation import GENERATION
from raytune.evaluation.bootstrap import difference_interval
from raytune.evaluation.suite_metrics import Given, SuiteMetric, counted
from raytune.metrics.json_numbers import decode_number, encode_number


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One row of a suite, and what both models made of it."""

    suite: str
    row: int
    """From 0."""
    prompt: str
    expected: str
    """Empty where only a loss is measured."""
    base: str
    tuned: str
    base_numbers: tuple[float, ...] = ()
    """As `Given.numbers`."""
    tuned_numbers: tuple[float, ...] = ()
    base_values: Mapping[str, float] = field(default_factory=dict)
    """Of a task of lm_eval what its metrics are of this row alone."""
    tuned_values: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict:
        record = asdict(self)
        numbers = {name: [encode_number(value) for value in record.pop(name)] for name in ("base_numbers", "tuned_numbers")}
        values = {name: {metric: encode_number(value) for metric, value in record.pop(name).items()} for name in _OF_TASKS}
        return record | {name: found for name, found in {**numbers, **values}.items() if found}


_OF_TASKS = ("base_values", "tuned_values")


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A metric of both models."""

    words: str
    """Its name in tables."""
    base: float
    tuned: float
    gain_low: float
    gain_high: float
    """Between these the gain lies with a probability of 95 %, as far as the choice of rows goes."""
    lower_is_better: bool = False
    is_share: bool = True
    """Whether it lies in 0..1, and is shown in per cent."""

    @property
    def gain(self) -> float:
        """How much higher the tuned model's is, which of a loss is how much worse."""
        return self.tuned - self.base

    @property
    def improvement(self) -> float:
        """How much better the tuned model is; below 0: worse."""
        return -self.gain if self.lower_is_better else self.gain

    @property
    def relative_improvement(self) -> float | None:
        """The improvement as a share of the base's score; None where that is 0."""
        return self.improvement / abs(self.base) if self.base else None

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        values: dict[str, Any] = {name: decode_number(value) if name in _NUMBERS else value for name, value in record.items()}
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})

    def to_json(self) -> dict[str, Any]:
        return {name: encode_number(value) if name in _NUMBERS else value for name, value in asdict(self).items()}


_NUMBERS = ("base", "tuned", "gain_low", "gain_high")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What base and tuned model made of the same rows, judged."""

    num_rows: int
    scores: Mapping[str, Score]
    """By the name of the metric in the suite's `metrics`, in their order."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Of metrics that are functions of the user's and have failed, why."""

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        scores = {name: Score.from_json(score) for name, score in record["scores"].items()}
        return cls(num_rows=record["num_rows"], scores=scores, failed=record.get("failed", {}))

    def to_json(self) -> dict:
        scores = {name: score.to_json() for name, score in self.scores.items()}
        return {"num_rows": self.num_rows, "scores": scores} | ({"failed": dict(self.failed)} if self.failed else {})


def comparisons_in(result: Mapping[str, Any]) -> dict[str, Comparison]:
    """The comparisons of a run's result by suite. Until 2026-11-29 there was one, of the suite `generation`."""
    if "comparisons" in result:
        return {name: Comparison.from_json(record) for name, record in result["comparisons"].items()}
    record = result.get("comparison")
    return {GENERATION: Comparison.from_json(record)} if record else {}


def compare(
    base: Sequence[Given], tuned: Sequence[Given], expected: Sequence[str], metrics: Mapping[str, SuiteMetric]
) -> Comparison:
    """What both models are worth, by each metric. One of the user's that fails is told.

    Args:
        base, tuned: what the models made of the same rows, of which there is at least one.
    """
    (of_base, failed_before), (of_tuned, failed) = counted(metrics, base, expected), counted(metrics, tuned, expected)
    failed = failed_before | failed
    scores = {}
    for name, metric in metrics.items():
        if name in failed:
            continue
        before, after = of_base[name], of_tuned[name]
        low, high = difference_interval(before, after, metric.value)
        scores[name] = Score(
            words=metric.words,
            base=float(metric.value(before.sum(0))),
            tuned=float(metric.value(after.sum(0))),
            gain_low=low,
            gain_high=high,
            lower_is_better=metric.lower_is_better,
            is_share=metric.is_share,
        )
    return Comparison(num_rows=len(expected), scores=scores, failed=failed)
