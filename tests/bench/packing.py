"""How full packed rows are, and what packing takes: raytune's best fit against TRL's, on GSM8K's lengths; memory by documents.

    python -m tests.bench.packing --output
    PYTHONPATH=FOLDER_WITH_TRL:. python -m tests.bench.packing --output

TRL packs a data set in memory; raytune reads tokenised shards, and writes rows with files, lines and counts. So rows are compared
for how full they are; seconds stand beside them. TRL is left out where it is not installed.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import numpy as np

from raytune.data.store.packing import PACKINGS
from raytune.data.templates.text import TEMPLATES_FOLDER
from tests.bench.data_preparation import GSM8K, as_turns, make_tokenizer
from tests.bench.measure import report

ROW_LENGTH = 2048
EXPECTED_FILL = 0.98
DOCUMENTS = (10_000, 100_000, 1_000_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=GSM8K, help="GSM8K's train.jsonl")
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--output", action="store_true", help="append the figures to baselines/packing.jsonl")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        compare_fill(Path(folder), options)
        measure_memory(Path(folder), options)


def compare_fill(folder: Path, options: argparse.Namespace) -> None:
    rows = [json.loads(line) for line in options.data.read_text().splitlines()]
    tokenizer = make_tokenizer(folder / "tokenizer", rows, options.vocabulary)
    template = (TEMPLATES_FOLDER / "chatml.jinja").read_text()
    chats = [as_turns(row) for row in rows]
    ids = tokenizer.apply_chat_template(chats, chat_template=template, return_dict=True)["input_ids"]
    lengths = np.array([len(one) for one in ids])
    for name, packed in PACKINGS.items():
        started_s = time.process_time()
        num_rows = len(packed(lengths, ROW_LENGTH))
        report("packing", _figures(f"raytune {name}", lengths, num_rows, time.process_time() - started_s), options.output)
    if importlib.util.find_spec("trl") is None:
        return
    from trl.data_utils import pack_dataset

    for strategy in ("bfd", "wrapped"):
        unpacked = datasets.Dataset.from_dict({"input_ids": ids})
        started_s = time.process_time()
        num_rows = len(pack_dataset(unpacked, ROW_LENGTH, strategy))
        figures = _figures(f"trl {strategy}", lengths, num_rows, time.process_time() - started_s)
        report("packing", figures | {"trl": importlib.metadata.version("trl")}, options.output)


def measure_memory(folder: Path, options: argparse.Namespace) -> None:
    for count in DOCUMENTS:
        own = folder / str(count)
        own.mkdir()
        for argument in (count, 0):
            command = [sys.executable, "-m", "tests.synthetic_shards", str(argument), str(own)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = {name: round(value, 4) for name, value in json.loads(output).items()}
        report("packing", {"rival": "raytune, tokenised shards to files of rows"} | found, options.output)


def _figures(rival: str, lengths: np.ndarray, num_rows: int, cpu_s: float) -> dict[str, Any]:
    fill = lengths.sum() / (num_rows * ROW_LENGTH)
    figures = {"rival": rival, "documents": len(lengths), "tokens": int(lengths.sum()), "row_length": ROW_LENGTH}
    figures |= {"rows": num_rows, "fill": round(float(fill), 4), "cpu_s": round(cpu_s, 3)}
    if rival != "raytune best_fit":
        return figures
    return figures | {"expected": EXPECTED_FILL, "verdict": "met" if fill >= EXPECTED_FILL else "missed"}


if __name__ == "__main__":
    main()
