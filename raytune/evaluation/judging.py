"""What answers to the questions of a suite are worth, and the rows as they are kept. Pure, but for metrics that have a model."""

from collections.abc import Mapping, Sequence

import numpy as np

from raytune.evaluation.compare import Comparison, Sample, compare
from raytune.evaluation.questions import Question
from raytune.evaluation.suite_metrics import Given, counted, metrics_of
from raytune.plan.run_plan import SuitePlan


def judged(
    suite: SuitePlan, asked: Sequence[Question], base: Sequence[Given], tuned: Sequence[Given], *, device: str
) -> Comparison:
    """What both models are worth on a suite.

    Args:
        base, tuned: what the models made of its questions.
        device: where a metric that has a model runs it.
    """
    return compare(base, tuned, [question.expected for question in asked], metrics_of(suite, device=device))


def values_of(
    suites: Sequence[SuitePlan], asked: Mapping[str, Sequence[Question]], given: Mapping[str, Sequence[Given]], *, device: str
) -> tuple[dict[str, float], dict[str, str]]:
    """What one model is worth, by the names SUITE/METRIC; and why, of the metrics that failed.

    Args:
        asked, given: the questions of each suite, and what the model made of them.
        device: as above.
    """
    values, failed = {}, {}
    for suite in suites:
        metrics = metrics_of(suite, device=device)
        counts, why = counted(metrics, given[suite.name], [question.expected for question in asked[suite.name]])
        values |= {f"{suite.name}/{name}": float(metrics[name].value(rows.sum(0))) for name, rows in counts.items()}
        failed |= {f"{suite.name}/{name}": reason for name, reason in why.items()}
    return values, failed


def samples_of(suite: SuitePlan, asked: Sequence[Question], base: Sequence[Given], tuned: Sequence[Given]) -> list[Sample]:
    """The rows of a suite, and what both models made of them."""
    metrics = metrics_of(suite) if suite.task else {}

    def values_of_row(given: Given) -> dict[str, float]:
        return {
            name: float(metric.value(np.array(given.values[name]))) for name, metric in metrics.items() if name in given.values
        }

    return [
        Sample(
            suite=question.suite,
            row=number,
            prompt=question.prompt,
            expected=question.expected,
            base=before.text,
            tuned=after.text,
            base_numbers=before.numbers,
            tuned_numbers=after.numbers,
            base_values=values_of_row(before),
            tuned_values=values_of_row(after),
        )
        for number, (question, before, after) in enumerate(zip(asked, base, tuned, strict=True))
    ]
