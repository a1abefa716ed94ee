"""Models measured on the same rows of suites: what each is worth, and how far two of them differ by more than chance."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from raytune.evaluation.compare import Comparison, compare
from raytune.evaluation.questions import Question
from raytune.evaluation.suite_metrics import Given, counted, metrics_of
from raytune.metrics.json_numbers import encode_number
from raytune.plan.run_plan import SuitePlan

Answers = Mapping[str, Mapping[str, Sequence[Given]]]
"""What models made of the rows of suites, by the names of both, in the order of the rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """A metric of every model on a suite."""

    words: str
    """Its name in tables."""
    is_share: bool
    """Whether it lies in 0..1, and is shown in per cent."""
    lower_is_better: bool
    of_models: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two models beside each other."""

    before: str
    after: str
    comparisons: Mapping[str, Comparison]
    """By suite; `base` and `tuned` of their scores are the one before and the one after."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Models measured on suites.

    Attributes:
        output: folder with result.json and samples.jsonl.
        models: where each is of, by its name.
        num_rows: by suite.
        values: by suite and metric.
        failed: why, by suite and metric, of functions of the user's that failed, which no model has a value of.
        pairs: base against tuned, and what else was to be compared, with intervals.
    """

    output: str
    models: Mapping[str, str]
    num_rows: Mapping[str, int]
    values: Mapping[str, Mapping[str, Values]]
    failed: Mapping[str, Mapping[str, str]]
    pairs: tuple[Pair, ...]

    @property
    def lines(self) -> list[str]:
        """What a person reads: a line per suite and metric, and where the files are."""
        differences = [f"{pair.after} - {pair.before} (95 % interval)" for pair in self.pairs]
        rows = [["", *self.models, *differences], *self._rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        table = ["  ".join(_aligned(row, widths)).rstrip() for row in rows]
        counts = ", ".join(f"{suite}: {count} row{'s' * (count != 1)}" for suite, count in self.num_rows.items())
        failures = [f"{suite}: {why}" for suite, metrics in self.failed.items() for why in metrics.values()]
        return [counts, *table, *failures, f"result   {self.output}/result.json", f"samples  {self.output}/samples.jsonl"]

    def _rows(self) -> Iterator[list[str]]:
        for suite, metrics in self.values.items():
            for name, values in metrics.items():
                form = "{:.1%}" if values.is_share else "{:.4g}"
                signed = form.replace(":", ":+")
                gains = []
                for pair in self.pairs:
                    score = pair.comparisons[suite].scores[name]
                    interval = f"{signed.format(score.gain_low)} to {signed.format(score.gain_high)}"
                    gains.append(f"{signed.format(score.gain)} ({interval})")
                yield [f"{suite}: {values.words}", *map(form.format, values.of_models.values()), *gains]

    def to_json(self) -> dict[str, Any]:
        return {
            "output": self.output,
            "models": dict(self.models),
            "num_rows": dict(self.num_rows),
            "values": {
                suite: {name: _encoded(values) for name, values in metrics.items()} for suite, metrics in self.values.items()
            },
            "failed": {suite: dict(metrics) for suite, metrics in self.failed.items() if metrics},
            "pairs": [
                {
                    "before": pair.before,
                    "after": pair.after,
                    "comparisons": {suite: one.to_json() for suite, one in pair.comparisons.items()},
                }
                for pair in self.pairs
            ],
        }


def values_of(
    suite: SuitePlan, expected: Sequence[str], given: Mapping[str, Sequence[Given]], device: str
) -> tuple[dict[str, Values], dict[str, str]]:
    """What each model is worth on a suite, by metric; and why, of the metrics that failed.

    Args:
        given: what models made of its rows.
        device: where a metric that has a model runs it.
    """
    metrics, counts, failed = metrics_of(suite, device=device), {}, {}
    for model, rows in given.items():
        counts[model], why = counted(metrics, rows, expected)
        failed |= why
    values = {
        name: Values(
            words=metric.words,
            is_share=metric.is_share,
            lower_is_better=metric.lower_is_better,
            of_models={model: float(metric.value(of_model[name].sum(0))) for model, of_model in counts.items()},
        )
        for name, metric in metrics.items()
        if name not in failed
    }
    return values, failed


def paired(
    before: str, after: str, suites: Sequence[SuitePlan], expected: Mapping[str, Sequence[str]], answers: Answers, device: str
) -> Pair:
    """Two models on the same rows of all suites."""
    return Pair(
        before=before,
        after=after,
        comparisons={
            suite.name: compare(
                answers[before][suite.name],
                answers[after][suite.name],
                expected[suite.name],
                metrics_of(suite, device=device),
            )
            for suite in suites
        },
    )


def samples_of_models(asked: Mapping[str, Sequence[Question]], answers: Answers) -> Iterator[dict[str, Any]]:
    """Every row, and what each model made of it, as lines of samples.jsonl."""
    for suite, questions in asked.items():
        for number, question in enumerate(questions):
            given = {model: of_suites[suite][number] for model, of_suites in answers.items()}
            numbers = {model: [encode_number(value) for value in one.numbers] for model, one in given.items() if one.numbers}
            row = {"suite": suite, "row": number, "prompt": question.prompt, "expected": question.expected}
            texts = {model: one.text for model, one in given.items()}
            yield {**row, "answers": texts, **({"numbers": numbers} if numbers else {})}


def _encoded(values: Values) -> dict[str, Any]:
    return asdict(values) | {"of_models": {model: encode_number(value) for model, value in values.of_models.items()}}


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Words on the left, numbers on the right."""
    return [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
