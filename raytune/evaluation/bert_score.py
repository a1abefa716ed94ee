"""BERTScore (Zhang et al. 2020): how alike the tokens of two texts are to an encoder, by the package bert-score, which comes with
the extra `bertscore`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

LONGEST = 100_000
"""No tokenizer that says how long texts may be says more."""


@cache
def _scorer(model: str, layer: int, device: str) -> Any:
    from bert_score import BERTScorer

    scorer = BERTScorer(model_type=model, num_layers=layer, device=device)
    if scorer._tokenizer.model_max_length > LONGEST:  # bert-score 0.3.13 cuts texts there, and fails where nothing is said
        scorer._tokenizer.model_max_length = min(LONGEST, getattr(scorer._model.config, "max_position_embeddings", LONGEST) - 2)
    return scorer


@dataclass(frozen=True, slots=True)
class BertScore:
    """The mean F1 of rows, without a baseline or weights of tokens."""

    model: str
    layer: int
    device: str
    words: str = "BERTScore"
    package: str = "bert_score"

    def refusal(self, expected: str) -> str | None:
        return None if expected.strip() else "the expected answer is empty, and has nothing to be like"

    def counts(self, answers: Sequence[str], expected: Sequence[str]) -> np.ndarray:
        f1 = np.zeros(len(answers))
        written = [row for row, answer in enumerate(answers) if answer.strip()]  # bert-score warns of the others, and gives 0
        if written:
            scorer = _scorer(self.model, self.layer, self.device)
            f1[written] = scorer.score([answers[row] for row in written], [expected[row] for row in written])[2].numpy()
        return np.stack([f1, np.ones(len(answers))], axis=1)

    def value(self, sums: np.ndarray) -> np.ndarray:
        return sums[..., 0] / sums[..., 1]
