"""Rows per CPU-second from a file to tokens and targets on disk: raytune's store against `datasets.map` with the same tokenizer.

    python -m tests.bench.data_preparation --output

Both read GSM8K's rows as chats from the same jsonl file, write the same token ids and the same mask to Arrow files, and start
without a cache. The rivals get a template with `{% generation %}` markers, which `datasets.map` needs for a mask; raytune also
hashes the file, checks every row and packs.
"""

import argparse
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}

import datasets
import pyarrow.compute as pc
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from raytune.config.sections.data import DataSource
from raytune.data.store.build import build_store
from raytune.data.store.request import StoreRequest
from raytune.data.store.store import StoreInfo
from raytune.data.templates.text import TEMPLATES_FOLDER
from raytune.data.templates.tokenizers import open_tokenizer, tokenizer_fingerprint
from tests.bench.measure import Rival, interleaved, ratios, report

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"
OURS, ROWS, BATCHES = "raytune", "datasets.map", "datasets.map(batched=True)"
EXPECTED = 1.3
MARKED_CHATML = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}{%- if message.role == 'assistant' %}"
    "{%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}"
    "{%- else %}{{- message.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=GSM8K, help="GSM8K's train.jsonl")
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", action="store_true", help="append the figures to baselines/data_preparation.jsonl")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        compare(Path(folder), options)


def compare(folder: Path, options: argparse.Namespace) -> None:
    rows = [json.loads(line) for line in options.data.read_text().splitlines()]
    tokenizer = make_tokenizer(folder / "tokenizer", rows, options.vocabulary)
    chats = folder / "chats.jsonl"
    chats.write_text("".join(json.dumps({"messages": as_turns(row)}) + "\n" for row in rows))
    counts: dict[str, tuple[int, int]] = {}
    rivals: dict[str, Rival] = {
        OURS: lambda: lambda: counts.update({OURS: with_raytune(chats, tokenizer)}),
        ROWS: lambda: lambda: counts.update({ROWS: with_datasets(chats, tokenizer, batched=False)}),
        BATCHES: lambda: lambda: counts.update({BATCHES: with_datasets(chats, tokenizer, batched=True)}),
    }
    interleaved(rivals, 1)  # loads what is loaded once per process
    assert len(set(counts.values())) == 1, counts
    seconds = interleaved(rivals, options.rounds)
    for name in rivals:
        figures: dict[str, Any] = {
            "rival": name,
            "cpu_s": [round(second, 2) for second in seconds[name]],
            "rows_per_cpu_s": round(len(rows) / min(seconds[name])),
            "rows": len(rows),
            "tokens": counts[name][0],
            "targets": counts[name][1],
            "vocabulary": options.vocabulary,
            "datasets": datasets.__version__,
        }
        if name != OURS:
            faster = ratios(seconds[name], seconds[OURS])
            met = min(faster.values()) >= EXPECTED
            figures |= {"ours_is_faster": faster, "expected": EXPECTED, "verdict": "met" if met else "missed"}
        report("data_preparation", figures, options.output)


def as_turns(row: dict[str, str]) -> list[dict[str, str]]:
    return [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]


def make_tokenizer(folder: Path, rows: list[dict[str, str]], vocabulary: int) -> Any:
    """Train a byte-level BPE tokenizer, of the kind of Llama 3 and Qwen, on the rows."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((row["question"] + row["answer"] for row in rows), trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>").save_pretrained(folder)
    return open_tokenizer(str(folder))


def with_raytune(chats: Path, tokenizer: Any) -> tuple[int, int]:
    request = StoreRequest(
        sources=(DataSource(path=str(chats)),),
        template=(TEMPLATES_FOLDER / "chatml.jinja").read_text(),
        targets="assistant",
        max_length=2048,
        too_long="truncate",
        packing="best_fit",
        on_bad_row="error",
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
    )
    info: StoreInfo = build_store(request, tokenizer_path=tokenizer.name_or_path, folder=mkdtemp(dir=chats.parent))
    return info.num_tokens, info.num_targets


def with_datasets(chats: Path, tokenizer: Any, *, batched: bool) -> tuple[int, int]:
    def tokenise(row: dict[str, Any]) -> dict[str, Any]:
        encoded = tokenizer.apply_chat_template(
            row["messages"], chat_template=MARKED_CHATML, return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": encoded["input_ids"], "is_target": encoded["assistant_masks"]}

    loaded = datasets.load_dataset("json", data_files=str(chats), split="train", cache_dir=mkdtemp(dir=chats.parent))
    mapped = loaded.map(tokenise, batched=batched, remove_columns=["messages"], load_from_cache_file=False)
    table = mapped.data
    num_tokens = pc.sum(pc.list_value_length(table["input_ids"])).as_py()
    return num_tokens, pc.sum(pc.list_flatten(table["is_target"])).as_py()


if __name__ == "__main__":
    main()
