"""Which answers a page shows of many: those that gained most, those that lost most, and others that changed. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from raytune.evaluation.compare import Score
from raytune.evaluation.lm_eval_tasks import TaskMetric
from raytune.evaluation.suite_metrics import METRICS, Given, OfTask, OfText, SuiteMetric
from raytune.metrics.json_numbers import decode_number
from raytune.plan.run_plan import SuitePlan
from raytune.printable import shortened

NUM_OF_EACH = 3
MOST_LETTERS = 1500
"""Of a text, so that one of a megabyte leaves room for the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownSample:
    """A row answered twice, with what each answer is worth by itself, in words."""

    row: int
    prompt: str
    expected: str
    base: str
    tuned: str
    base_value: str
    tuned_value: str


@dataclass(frozen=True, slots=True)
class SampleGroup:
    """Rows that are shown for the same reason."""

    heading: str
    samples: list[ShownSample]


def choose_samples(
    samples: Sequence[Mapping[str, Any]], suite: SuitePlan, scores: Mapping[str, Score]
) -> tuple[str, list[SampleGroup]]:
    """The metric that rows are told apart by, in words, and a few rows for each reason; each row once.

    Args:
        samples: of samples.jsonl, those of the suite.
        suite: the first of its metrics that needs nothing but the rows decides.
        scores: of the suite; a task of lm_eval has at least one.
    """
    metric = _judge_of_task(scores) if suite.task else _judge(suite)
    base, tuned = (_worth(metric, samples, side) for side in ("base", "tuned"))
    order = sorted(range(len(samples)), key=lambda row: (tuned[row] - base[row], tuned[row], -row))
    changed = [row for row, sample in enumerate(samples) if sample["base"] != sample["tuned"]]
    groups, taken = [], set[int]()
    for heading, ranked in (
        ("Gained most", [row for row in reversed(order) if tuned[row] > base[row]]),
        ("Became worse", [row for row in order if tuned[row] < base[row]]),
        ("Still worst", sorted((row for row in order if tuned[row] < 1), key=lambda row: (tuned[row], row))),
        ("Changed", changed),
        ("The same", [row for row in range(len(samples)) if row not in changed]),
    ):
        chosen = [row for row in ranked if row not in taken][:NUM_OF_EACH]
        taken |= {*chosen}
        if chosen:
            groups.append(SampleGroup(heading, [_shown(samples[row], metric, base[row], tuned[row]) for row in chosen]))
    return metric.words, groups


def _judge(suite: SuitePlan) -> SuiteMetric:
    """The suite's first metric that can be computed here; if none can, the first of its kind, which can."""
    known = METRICS[suite.kind]
    own = [known[name] for name in suite.metrics if name in known]
    return next((metric for metric in own if _is_here(metric)), next(iter(known.values())))


def _judge_of_task(scores: Mapping[str, Score]) -> SuiteMetric:
    """The first metric of a task, whose value for each row stands in the samples."""
    name, score = next(iter(scores.items()))
    return OfTask(words=name, metric=TaskMetric("mean", not score.lower_is_better, score.is_share))


def _is_here(metric: SuiteMetric) -> bool:
    package = metric.metric.package if isinstance(metric, OfText) else ""
    return not package or find_spec(package) is not None


def _worth(metric: SuiteMetric, samples: Sequence[Mapping[str, Any]], side: str) -> list[float]:
    """What a model's answers are worth one by one, the higher the better.

    Args:
        side: `base` or `tuned`.
    """
    given = [
        Given(
            text=sample[side],
            per_character=sample[side],
            numbers=tuple(decode_number(number) for number in sample.get(f"{side}_numbers", ())),
            values={name: (decode_number(value), 1.0) for name, value in sample.get(f"{side}_values", {}).items()},
        )
        for sample in samples
    ]
    values = [float(metric.value(row)) for row in metric.counts(given, [sample["expected"] for sample in samples])]
    return [-value if metric.lower_is_better else value for value in values]


def _shown(sample: Mapping[str, Any], metric: SuiteMetric, base: float, tuned: float) -> ShownSample:
    form = "{:.0%}" if metric.is_share else "{:.4g}"
    texts = {name: shortened(sample[name], MOST_LETTERS) for name in ("prompt", "expected", "base", "tuned")}
    values = [form.format(-value if metric.lower_is_better else value) for value in (base, tuned)]
    return ShownSample(row=sample["row"], **texts, base_value=values[0], tuned_value=values[1])
