"""`raytune generate` on a file of 1,000 prompts beside plain transformers at its best: CPU seconds from the file of prompts
to the file of answers.

    python -m tests.bench.generate_file --output

1,000 rows of 8 to 256 characters in the format `messages`, 24 new tokens each, batches of 16, greedy; a random Llama of 4 layers
and width 256, a token per byte. Plain: read the file, `apply_chat_template`, sort by length, pad on the left, `generate`, decode,
write. Ours does what the verb does, in this process: reads and checks rows, renders and tokenises, hashes and writes each chunk.
Starting Ray, and workers that import their libraries, comes on top of it.
"""

import argparse
import json
import os
import random
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from raytune.evaluation.answers import answer
from raytune.launch.asking.generate import HowToAnswer, answered_rows, chunks_for, prepare_answers, to_json_lines
from raytune.launch.asking.kept_answers import content_of_chunk, hash_of
from raytune.launch.asking.models_to_ask import Named
from raytune.launch.data.rows_to_score import sources_of
from raytune.model.inference import HeldModels
from raytune.storage import write_json
from tests.bench.measure import Rival, interleaved, ratios, report
from tests.tiny import save_tiny_model

NUM_PROMPTS, NUM_NEW, BATCH = 1000, 24, 16
LENGTHS = (8, 256)
PLAIN, OURS = "plain, by length", "raytune, one process"
GOAL = 0.95
"""Least throughput of ours, as a share of the plain loop's."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", action="store_true", help="append to the baselines")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8}
        save_tiny_model(folder / "model", **shape, num_key_value_heads=4)
        chance = random.Random(0)
        texts = ("".join(chance.choices("abcdefgh ", k=chance.randint(*LENGTHS))) for _ in range(NUM_PROMPTS))
        rows = ({"messages": [{"role": "user", "content": text}]} for text in texts)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        rivals: dict[str, Rival] = {PLAIN: lambda: lambda: plain(folder), OURS: lambda: lambda: ours(folder)}
        seconds = interleaved(rivals, arguments.rounds)
        written = [answers_in(folder / f"{name}.jsonl") for name in ("plain", "ours")]
    report(
        "generate_file",
        {
            "cpu_s": {name: round(statistics.median(found), 2) for name, found in seconds.items()},
            "throughput_of_ours_against_plain": ratios(seconds[PLAIN], seconds[OURS]),
            "goal": GOAL,
            "same_answers": sum(map(str.__eq__, *written)),
            "prompts": NUM_PROMPTS,
            "rounds": arguments.rounds,
        },
        arguments.output,
    )


@torch.inference_mode()
def plain(folder: Path) -> None:
    """What anybody would write who cares for speed."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    rows = [json.loads(line)["messages"] for line in (folder / "rows.jsonl").read_text().splitlines()]
    prompts = tokenizer.apply_chat_template(rows, add_generation_prompt=True, return_dict=False)
    order = sorted(range(len(rows)), key=lambda row: len(prompts[row]))
    answers = [""] * len(rows)
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        padded = tokenizer.pad({"input_ids": [prompts[row] for row in batch]}, padding_side="left", return_tensors="pt")
        written = model.generate(**padded, max_new_tokens=NUM_NEW, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        texts = tokenizer.batch_decode(written[:, padded["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, text in zip(batch, texts, strict=True):
            answers[row] = text
    lines = (json.dumps({"prompt": row, "answer": text}) + "\n" for row, text in zip(rows, answers, strict=True))
    (folder / "plain.jsonl").write_text("".join(lines))


def ours(folder: Path) -> None:
    how = HowToAnswer(max_new_tokens=NUM_NEW, batch_size=BATCH)
    prepared = prepare_answers(Named(model=str(folder / "model")), sources_of([str(folder / "rows.jsonl")], "auto", None), how)
    (one,) = prepared.to_ask.subjects
    given = {}
    with HeldModels(torch.device("cpu")) as models:
        for chunk in chunks_for(prepared, one.name):
            with models.asked(one.asked) as loaded:
                found = answer(loaded, chunk.suite, chunk.rows)
            write_json(
                f"{folder}/chunks/{hash_of(content_of_chunk(chunk))}.json", {row: text.text for row, text in found.items()}
            )
            given |= {(one.name, row): text for row, text in found.items()}
    (folder / "ours.jsonl").write_bytes(to_json_lines(answered_rows(prepared, given)))


def answers_in(path: Path) -> list[str]:
    return [json.loads(line)["answer"] for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main()
