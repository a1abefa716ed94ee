"""Rows that benchmarks train on: GSM8K's, or where they are not at hand, made ones whose questions and answers are as long."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from raytune.data.templates.text import resolve_template

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"
COLUMNS = {"prompt": "question", "completion": "answer"}
PAD, TURN_START, TURN_END = "<pad>", "<|im_start|>", "<|im_end|>"

# Words of GSM8K's training rows at every twentieth: the shortest, 5 %, 10 %, ..., the longest.
QUESTION_WORDS = (9, 23, 27, 29, 31, 33, 34, 36, 38, 40, 42, 44, 46, 48, 51, 54, 57, 62, 69, 79, 183)
ANSWER_WORDS = (4, 18, 23, 26, 29, 32, 35, 38, 41, 44, 47, 50, 54, 57, 61, 66, 71, 78, 87, 102, 216)
ALIKE = 0.5
"""Share of answers that are as long among answers as their questions among questions: lengths are correlated by 0.48."""
NUM_WORDS = 5000
SYLLABLES = [consonant + vowel for consonant in "bdfghklmnprstvw" for vowel in "aeiou"]

Row = dict[str, str]
"""`question` and `answer`."""


def short_rows(num_rows: int, folder: Path = GSM8K, split: str = "train") -> tuple[list[Row], str]:
    """Rows, and in words where they are from."""
    file = folder / f"{split}.jsonl"
    if file.exists():
        lines = file.read_text().splitlines()[:num_rows]
        return [json.loads(line) for line in lines], "GSM8K"
    return made_rows(num_rows, seed=0 if split == "train" else 1), "made, as long as GSM8K's"


def long_rows(num_rows: int, folder: Path = GSM8K, split: str = "train", *, together: int = 12) -> tuple[list[Row], str]:
    """Rows of about `together` times the length: questions one after the other, then their answers."""
    rows, source = short_rows(num_rows * together, folder, split)
    groups = [rows[start : start + together] for start in range(0, len(rows), together)]
    joined = [{key: "\n".join(row[key] for row in group) for key in ("question", "answer")} for group in groups]
    return joined, f"{source}, {together} in a row"


def made_rows(num_rows: int, seed: int) -> list[Row]:
    """Rows of made words, some of them frequent, with the lengths of GSM8K's."""
    choices = random.Random(seed)
    words = random.Random(0)  # the same language, whichever rows
    language = ["".join(words.choices(SYLLABLES, k=words.randint(1, 3))) for _ in range(NUM_WORDS)]
    frequencies = [1 / (rank + 3) for rank in range(NUM_WORDS)]

    def text(length: int) -> str:
        return " ".join(choices.choices(language, frequencies, k=length))

    rows = []
    for _ in range(num_rows):
        place = choices.random()
        other = place if choices.random() < ALIKE else choices.random()
        rows.append({"question": text(_words_at(QUESTION_WORDS, place)), "answer": text(_words_at(ANSWER_WORDS, other))})
    return rows


def _words_at(quantiles: Sequence[int], place: float) -> int:
    position = place * (len(quantiles) - 1)
    below = int(position)
    return round(quantiles[below] + (position - below) * (quantiles[below + 1] - quantiles[below]))


def write_rows(rows: Sequence[Row], file: Path) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def train_tokenizer(folder: Path, rows: Sequence[Row], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE, of the kind of Llama 3 and Qwen, learned from the rows and saved with ChatML as template."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((text for row in rows for text in row.values()), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=TURN_END, additional_special_tokens=[TURN_START]
    )
    tokenizer.chat_template = resolve_template("chatml", tokenizer)
    tokenizer.save_pretrained(folder)
    return tokenizer
