"""Answers written by a model, in batches of similar length."""

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedTokenizerBase

from raytune.evaluation.sampling import DrawnTokens
from raytune.model.stopping import as_ids
from raytune.plan.run_plan import SamplingPlan


@contextmanager
def without_position_warnings() -> Iterator[None]:
    """Context in which PEFT does not warn that under prompts the model itself counts positions, as it is asked to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Position ids are not supported for parameter efficient tuning")
        yield


@torch.inference_mode()
@without_position_warnings()
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
) -> list[str]:
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
        The answers' text up to where they stop, in the order of the prompts, without other special tokens.
    """
    device = next(model.parameters()).device
    stops = as_ids(model.generation_config.eos_token_id)
    pad: Any = next((token for token in (tokenizer.pad_token_id, *stops) if token is not None), 0)
    added = {number: token for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    specials = {*tokenizer.all_special_ids, *added}
    kept_ids: Any = tokenizer.convert_tokens_to_ids([*kept])
    left_out = specials - {*kept_ids}
    answers = [""] * len(prompts)
    numbers = range(len(prompts)) if rows is None else rows
    for indices in _batches([len(prompt) for prompt in prompts], batch_size, can_pad=can_pad):
        longest = len(prompts[indices[-1]])
        input_ids = torch.full((len(indices), longest), pad, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for row, index in enumerate(indices):
            length = len(prompts[index])
            input_ids[row, longest - length :] = torch.tensor(prompts[index])
            attention_mask[row, longest - length :] = 1
        draw = [DrawnTokens(sampling, [numbers[index] for index in indices], max_new_tokens, device)] if sampling else []
        written = model.generate(
            input_ids.to(device),
            attention_mask=attention_mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=num_beams,
            logits_processor=LogitsProcessorList(draw),
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=pad,
            tokenizer=tokenizer,  # for texts that end an answer, where the model's own settings have some
        )
        answered = [_before_stop(ids, stops) for ids in written[:, longest:].tolist()]
        texts = tokenizer.batch_decode([[one for one in ids if one not in left_out] for ids in answered])
        for index, text in zip(indices, texts, strict=True):
            answers[index] = text
    return answers


def _batches(lengths: Sequence[int], batch_size: int, *, can_pad: bool) -> Iterator[list[int]]:
    """Indices of prompts that are continued together, shortest first."""
    by_length = sorted(range(len(lengths)), key=lambda index: lengths[index])
    groups = [by_length] if can_pad else [list(group) for _, group in groupby(by_length, key=lambda index: lengths[index])]
    for group in groups:
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def _before_stop(ids: list[int], stops: Sequence[int]) -> list[int]:
    """What comes before the first token that ends a turn; such a token need not be a special one, which decoding leaves out."""
    return ids[: next((place for place, token in enumerate(ids) if token in stops), len(ids))]
