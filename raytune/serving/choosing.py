"""The next token of each answer: the likeliest, or one that is drawn by numbers of its request's own; and log-probabilities.

Shapes: B rows, V vocabulary.
"""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedTokenizerBase, StoppingCriteriaList, StopStringCriteria

from raytune.evaluation.answer_text import token_text
from raytune.evaluation.sampling import numbers_of_row, taken_tokens, warpers
from raytune.model.files.stopping import as_ids
from raytune.plan.run_plan import SamplingPlan
from raytune.serving.refusals import UnfitError
from raytune.serving.requests import Request, Token


class Settings:
    """What a model's own settings of generation do to what it writes, as its `generate` obeys them.

    Args:
        model: of transformers, with the settings of the one that is asked.

    Raises:
        UnfitError: if they ask for what is not done token by token.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        # The three calls by which `generate` of transformers 5.23 reads its settings.
        config, _ = model._prepare_generation_config(None, do_sample=False, num_beams=1)
        model._prepare_special_tokens(config, kwargs_has_attention_mask=True, device=model.device)
        if config.guidance_scale not in (None, 1):
            raise UnfitError(
                f"The model's generation_config.json asks for guidance_scale {config.guidance_scale}, for which every token "
                f"takes two passes; that is not served. Take it out of the file."
            )
        self._config = config
        self.stops = frozenset(as_ids(config.eos_token_id))
        self._changes_scores = bool(self._processors(model, 1, 1))
        texts = config.stop_strings
        self._ends = StoppingCriteriaList([StopStringCriteria(tokenizer, texts)] if texts else [])

    def processors(self, model: Any, prompt_length: int, max_new_tokens: int) -> LogitsProcessorList:
        """What changes the scores of a row's tokens, one answer long; the model is not kept."""
        return self._processors(model, prompt_length, max_new_tokens) if self._changes_scores else LogitsProcessorList()

    def ends(self, ids: list[int]) -> bool:
        """Whether the tokens of a row, the prompt's with it, end in a text that ends an answer and is part of it."""
        return bool(self._ends) and bool(self._ends(torch.tensor([ids]), None).item())  # pyright: ignore[reportArgumentType]

    def _processors(self, model: Any, prompt_length: int, max_new_tokens: int) -> LogitsProcessorList:
        self._config.max_length = prompt_length + max_new_tokens
        return model._get_logits_processor(self._config, input_ids_seq_length=prompt_length, device=model.device, model_kwargs={})


class Choice:
    """Chooses the tokens of one answer."""

    def __init__(self, request: Request, settings: Settings, model: Any) -> None:
        self._processors = settings.processors(model, len(request.prompt), request.max_new_tokens)
        self._warpers, self._numbers = LogitsProcessorList(), None
        if request.temperature > 0:
            sampling = SamplingPlan(
                temperature=request.temperature,
                top_p=request.top_p if request.top_p < 1 else None,
                top_k=request.top_k,
                seed=random.SystemRandom().getrandbits(32) if request.seed is None else request.seed,
            )
            self._warpers = warpers(sampling)
            self._numbers = numbers_of_row(sampling.seed, 0, request.max_new_tokens)

    @property
    def is_likeliest(self) -> bool:
        """Whether it is the largest logit each time."""
        return self._numbers is None and not self._processors

    def of(self, ids: list[int], num_generated: int, logits_V: Tensor) -> int:
        """
        Args:
            ids: of the prompt, and what was generated.
            logits_V: in fp32.
        """
        ids_1L: Any = torch.tensor([ids], device=logits_V.device)
        scores_1V: Any = self._processors(ids_1L, logits_V[None].clone())  # pyright: ignore[reportArgumentType]
        if self._numbers is None:
            return int(scores_1V.argmax())
        warped_1V: Any = self._warpers(ids_1L, scores_1V)
        number = self._numbers[num_generated : num_generated + 1].to(logits_V.device)
        return int(taken_tokens(warped_1V, number).item())


def chosen_tokens(logits_BV: Tensor, choices: list[Callable[[Tensor], int] | None]) -> list[int | None]:
    """A token for each row; None where the model gave no numbers.

    Args:
        logits_BV: in fp32.
        choices: of each row; None: the likeliest.
    """
    # One wait for the device, whatever the number of rows.
    likeliest, broken = torch.stack([logits_BV.argmax(-1), logits_BV.isnan().any(-1).long()]).tolist()
    return [
        None if is_broken else token if choose is None else choose(logits_V)
        for token, is_broken, choose, logits_V in zip(likeliest, broken, choices, logits_BV, strict=True)
    ]


def told_token(tokenizer: PreTrainedTokenizerBase, token: int, logits_V: Tensor, num_likeliest: int) -> Token:
    """A chosen token with its log-probability, and those of the likeliest."""
    log_probabilities = logits_V.log_softmax(-1)
    most = log_probabilities.topk(min(num_likeliest, len(logits_V)))
    return Token(
        id=token,
        text=token_text(tokenizer, token),
        logprob=log_probabilities[token].item(),
        likeliest=tuple(
            (other, token_text(tokenizer, other), value)
            for other, value in zip(most.indices.tolist(), most.values.tolist(), strict=True)
        ),
    )
