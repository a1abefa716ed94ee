"""LLaMA-Factory's supervised training on rows packed as its `neat_packing` does, for `throughput`.

    PYTHON tests/bench/llama_factory.py SETTINGS.json

It needs other versions of transformers and PEFT than raytune, so it runs under an interpreter of its own, which has it, and
imports nothing of this repository. Settings are `rows` (documents with input_ids and labels), `row_length`, `pad`, and
`arguments`, its own. Prints a JSON line: CPU seconds of training alone, and the loss of each update.
"""

import json
import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ |= {
    "DISABLE_VERSION_CHECK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}

import torch
import transformers
from datasets import Dataset, DatasetDict
from llamafactory.data.processor.processor_utils import greedy_knapsack  # pyright: ignore[reportMissingImports]
from llamafactory.train.tuner import run_exp  # pyright: ignore[reportMissingImports]

IGNORED = -100


def packed(documents, row_length, pad):
    """Rows as its PackedSupervisedDatasetProcessor makes them of documents, a token longer than what it packs into. Its collator
    pads tokens to a multiple of eight, but not their positions; so the rows are of one."""
    by_length = {}
    for document in documents:
        by_length.setdefault(len(document["input_ids"]), []).append(document)
    rows = []
    for lengths in greedy_knapsack([len(document["input_ids"]) for document in documents], row_length - 1):
        row = {"input_ids": [], "attention_mask": [], "position_ids": [], "labels": []}
        for number, length in enumerate(lengths):
            document = by_length[length].pop()
            row["input_ids"] += document["input_ids"]
            row["labels"] += document["labels"]
            row["attention_mask"] += [number + 1] * length
            row["position_ids"] += range(length)
        missing = row_length - len(row["input_ids"])
        for name, value in (("input_ids", pad), ("labels", IGNORED), ("attention_mask", 0), ("position_ids", 0)):
            row[name] += [value] * missing
        rows.append(row)
    return rows


def main():
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    rows = packed(settings["rows"], settings["row_length"], settings["pad"])
    found = {}
    train = transformers.Trainer.train

    def timed(trainer, *arguments, **named):
        started = time.process_time()
        result = train(trainer, *arguments, **named)
        found["cpu_s"] = time.process_time() - started
        found["losses"] = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        return result

    transformers.Trainer.train = timed  # pyright: ignore[reportAttributeAccessIssue]
    with TemporaryDirectory() as folder:
        DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(f"{folder}/rows")
        run_exp(
            settings["arguments"]
            | {
                "tokenized_path": f"{folder}/rows",
                "output_dir": f"{folder}/output",
                "gradient_accumulation_steps": len(rows),
                "cutoff_len": settings["row_length"] - 1,
            }
        )
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
