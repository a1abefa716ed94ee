"""Batched answers against plain transformers: tokens per CPU second of `write_answers` and of three loops around `generate`.

    python -m tests.bench.generation --output

64 prompts of 8 to 256 tokens, 24 new tokens each, batches of 16, greedy; a random Llama of 4 layers and width 256. The loops ask
a row at a time, in batches in the order of the file, and in batches of similar length, which is plain transformers at its best
and what `write_answers` does as well: it has to lose nothing by reading stops, special tokens and draws. All four write the same.
"""

import argparse
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import torch

from raytune.evaluation.generation import write_answers
from tests.bench.measure import Rival, interleaved, ratios, report
from tests.tiny import tiny_model, tiny_tokenizer

NUM_PROMPTS, NUM_NEW, BATCH = 64, 24, 16
LENGTHS = (8, 256)
ALONE, IN_ORDER, BY_LENGTH, OURS = "a row at a time", "batches in order", "batches by length", "raytune"
GOAL = 1.05
"""Most CPU seconds that ours may take, as a share of plain batches by length."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", action="store_true", help="append to the baselines")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8}
    model = tiny_model(**shape, num_key_value_heads=4).eval()
    tokenizer = tiny_tokenizer()
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(*LENGTHS, (NUM_PROMPTS,), generator=random).tolist()
    prompts = [torch.randint(0, 256, (length,), generator=random).tolist() for length in lengths]
    in_order = list(range(NUM_PROMPTS))
    by_length = sorted(in_order, key=lambda row: lengths[row])

    def plain(order: Sequence[int], batch: int) -> list[str]:
        return plain_answers(model, tokenizer, prompts, order, batch)

    ways: dict[str, Callable[[], list[str]]] = {
        ALONE: lambda: plain(in_order, 1),
        IN_ORDER: lambda: plain(in_order, BATCH),
        BY_LENGTH: lambda: plain(by_length, BATCH),
        OURS: lambda: write_answers(model, tokenizer, prompts, max_new_tokens=NUM_NEW, batch_size=BATCH),
    }
    written = {name: way() for name, way in ways.items()}  # which warms up, too
    same = {name: sum(one == other for one, other in zip(answers, written[OURS])) for name, answers in written.items()}
    rivals: dict[str, Rival] = {name: (lambda way=way: way) for name, way in ways.items()}
    seconds = interleaved(rivals, arguments.rounds)
    report(
        "generation",
        {
            "tokens_per_cpu_s": {
                name: round(NUM_PROMPTS * NUM_NEW / statistics.median(found)) for name, found in seconds.items()
            },
            "cpu_s_of_ours_against": {name: ratios(seconds[OURS], seconds[name]) for name in (ALONE, IN_ORDER, BY_LENGTH)},
            "goal": GOAL,
            "same_answers": same,
            "prompts": NUM_PROMPTS,
            "rounds": arguments.rounds,
        },
        arguments.output,
    )


@torch.inference_mode()
def plain_answers(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], order: Sequence[int], batch: int) -> list[str]:
    """What anybody would write: pad on the left, generate, decode."""
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        padded = tokenizer.pad({"input_ids": [prompts[row] for row in rows]}, padding_side="left", return_tensors="pt")
        written = model.generate(**padded, max_new_tokens=NUM_NEW, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        texts = tokenizer.batch_decode(written[:, padded["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, text in zip(rows, texts, strict=True):
            answers[row] = text
    return answers


if __name__ == "__main__":
    main()
