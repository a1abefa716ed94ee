"""Useful tokens per CPU-second: raytune's loop against transformers.Trainer, TRL's packing and a dense mask, on GSM8K.

    python -m tests.bench.throughput --output

Every rival trains the same small Llama from the same weights on the same tokens, one epoch, with the same optimizer and loss on
answers only; what is measured is training alone, after tokenising and loading. TRL takes one row per forward pass, at which it is
fastest on CPUs. Needs GSM8K's `train.jsonl` and `test.jsonl`, and trl for its rival (`pip install raytune[bench]`).
"""

import argparse
import json
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from raytune.config.sections.data import DataSource
from raytune.config.sections.model import Attention
from raytune.data.batches.batches import Batch, step_batches
from raytune.data.store.build import build_store
from raytune.data.store.request import StoreRequest
from raytune.data.store.store import Store
from raytune.data.templates.text import resolve_template
from raytune.data.templates.tokenizers import open_tokenizer, tokenizer_fingerprint
from raytune.plan.costs.loss_chunks import smallest_chunk
from raytune.plan.run_plan import RunPlan
from raytune.training.start.start import start_engine
from raytune.training.steps.loop import training_steps
from tests.bench.measure import Rival, interleaved, ratios, report
from tests.tiny import store_plan, tiny_plan

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"
COLUMNS = {"prompt": "question", "completion": "answer"}
PAD, TURN_START, TURN_END = "<pad>", "<|im_start|>", "<|im_end|>"
BATCH = 8
"""Documents per forward pass of transformers.Trainer."""
LEARNING_RATE = 1e-3
NUM_HELD_OUT = 40

OURS, DENSE = "raytune", "raytune, dense mask"
TRAINER, TRL = "transformers.Trainer, pad to longest", "TRL SFTTrainer(packing=True)"
EXPECTED = {TRAINER: 2.3, TRL: 1.6, DENSE: 1.3}
"""How many times the CPU seconds of ours each rival should need."""

Document = dict[str, list[int]]
"""`input_ids`, and `labels` in the way of transformers: -100 where there is no target."""


@dataclass(frozen=True, kw_only=True)
class Material:
    folder: Path
    plan: RunPlan
    documents: list[Document]
    held_out: list[Document]

    @property
    def model(self) -> str:
        return self.plan.model.path

    @property
    def num_steps(self) -> int:
        return self.plan.optimization.num_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=GSM8K, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--documents", type=int, default=64, help="rows of GSM8K that are trained on")
    parser.add_argument("--row-length", type=int, default=2048, help="tokens of a packed row")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of an epoch")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", action="store_true", help="append the figures to tests/bench/baselines/throughput.jsonl")
    options = parser.parse_args()
    _be_quiet()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        material = make_material(Path(folder), options)
        compare(material, options)


def compare(material: Material, options: argparse.Namespace) -> None:
    trained: dict[str, nn.Module] = {}
    rivals: dict[str, Rival] = {
        OURS: lambda: raytune_rival(material, "varlen", trained, OURS),
        TRAINER: lambda: trainer_rival(material, trained),
        TRL: lambda: trl_rival(material, trained),
        DENSE: lambda: raytune_rival(material, "sdpa", trained, DENSE),
    }
    if find_spec("trl") is None:
        del rivals[TRL]
        report("throughput", {"rival": TRL, "skipped": "trl is not installed: pip install 'raytune[bench]'"}, False)
    seconds = interleaved(rivals, options.rounds)
    num_targets = material.plan.data.train.num_targets
    shared = {
        "model": f"Llama, {options.layers} layers, width {options.hidden}, vocabulary {options.vocabulary}, fp32, 1 thread",
        "documents": len(material.documents),
        "tokens": material.plan.data.train.num_tokens,
        "useful_tokens": num_targets,
        "optimizer_steps": material.num_steps,
        "rounds": options.rounds,
    }
    losses = {name: round(loss_of(model, material.held_out), 4) for name, model in trained.items()}
    untrained = AutoModelForCausalLM.from_pretrained(material.model, dtype=torch.float32)
    for name in rivals:
        figures = {
            "rival": name,
            "cpu_s": [round(second, 2) for second in seconds[name]],
            "useful_tokens_per_cpu_s": round(num_targets / min(seconds[name])),
            "held_out_loss": losses[name],
        }
        if name == OURS:
            figures["held_out_loss_before"] = round(loss_of(untrained, material.held_out), 4)
        else:
            faster = ratios(seconds[name], seconds[OURS])
            figures |= {
                "ours_is_faster": faster,
                "expected": EXPECTED[name],
                "verdict": "met" if min(faster.values()) >= EXPECTED[name] else "missed",
                "held_out_loss_of_ours": losses[OURS],
            }
        report("throughput", figures | shared, options.output)


# --- what all train


def make_material(folder: Path, options: argparse.Namespace) -> Material:
    model_path = make_model(folder / "model", options)
    train = gsm8k_store(folder, model_path, options.data / "train.jsonl", options.documents, options.row_length)
    held_out = gsm8k_store(folder, model_path, options.data / "test.jsonl", NUM_HELD_OUT, options.row_length)
    rows_per_step = -(-train.num_rows // options.steps)
    plan = tiny_plan(
        model={"path": model_path},
        loss={"chunk_tokens": smallest_chunk(options.vocabulary)},
        data={"train": store_plan(train.info), "row_length": options.row_length},
        batch={"micro_batch_size": 1, "accumulation": rows_per_step},
        optimization={
            "num_steps": -(-train.num_rows // rows_per_step),
            "num_rows": train.num_rows,
            "learning_rate": LEARNING_RATE,
        },
    )
    return Material(folder=folder, plan=plan, documents=documents_of(train), held_out=documents_of(held_out))


def make_model(folder: Path, options: argparse.Namespace) -> str:
    """A Llama with random weights, and a byte-level BPE learned from GSM8K."""
    texts = [" ".join(json.loads(line).values()) for line in (options.data / "train.jsonl").read_text().splitlines()]
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [PAD, TURN_START, TURN_END]
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=options.vocabulary, special_tokens=special, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=TURN_END, additional_special_tokens=[TURN_START]
    )
    tokenizer.chat_template = resolve_template("chatml", tokenizer)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=options.vocabulary,
            hidden_size=options.hidden,
            intermediate_size=3 * options.hidden,
            num_hidden_layers=options.layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=options.row_length,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).save_pretrained(folder)
    return str(folder)


def gsm8k_store(folder: Path, model_path: str, file: Path, num_documents: int, row_length: int) -> Store:
    tokenizer = open_tokenizer(model_path)
    request = StoreRequest(
        sources=(DataSource(path=str(file), format="prompt_completion", columns=COLUMNS, max_rows=num_documents),),
        template=resolve_template("auto", tokenizer),
        targets="completion",
        max_length=row_length,
        too_long="error",
        packing="best_fit",
        on_bad_row="error",
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
    )
    return Store.open(build_store(request, tokenizer_path=model_path, folder=str(folder / "stores")).path)


def documents_of(store: Store) -> list[Document]:
    """The documents of a store as transformers and TRL take them."""
    documents = []
    for index in range(store.num_rows):
        row = store.row(index)
        start = 0
        for length in row.document_lengths.tolist():
            ids = row.input_ids[start : start + length].tolist()
            is_target = row.is_target[start : start + length].tolist()
            documents.append({"input_ids": ids, "labels": [token if use else -100 for token, use in zip(ids, is_target)]})
            start += length
    return documents


def loss_of(model: nn.Module, documents: Sequence[Document]) -> float:
    """Mean cross-entropy per target, a document at a time: the same measure for every rival."""
    model.eval()
    total, num_targets = 0.0, 0
    with torch.no_grad():
        for document in documents:
            ids, labels = (torch.tensor(document[key])[None] for key in ("input_ids", "labels"))
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            total += F.cross_entropy(logits, labels[0, 1:], reduction="sum").item()
            num_targets += int((labels[0, 1:] != -100).sum())
    return total / num_targets


# --- the rivals


def raytune_rival(material: Material, attention: Attention, trained: dict[str, nn.Module], name: str) -> Callable[[], None]:
    plan = material.plan.model_copy(update={"model": material.plan.model.model_copy(update={"attention": attention})})
    engine, loss_sum = start_engine(plan, torch.device("cpu"), 0, 1)
    trained[name] = engine.model
    store = Store.open(plan.data.train.path)

    def batches_of(step: int) -> list[Batch]:
        return step_batches(
            store,
            step=step,
            rank=0,
            world=1,
            micro_batch_size=plan.batch.micro_batch_size,
            accumulation=plan.batch.accumulation,
            num_rows_in_run=plan.optimization.num_rows,
            seed=plan.seed,
        )

    def work() -> None:
        for result in training_steps(
            engine, batches_of, loss_sum, lambda step: LEARNING_RATE, start=0, stop=material.num_steps, seed=plan.seed
        ):
            result.read(engine)

    return work


def trainer_rival(material: Material, trained: dict[str, nn.Module]) -> Callable[[], None]:
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    num_batches = -(-len(material.documents) // BATCH)
    trainer = Trainer(
        model=_plain_model(material),
        args=TrainingArguments(
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=-(-num_batches // material.num_steps),
            **_common_arguments(material),
        ),
        train_dataset=material.documents,  # pyright: ignore[reportArgumentType]
        data_collator=DataCollatorForSeq2Seq(transformers.AutoTokenizer.from_pretrained(material.model), padding="longest"),
    )
    trained[TRAINER] = trainer.model
    return lambda: _train(trainer, material)


def trl_rival(material: Material, trained: dict[str, nn.Module]) -> Callable[[], None]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=_plain_model(material),
        args=SFTConfig(
            packing=True,
            max_length=material.plan.data.row_length,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=material.plan.batch.accumulation,
            gradient_checkpointing=False,  # TRL has it on unless told otherwise
            bf16=False,
            **_common_arguments(material),
        ),
        train_dataset=Dataset.from_list(material.documents),
        processing_class=transformers.AutoTokenizer.from_pretrained(material.model),
    )
    trained[TRL] = trainer.model
    return lambda: _train(trainer, material)


def _train(trainer: Any, material: Material) -> None:
    steps = trainer.train().global_step
    assert steps == material.num_steps, f"{type(trainer).__name__} made {steps} optimizer steps, ours {material.num_steps}"


def _plain_model(material: Material) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(material.model, dtype=torch.float32, attn_implementation="sdpa")


def _common_arguments(material: Material) -> dict[str, Any]:
    return {
        "output_dir": str(material.folder / "output"),
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "weight_decay": 0.0,
        "max_grad_norm": material.plan.optimization.max_grad_norm,
        "use_cpu": True,
        "seed": 0,
        "dataloader_pin_memory": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }


def _be_quiet() -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
