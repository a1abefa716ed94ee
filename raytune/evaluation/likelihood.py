"""How likely texts are to a model: log-probabilities of some of their tokens, in batches.

Rows are padded on the right, where nothing that counts can see it: tokens of a causal model look back only. Shapes: B rows, T
tokens, V vocabulary, C counted tokens of all rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from raytune.evaluation.generation import without_position_warnings

LOGITS_AT_ONCE = 1 << 28
"""Logits of a batch, at most: 1 GiB in fp32. A longer row passes alone."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A text, and those of its tokens whose probability is asked for."""

    ids: Sequence[int]
    counted: Sequence[int]
    """Their places, from 1: before the first token nothing predicts it."""


@torch.inference_mode()
@without_position_warnings()
def log_likelihoods(model: Any, texts: Sequence[Scored], *, batch_size: int) -> list[float]:
    """The sum of the log-probabilities of each text's counted tokens, in nats, each given all tokens before it.

    Args:
        model: a causal language model of transformers, or PEFT's around one.
        batch_size: texts that pass together at most.
    """
    device = next(model.parameters()).device
    vocabulary = model.config.get_text_config().vocab_size
    sums = [0.0] * len(texts)
    for indices in _batches([len(text.ids) for text in texts], batch_size, vocabulary):
        longest = len(texts[indices[0]].ids)
        input_ids = torch.zeros((len(indices), longest), dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for row, index in enumerate(indices):
            length = len(texts[index].ids)
            input_ids[row, :length] = torch.tensor(texts[index].ids)
            attention_mask[row, :length] = 1
        counted = [(row, place) for row, index in enumerate(indices) for place in texts[index].counted]
        rows_C, places_C = torch.tensor(counted, dtype=torch.long, device=device).reshape(-1, 2).T
        input_ids = input_ids.to(device)
        logits_BTV = model(input_ids=input_ids, attention_mask=attention_mask.to(device), use_cache=False).logits
        logits_BTV = logits_BTV[:, -longest:]  # virtual tokens come before those of the text
        picked_CV = logits_BTV[rows_C, places_C - 1].float()
        found_C = picked_CV.log_softmax(-1).gather(1, input_ids[rows_C, places_C, None])[:, 0].double()
        of_rows = torch.zeros(len(indices), dtype=torch.float64, device=device).index_add_(0, rows_C, found_C)
        for index, value in zip(indices, of_rows.tolist(), strict=True):
            sums[index] = value
    return sums


def _batches(lengths: Sequence[int], batch_size: int, vocabulary: int) -> Iterator[list[int]]:
    """Indices of texts that pass together, the longest first: what does not fit into memory fails at once."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        count = max(1, min(batch_size, LOGITS_AT_ONCE // (vocabulary * max(1, lengths[order[0]]))))
        yield order[:count]
        order = order[count:]
