"""Rows per CPU-second from a file to tokens and targets on disk: raytune's store against `datasets.map` with the same tokenizer.

    python -m tests.bench.data_preparation --output
    python -m tests.bench.data_preparation --memory 10000 100000 1000000 --output

All read GSM8K's rows as chats from the same jsonl file, write the same token ids and the same mask to Arrow files, and start
without a cache. raytune also hashes the file, checks every row and packs. The rivals are row by row and in batches with
`return_assistant_tokens_mask`, for which their template has `{% generation %}` markers; and what is fastest by hand where a chat
has one answer behind a special token: question and answer are tokenised apart, so that the mask is a matter of lengths. What
raytune keeps of words that it met is forgotten before each round; the tokenizer keeps what it has met.

With `--memory`, instead: the peak of a process that builds a store of so many short rows.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}

import datasets
import pyarrow.compute as pc
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from raytune.config.sections.data import DataSource
from raytune.data.store import tokenising
from raytune.data.store.build import build_store
from raytune.data.store.request import StoreRequest
from raytune.data.store.store import StoreInfo
from raytune.data.templates.text import TEMPLATES_FOLDER
from raytune.data.templates.tokenizers import open_tokenizer, tokenizer_fingerprint
from tests.bench.measure import Rival, interleaved, ratios, report

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"
OURS, ROWS, BATCHES = "raytune", "datasets.map", "datasets.map(batched=True)"
APART = "datasets.map(batched=True), answers apart"
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
    parser.add_argument("--memory", type=int, nargs="+", metavar="ROWS", help="measure the peak of memory instead")
    parser.add_argument("--output", action="store_true", help="append the figures to baselines/data_preparation.jsonl")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        if options.memory:
            measure_memory(Path(folder), options)
        else:
            compare(Path(folder), options)


def compare(folder: Path, options: argparse.Namespace) -> None:
    rows = [json.loads(line) for line in options.data.read_text().splitlines()]
    tokenizer = make_tokenizer(folder / "tokenizer", rows, options.vocabulary)
    chats = folder / "chats.jsonl"
    chats.write_text("".join(json.dumps({"messages": as_turns(row)}) + "\n" for row in rows))
    counts: dict[str, tuple[int, int]] = {}
    one_chat = folder / "one.jsonl"
    one_chat.write_text(chats.read_text().partition("\n")[0])

    def forgetful() -> Callable[[], object]:
        tokenising._encoder_and_template.cache_clear()
        with_raytune(one_chat, tokenizer)
        return lambda: counts.update({OURS: with_raytune(chats, tokenizer)})

    rivals: dict[str, Rival] = {
        OURS: forgetful,
        ROWS: lambda: lambda: counts.update({ROWS: with_datasets(chats, by_markers(tokenizer), batched=False)}),
        BATCHES: lambda: lambda: counts.update({BATCHES: with_datasets(chats, by_markers(tokenizer), batched=True)}),
        APART: lambda: lambda: counts.update({APART: with_datasets(chats, answers_apart(tokenizer), batched=True)}),
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


def with_datasets(chats: Path, tokenise: Callable[[dict[str, Any]], dict[str, Any]], *, batched: bool) -> tuple[int, int]:
    loaded = datasets.load_dataset("json", data_files=str(chats), split="train", cache_dir=mkdtemp(dir=chats.parent))
    mapped = loaded.map(tokenise, batched=batched, remove_columns=["messages"], load_from_cache_file=False)
    table = mapped.data
    num_tokens = pc.sum(pc.list_value_length(table["input_ids"])).as_py()
    return num_tokens, pc.sum(pc.list_flatten(table["is_target"])).as_py()


def by_markers(tokenizer: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def tokenise(row: dict[str, Any]) -> dict[str, Any]:
        encoded = tokenizer.apply_chat_template(
            row["messages"], chat_template=MARKED_CHATML, return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": encoded["input_ids"], "is_target": encoded["assistant_masks"]}

    return tokenise


def answers_apart(tokenizer: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    template = (TEMPLATES_FOLDER / "chatml.jinja").read_text()
    asked = {"chat_template": template, "tokenize": False}

    def tokenise(rows: dict[str, Any]) -> dict[str, Any]:
        texts = tokenizer.apply_chat_template(rows["messages"], **asked)
        prompts = tokenizer.apply_chat_template([chat[:-1] for chat in rows["messages"]], add_generation_prompt=True, **asked)
        answers = [text[len(prompt) :] for text, prompt in zip(texts, prompts)]
        before, behind = (
            tokenizer(pieces, add_special_tokens=False, return_attention_mask=False)["input_ids"] for pieces in (prompts, answers)
        )
        # The line break that ends a turn is no target.
        masks = [[0] * len(one) + [1] * (len(other) - 1) + [0] for one, other in zip(before, behind)]
        return {"input_ids": [one + other for one, other in zip(before, behind)], "is_target": masks}

    return tokenise


def measure_memory(folder: Path, options: argparse.Namespace) -> None:
    """The peak of a process of its own for each number of rows, above that of one with a hundredth of the first."""
    rows = [json.loads(line) for line in options.data.read_text().splitlines()]
    make_tokenizer(folder / "tokenizer", rows, options.vocabulary)
    for num_rows in [options.memory[0] // 100, *options.memory]:
        chats = folder / f"{num_rows}.jsonl"
        with chats.open("w") as file:
            for number in range(num_rows):
                row = rows[number % len(rows)]
                short = {"question": f"{number}: {row['question'][:60]}", "answer": row["answer"][-20:]}
                file.write(json.dumps({"messages": as_turns(short)}) + "\n")
        run = subprocess.run(
            [sys.executable, "-c", PEAK, str(chats), str(folder / "tokenizer")], capture_output=True, text=True, check=True
        )
        seconds, peak = run.stdout.split()[-2:]
        chats.unlink()
        figures = {"rows": num_rows, "rows_per_cpu_s": round(num_rows / float(seconds)), "peak_mib": round(int(peak) / 1024)}
        report("data_preparation", {"rival": OURS, "rows_are": "short", **figures}, options.output)


PEAK = """
import resource, sys, time
from pathlib import Path
from tests.bench.data_preparation import open_tokenizer, with_raytune
tokenizer = open_tokenizer(sys.argv[2])
started = time.process_time()
with_raytune(Path(sys.argv[1]), tokenizer)
print(time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


if __name__ == "__main__":
    main()
