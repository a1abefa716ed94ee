"""Which answers a page shows of many: those that gained most, those that lost most, and others that changed. Pure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from raytune.config.evaluation import AnswerMetricName
from raytune.errors import UserError
from raytune.evaluate.answer_metrics import ANSWER_METRICS, AnswerMetric, answer_metrics
from raytune.printable import shortened

NUM_OF_EACH = 3
MOST_LETTERS = 1500
"""Of a text, so that one of a megabyte leaves room for the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownSample:
    """A row answered twice, with what its answers are worth by themselves."""

    row: int
    prompt: str
    expected: str
    base: str
    tuned: str
    base_value: float
    tuned_value: float


@dataclass(frozen=True, slots=True)
class SampleGroup:
    """Rows that are shown for the same reason."""

    heading: str
    samples: list[ShownSample]


def choose_samples(samples: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> tuple[str, list[SampleGroup]]:
    """The metric that rows are told apart by, in words, and a few rows for each reason; each row once.

    Args:
        metrics: of the suite; the first of raytune's own that can be computed here decides.
    """
    words, values = _judge(metrics)
    judged = [
        ShownSample(
            row=sample["row"],
            prompt=shortened(sample["prompt"], MOST_LETTERS),
            expected=shortened(sample["expected"], MOST_LETTERS),
            base=shortened(sample["base"], MOST_LETTERS),
            tuned=shortened(sample["tuned"], MOST_LETTERS),
            base_value=base,
            tuned_value=tuned,
        )
        for sample, base, tuned in zip(
            samples,
            values([sample["base"] for sample in samples], [sample["expected"] for sample in samples]),
            values([sample["tuned"] for sample in samples], [sample["expected"] for sample in samples]),
        )
    ]
    by_gain = sorted(judged, key=lambda one: (one.tuned_value - one.base_value, one.tuned_value, -one.row))
    groups, taken = [], set()
    for heading, ranked in (
        ("Gained most", [one for one in reversed(by_gain) if one.tuned_value > one.base_value]),
        ("Became worse", [one for one in by_gain if one.tuned_value < one.base_value]),
        ("Still worst", sorted((one for one in judged if one.tuned_value < 1), key=lambda one: (one.tuned_value, one.row))),
        ("Changed", [one for one in judged if one.base != one.tuned]),
        ("The same", [one for one in judged if one.base == one.tuned]),
    ):
        chosen = [one for one in ranked if one.row not in taken][:NUM_OF_EACH]
        taken |= {one.row for one in chosen}
        if chosen:
            groups.append(SampleGroup(heading, chosen))
    return words, groups


def _judge(metrics: Sequence[str]) -> tuple[str, Callable[[Sequence[str], Sequence[str]], list[float]]]:
    """What answers are worth one by one, by the first metric whose package is here; if none is, by the first of all, which
    needs none."""
    own: list[AnswerMetricName] = [name for name in ANSWER_METRICS if name in metrics]
    for name in sorted(own, key=list(metrics).index):
        try:
            (metric,) = answer_metrics([name]).values()
        except UserError:  # it was computed where its package is installed
            continue
        return metric.words, partial(_values, metric)
    first = next(iter(ANSWER_METRICS.values()))
    return first.words, partial(_values, first)


def _values(metric: AnswerMetric, answers: Sequence[str], expected: Sequence[str]) -> list[float]:
    return [float(metric.value(row)) for row in metric.counts(answers, expected)]
