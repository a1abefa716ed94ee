"""Tokens drawn by chance, for each row from numbers of its own: what is drawn depends on neither batches nor workers.

Shapes: B rows of a batch, V vocabulary.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from raytune.errors import UserError
from raytune.plan.run_plan import SamplingPlan

_COLDEST = 1e-20
"""Temperature below which nothing changes any more: of different logits all but the largest have a probability of 0. Divided by
much smaller ones they would be infinite, and no longer differ."""


class DrawnTokens(LogitsProcessor):
    """Leaves of each row's next token the one that is drawn, so that a greedy search takes it. For one batch.

    The token is where a number, uniform in 0..1, lies among the cumulated probabilities: one number per row and token.

    Args:
        rows: numbers of the rows in their suite.
    """

    def __init__(self, sampling: SamplingPlan, rows: Sequence[int], max_new_tokens: int, device: torch.device) -> None:
        self._warpers = warpers(sampling)
        numbers = [numbers_of_row(sampling.seed, row, max_new_tokens) for row in rows]
        self._numbers = torch.stack(numbers).to(device)
        self._num_drawn = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        warped_BV = self._warpers(input_ids, scores.float())  # pyright: ignore[reportArgumentType]
        tokens_B = taken_tokens(warped_BV, self._numbers[:, self._num_drawn])
        self._num_drawn += 1
        return torch.full_like(scores, -torch.inf).scatter(1, tokens_B[:, None], 0.0)


def sampling_plan(*, temperature: float | None, top_k: int | None, top_p: float | None, seed: int) -> SamplingPlan | None:
    """How tokens are drawn. None: not at all, since no temperature, or 0, means the likeliest token each time.

    Raises:
        UserError: if the rest says how to draw, and nothing is drawn; or a number is none for it.
    """
    if not 0 <= (temperature or 0) < math.inf:
        raise UserError(f"temperature is {temperature}, expected 0 or more.")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}, expected a share above 0 and at most 1.")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k is {top_k}, expected a number of tokens.")
    if temperature:
        return SamplingPlan(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    given = {"top_k": top_k, "top_p": top_p}
    if name := next((name for name, value in given.items() if value is not None), None):
        raise UserError(f"{name} is {given[name]}, but nothing is drawn: the likeliest token is taken. Set a temperature too.")
    return None


def refuse_none(name: str, value: int) -> None:
    """
    Raises:
        UserError: if a number of tokens or answers is less than 1.
    """
    if value < 1:
        raise UserError(f"{name} is {value}, and 1 is the least.")


def warpers(sampling: SamplingPlan) -> LogitsProcessorList:
    """What is done to scores before a token is drawn by them."""
    temperature = _COLDEST if 0 < sampling.temperature < _COLDEST else sampling.temperature
    found: list[LogitsProcessor] = [TemperatureLogitsWarper(temperature)]
    found += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k is not None else []
    found += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p is not None else []
    return LogitsProcessorList(found)


def taken_tokens(warped_BV: Tensor, numbers_B: Tensor) -> Tensor:
    """The token of each row at which a number, uniform in 0..1, lies among its cumulated probabilities."""
    cumulated_BV = warped_BV.double().softmax(-1).cumsum(-1)
    places_B1 = numbers_B[:, None] * cumulated_BV[:, -1:]
    tokens_B1 = torch.searchsorted(cumulated_BV, places_B1, right=True)  # the first with more: one that has a probability
    return tokens_B1[:, 0].clamp(max=warped_BV.shape[-1] - 1)


def numbers_of_row(seed: int, row: int, count: int) -> Tensor:
    """Numbers, uniform in 0..1, by which the tokens of a row are drawn."""
    own = int.from_bytes(hashlib.sha256(f"{seed}/{row}".encode()).digest()[:8], "big") >> 1
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(own))
