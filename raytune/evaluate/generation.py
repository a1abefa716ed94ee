"""Answers written by a model: greedy, in batches of similar length."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase


@torch.inference_mode()
def write_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    stop_ids: Sequence[int] = (),
) -> list[str]:
    """Continue each prompt greedily until it ends its turn or has `max_new_tokens`.

    Args:
        model: a causal language model of transformers, or PEFT's around one.
        prompts: token ids of each prompt, ending where the answer begins.
        max_new_tokens: longest answer, in tokens.
        batch_size: prompts continued at once. Neighbours in length share a batch, so that little is padded.
        stop_ids: tokens that end a turn, beside those that the model and its tokenizer name.

    Returns:
        The answers' text, in the order of the prompts, without special tokens.
    """
    device = next(model.parameters()).device
    pad: Any = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    own: Any = model.generation_config.eos_token_id
    also: Any = tokenizer.eos_token_id
    stops = {*stop_ids, *(own if isinstance(own, list) else [own]), also} - {None}
    answers = [""] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(by_length), batch_size):
        indices = by_length[start : start + batch_size]
        longest = len(prompts[indices[-1]])
        input_ids = torch.full((len(indices), longest), pad, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for row, index in enumerate(indices):
            length = len(prompts[index])
            input_ids[row, longest - length :] = torch.tensor(prompts[index])
            attention_mask[row, longest - length :] = 1
        written = model.generate(
            input_ids.to(device),
            attention_mask=attention_mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=pad,
            eos_token_id=sorted(stops),
        )
        texts = tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)
        for index, text in zip(indices, texts):
            answers[index] = text
    return answers
