"""The embedded base model: a byte tokenizer, a tiny Llama, and the command that made the weights in `demo_base/`.

    python -m raytune.model.demo --output raytune/model/demo_base

The base reads sentences about orders and answers questions on them, but has never seen JSON; teaching it that is the demo
(`data/files/demo.py` has both sets of rows). Any user of transformers can load the folder; nothing of raytune is needed.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from raytune.data.files.demo import demo_rows, echo_rows
from raytune.data.templates.known_words import byte_letters
from raytune.plan.model.base_model import DEMO_BASE

# Shapes: B rows, T tokens.

PAD, TURN_START, TURN_END = "<pad>", "<|im_start|>", "<|im_end|>"
NUM_BYTES = 256
SPECIAL_TOKENS = (PAD, TURN_START, TURN_END)
PAD_ID, TURN_END_ID = NUM_BYTES, NUM_BYTES + 2
IGNORED = -100
CONTEXT_LENGTH = 2048
NUM_WARMUP_STEPS = 50


def demo_base_path() -> Path:
    """The folder with the packaged base: config, weights and tokenizer in the format of transformers."""
    return DEMO_BASE


def demo_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer: a token per byte, whose id is the byte, and three special tokens above."""
    vocabulary = {character: byte for byte, character in enumerate(byte_letters())}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=TURN_END,
        additional_special_tokens=[TURN_START],
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT_LENGTH,
    )
    tokenizer.chat_template = (DEMO_BASE / "chat_template.jinja").read_text()
    return tokenizer


def demo_config(**overrides: Any) -> LlamaConfig:
    """The base's architecture (0.6 M parameters). Tests shrink it through `overrides`, which are fields of LlamaConfig."""
    ours = {
        "vocab_size": NUM_BYTES + len(SPECIAL_TOKENS),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT_LENGTH,
        "tie_word_embeddings": True,
        "initializer_range": 0.06,
        "pad_token_id": PAD_ID,
        "bos_token_id": None,
        "eos_token_id": TURN_END_ID,
        "dtype": "float32",
    }
    return LlamaConfig(**(ours | overrides))


def train_demo_base(
    model: LlamaForCausalLM, *, num_echo_steps: int, num_steps: int, learning_rate: float, seed: int
) -> Iterator[float]:
    """Pre-train a fresh model with the loss on answers only; warm-up, then a linear decay to zero.

    Measured: after 100 CPU-s on questions alone the model cannot copy a name (loss 1.4); with 300 echo steps first, it can.

    Yields:
        The loss of each step, in nats per byte of the answers.
    """
    tokenizer = demo_tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    batches = [
        *_batches_of_like_length(echo_rows(32 * num_echo_steps, seed), 32, seed),
        *_batches_of_like_length(demo_rows("pretraining", 16 * num_steps, seed), 16, seed),
    ]
    for step, rows in enumerate(batches):
        ids_BT, labels_BT = answer_batch(tokenizer, rows)
        # Padding is on the right, where a causal model's answers cannot see it, so no attention mask is needed.
        loss = model(input_ids=ids_BT, labels=labels_BT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min((step + 1) / NUM_WARMUP_STEPS, 1.0 - step / len(batches))
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def _batches_of_like_length(rows: list[dict[str, Any]], rows_per_batch: int, seed: int) -> list[list[dict[str, Any]]]:
    """Cut the rows into batches of similar length, so that little is padded, and put the batches in random order."""
    random = Random(seed)
    rows = sorted(rows, key=lambda row: sum(len(message["content"]) for message in row["messages"]))
    starts = sorted(range(0, len(rows), rows_per_batch), key=lambda _: random.random())
    return [rows[start : start + rows_per_batch] for start in starts]


def answer_batch(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Render rows with the chat template, padded on the right; labels are the answers and their end-of-turn tokens."""
    encoded: Any = tokenizer.apply_chat_template(
        [row["messages"] for row in rows], return_assistant_tokens_mask=True, return_dict=True
    )
    longest = max(map(len, encoded["input_ids"]))
    ids_BT = torch.full((len(rows), longest), PAD_ID)
    labels_BT = torch.full((len(rows), longest), IGNORED)
    for row, (ids, is_answer) in enumerate(zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)):
        ids_T = torch.tensor(ids)
        ids_BT[row, : len(ids)] = ids_T
        labels_BT[row, : len(ids)] = torch.where(torch.tensor(is_answer, dtype=torch.bool), ids_T, IGNORED)
    return ids_BT, labels_BT


def save_demo_base(model: LlamaForCausalLM, folder: Path, how_made: dict[str, Any]) -> None:
    """Write config, weights, tokenizer and the record of how they were made."""
    model.generation_config = GenerationConfig(pad_token_id=PAD_ID, eos_token_id=TURN_END_ID, do_sample=False)
    model.save_pretrained(folder)
    demo_tokenizer().save_pretrained(folder)
    (folder / "how_made.json").write_text(json.dumps(how_made, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Pre-train the demo's base model.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--num-echo-steps", type=int, default=300, help="of 32 rows")
    parser.add_argument("--num-steps", type=int, default=3000, help="of 16 rows, after the echo steps")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    recipe = vars(parser.parse_args())
    folder = recipe.pop("output")

    torch.set_num_threads(1)  # sums in another order would give other weights
    torch.manual_seed(recipe["seed"])
    model = LlamaForCausalLM(demo_config())
    started_s = time.process_time()
    mean_loss = math.log(NUM_BYTES)
    for step, loss in enumerate(train_demo_base(model, **recipe), start=1):
        mean_loss += 0.02 * (loss - mean_loss)
        if step % 100 == 0:
            print(f"step {step}: loss {mean_loss:.4f} after {time.process_time() - started_s:.0f} CPU-s", flush=True)  # noqa: T201 (a command)
    save_demo_base(
        model,
        folder,
        {
            "command": "python -m raytune.model.demo",
            **recipe,
            "loss": round(mean_loss, 4),
            "num_parameters": model.num_parameters(),
            "cpu_s": round(time.process_time() - started_s),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )


if __name__ == "__main__":
    main()
