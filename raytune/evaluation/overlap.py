"""Metrics that count what answer and expected answer have in common: BLEU and chrF of sacrebleu, ROUGE of rouge-score, whose
packages come with the extra `metrics` and are imported where one of these is asked for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np


@cache
def _sacrebleu(name: str) -> Any:
    """A metric of sacrebleu with its own defaults."""
    import sacrebleu.metrics

    return getattr(sacrebleu.metrics, name)()


@cache
def _rouge(kind: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind])


@dataclass(frozen=True, slots=True)
class Corpus:
    """A metric of sacrebleu over all rows together. It adds up counts itself, by methods that it also tests significance with."""

    words: str
    name: str
    package: str = "sacrebleu"

    def refusal(self, expected: str) -> str | None:
        return None

    def counts(self, answers: Sequence[str], expected: Sequence[str]) -> np.ndarray:
        return np.array(_sacrebleu(self.name)._extract_corpus_statistics([*answers], [[*expected]]), dtype=float)

    def value(self, sums: np.ndarray) -> np.ndarray:
        score: Callable[[Any], Any] = _sacrebleu(self.name)._compute_score_from_stats
        rows = sums.reshape(-1, sums.shape[-1]).astype(int).tolist()
        return np.array([score(row).score / 100 for row in rows]).reshape(sums.shape[:-1])


@dataclass(frozen=True, slots=True)
class Rouge:
    """The mean over rows of the F-measure of a kind of ROUGE, without stemming, as Hugging Face's `evaluate` has it."""

    words: str
    kind: str
    package: str = "rouge_score"

    def refusal(self, expected: str) -> str | None:
        return None

    def counts(self, answers: Sequence[str], expected: Sequence[str]) -> np.ndarray:
        score = _rouge(self.kind).score
        return np.array(
            [(score(wanted, answer)[self.kind].fmeasure, 1.0) for answer, wanted in zip(answers, expected, strict=True)]
        )

    def value(self, sums: np.ndarray) -> np.ndarray:
        return sums[..., 0] / sums[..., 1]


BLEU, CHRF = Corpus("BLEU", "BLEU"), Corpus("chrF", "CHRF")
