"""Answers written by a model, in batches of similar length."""

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedTokenizerBase, StoppingCriteriaList

from raytune.evaluation.sampling import DrawnTokens
from raytune.model.files.stopping import as_ids
from raytune.plan.run_plan import SamplingPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """An answer, and how it came to its end."""

    text: str
    """Up to where it stops, without special tokens."""
    num_tokens: int
    """Of the answer, without the one that ends it."""
    has_ended: bool
    """Whether the model ended it; else it is as long as it was allowed to be, or nobody wanted more."""


@contextmanager
def without_position_warnings() -> Iterator[None]:
    """Context in which PEFT does not warn that under prompts the model itself counts positions, as it is asked to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Position ids are not supported for parameter efficient tuning")
        yield


class Ends:
    """How answers of a model end, and what of their tokens is text.

    Args:
        model: its `generation_config` says where it stops, as with anyone who loads it.
        kept: texts of special tokens that stay in answers.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, kept: Collection[str] = ()) -> None:
        settings = model.generation_config
        self.stops = as_ids(settings.eos_token_id)
        self.pad: Any = next((token for token in (tokenizer.pad_token_id, *self.stops) if token is not None), 0)
        """What stands behind an answer in a batch of which others go on."""
        texts = getattr(settings, "stop_strings", None) or ()
        self._stop_texts = (texts,) if isinstance(texts, str) else tuple(texts)
        self._tokenizer = tokenizer
        added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        kept_ids: Any = tokenizer.convert_tokens_to_ids([*kept])
        self._left_out = {*tokenizer.all_special_ids, *added} - {*kept_ids}

    def is_text(self, token: int) -> bool:
        return token not in self._left_out

    def written(self, answers: Sequence[Sequence[int]]) -> list[Written]:
        """What tokens of answers come to, each with all that was generated behind its prompt."""
        ends = [self._end(ids) for ids in answers]
        texts = self._texts([ids[: len(ids) if end is None else end] for ids, end in zip(answers, ends, strict=True)])
        return [
            Written(text=text, num_tokens=len(ids) if end is None else end, has_ended=end is not None)
            for ids, end, text in zip(answers, ends, texts, strict=True)
        ]

    def _texts(self, answers: Sequence[Sequence[int]]) -> list[str]:
        return self._tokenizer.batch_decode([[one for one in ids if self.is_text(one)] for ids in answers])

    def _end(self, ids: Sequence[int]) -> int | None:
        """How many tokens come before one that ends a turn, or up to a text that does; None: neither is there.

        Such a token need not be a special one, which decoding leaves out. And behind such a text, transformers 5.23 goes on with
        any tokens while others of the batch go on, where no token ends a turn.
        """
        end = next((place for place, token in enumerate(ids) if token in self.stops), None)
        counts = range(1, (len(ids) if end is None else end) + 1) if self._stop_texts else ()
        texts = ((count, self._texts([ids[:count]])[0]) for count in counts)
        return next((count for count, text in texts if any(stop in text for stop in self._stop_texts)), end)


def write_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    num_beams: int = 1,
    sampling: SamplingPlan | None = None,
    rows: Sequence[int] | None = None,
    kept: Collection[str] = (),
    can_pad: bool = True,
) -> list[Written]:
    """Continue each prompt until it ends its turn or has `max_new_tokens`.

    Args:
        model: a causal language model of transformers, or PEFT's around one. It stops where its `generation_config` says, as with
            anyone who loads it.
        prompts: token ids of each prompt, ending where the answer begins.
        max_new_tokens: longest answer, in tokens.
        batch_size: prompts continued at once. Neighbours in length share a batch, so that little is padded.
        num_beams: of a search for the likeliest answer; 1: the likeliest token each time, or one that is drawn.
        sampling: how it is drawn.
        rows: numbers of the prompts in their suite, from which it is drawn for each. Default: from 0.
        kept: texts of special tokens that stay in the answers.
        can_pad: whether prompts of different lengths may share one. PEFT 0.21 lets the model count padding as positions between
            virtual tokens and a prompt.

    Returns:
        The answers in the order of the prompts.
    """
    ends = Ends(model, tokenizer, kept)
    found: dict[int, Written] = {}
    numbers = range(len(prompts)) if rows is None else rows
    for indices in _batches([len(prompt) for prompt in prompts], batch_size, can_pad=can_pad):
        generated = continued(
            model,
            tokenizer,
            [prompts[index] for index in indices],
            ends,
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            sampling=sampling,
            rows=[numbers[index] for index in indices],
        )
        found |= zip(indices, ends.written(generated), strict=True)
    return [found[index] for index in range(len(prompts))]


@torch.inference_mode()
@without_position_warnings()
def continued(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    ends: Ends,
    *,
    max_new_tokens: int,
    num_beams: int = 1,
    sampling: SamplingPlan | None = None,
    rows: Sequence[int],
    streamer: Any = None,
    unless: StoppingCriteriaList | None = None,
) -> list[list[int]]:
    """The tokens that a model writes behind prompts of one batch.

    Args:
        streamer: of transformers, for a prompt alone: is given the prompt, and then each token.
        unless: what else ends all of it.
    """
    device = next(model.parameters()).device
    input_ids, attention_mask = _padded(prompts, ends.pad)
    draw = [DrawnTokens(sampling, rows, max_new_tokens, device)] if sampling else []
    written = model.generate(
        input_ids.to(device),
        attention_mask=attention_mask.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=num_beams,
        logits_processor=LogitsProcessorList(draw),
        stopping_criteria=unless,
        streamer=streamer,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=ends.pad,
        tokenizer=tokenizer,  # for texts that end an answer, where the model's own settings have some
    )
    return written[:, input_ids.shape[1] :].tolist()


def _padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Prompts behind padding, and where they are."""
    longest = max(map(len, prompts))
    input_ids = torch.full((len(prompts), longest), pad, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, longest - len(prompt) :] = 1
    return input_ids, attention_mask


def _batches(lengths: Sequence[int], batch_size: int, *, can_pad: bool) -> Iterator[list[int]]:
    """Indices of prompts that are continued together, shortest first."""
    by_length = sorted(range(len(lengths)), key=lambda index: lengths[index])
    groups = [by_length] if can_pad else [list(group) for _, group in groupby(by_length, key=lambda index: lengths[index])]
    for group in groups:
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]
