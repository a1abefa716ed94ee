"""Base against tuned on the same rows."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from raytune.evaluate.text_metrics import exact_match


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
class Comparison:
    """A metric of the base and of the tuned model over the same rows, each in 0..1."""

    metric: str
    base: float
    tuned: float
    num_rows: int

    @property
    def gain(self) -> float:
        return self.tuned - self.base


def compare_exact_match(samples: Sequence[Sample]) -> Comparison:
    """Share of rows that each model answers exactly as expected."""
    num_rows = len(samples)
    assert num_rows, "the caller loads at least one row"
    return Comparison(
        metric="exact match",
        base=sum(exact_match(sample.base, sample.expected) for sample in samples) / num_rows,
        tuned=sum(exact_match(sample.tuned, sample.expected) for sample in samples) / num_rows,
        num_rows=num_rows,
    )
