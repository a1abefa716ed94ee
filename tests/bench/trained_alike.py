"""What all rivals of `throughput` train: one model, one start, the same documents in each update.

Each update sees all documents once, so that it is the same however they are ordered, packed or divided, and every rival's losses
have to be equal.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from raytune.config.load import config_from
from raytune.data.batches.batches import Batch, step_batches
from raytune.data.store.store import Store
from raytune.launch.cluster.host import this_machine
from raytune.launch.data.prepare import prepare
from raytune.plan.run_plan import RunPlan
from raytune.training.start.start import start_engine
from tests.bench.rows import COLUMNS, long_rows, short_rows, train_tokenizer, write_rows

LEARNING_RATE = 1e-3
ROW_LENGTHS = {"short": 2048, "long": 4096}
"""Tokens of a packed row."""
NUM_HELD_OUT = {"short": 16, "long": 2}
START_FILE = "start.safetensors"

Document = dict[str, list[int]]
"""`input_ids`, and `labels` in the way of transformers: -100 where there is no target."""


@dataclass(frozen=True, slots=True)
class Shape:
    layers: int
    width: int
    vocabulary: int
    heads: int

    @property
    def head_share(self) -> float:
        """Of the weights that tokens are multiplied by, those of the output head."""
        head = self.vocabulary * self.width
        layer = 3 * self.width**2 + 9 * self.width**2  # half as many heads of keys and values; a feed-forward three times as wide
        return head / (head + self.layers * layer)


SHAPES = {
    "head as in 8B": Shape(layers=6, width=384, vocabulary=2048, heads=6),
    "small": Shape(layers=4, width=256, vocabulary=32768, heads=8),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What is compared."""

    shape: str
    method: str
    precision: str
    rows: str

    def __str__(self) -> str:
        return f"{self.shape}, {self.method}, {self.precision}, {self.rows} rows"


@dataclass(frozen=True, kw_only=True)
class Material:
    cell: Cell
    folder: Path
    source: str
    """Where the rows are from."""
    plan: RunPlan
    documents: list[Document]
    held_out: list[Document]

    @property
    def model(self) -> str:
        return self.plan.model.path

    @property
    def num_updates(self) -> int:
        return self.plan.optimization.num_steps

    @property
    def start(self) -> dict[str, torch.Tensor]:
        """Trained weights before the first update."""
        return load_file(self.folder / START_FILE)


def make_material(folder: Path, cell: Cell, options: argparse.Namespace) -> Material:
    folder.mkdir()
    make_rows = long_rows if cell.rows == "long" else short_rows
    num_rows = options.documents if cell.rows == "short" else max(2, options.documents // 8)
    rows, source = make_rows(num_rows, options.data)
    held_out, _ = make_rows(NUM_HELD_OUT[cell.rows], options.data, "test")
    model = make_model(folder / "model", SHAPES[cell.shape], short_rows(2000, options.data)[0])
    training, validation = write_rows(rows, folder / "train.jsonl"), write_rows(held_out, folder / "test.jsonl")
    plan = make_plan(folder, model, cell, training, validation, options.updates)
    engine, _ = start_engine(plan, torch.device("cpu"), 0, 1)
    save_file({name: value for name, value in engine.trainable_state() if value is not None}, folder / START_FILE)
    validation_store = plan.data.validation
    assert validation_store is not None
    return Material(
        cell=cell,
        folder=folder,
        source=source,
        plan=plan,
        documents=documents_of(Store.open(plan.data.train.path)),
        held_out=documents_of(Store.open(validation_store[0].path)),
    )


def make_model(folder: Path, shape: Shape, rows: Sequence[dict[str, str]]) -> str:
    """A Llama with random weights, and a tokenizer learned from rows."""
    tokenizer: Any = train_tokenizer(folder, rows, shape.vocabulary)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.width,
            intermediate_size=3 * shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads // 2,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).save_pretrained(folder)
    return str(folder)


def make_plan(folder: Path, model: str, cell: Cell, training: Path, validation: Path, updates: int) -> RunPlan:
    """The plan that `raytune train` makes here: an update for all rows."""

    adapter = {"method": "full"} if cell.method == "full" else {"method": cell.method, "target_modules": "all-linear"}

    def planned(global_batch_size: int) -> RunPlan:
        config = config_from(
            {
                "name": "throughput",
                "storage": str(folder / "runs"),
                "model": {"base": model},
                "data": {
                    "train": {"path": str(training), "columns": COLUMNS},
                    "validation": {"path": str(validation), "columns": COLUMNS},
                    "max_length": ROW_LENGTHS[cell.rows],
                    "too_long": "error",
                    "template": "chatml",
                },
                "adapter": adapter,
                "training": {
                    "max_steps": updates,
                    "global_batch_size": global_batch_size,
                    "per_device_train_batch_size": 1,
                    "precision": cell.precision,
                    "learning_rate": LEARNING_RATE,
                    "lr_scheduler_type": "constant",
                    "warmup_ratio": 0.0,
                    "weight_decay": 0.0,
                    "gradient_checkpointing": False,
                },
                "cluster": {"workers": 1, "threads_per_worker": 1},
            }
        )
        return prepare(config, this_machine(config.cluster), map).plan

    return planned(planned(1).data.train.num_rows)


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


def batches_of(plan: RunPlan, step: int) -> list[Batch]:
    return step_batches(
        Store.open(plan.data.train.path),
        step=step,
        rank=0,
        world=1,
        micro_batch_size=plan.batch.micro_batch_size,
        accumulation=plan.batch.accumulation,
        num_rows_in_run=plan.optimization.num_rows,
        seed=plan.seed,
    )


def loss_of(model: nn.Module, documents: Sequence[Document]) -> float:
    """Mean cross-entropy per target, a document at a time: the same measure for every rival."""
    model.eval()
    total, num_targets = 0.0, 0
    with torch.no_grad():
        for document in documents:
            ids, labels = (torch.tensor(document[key])[None] for key in ("input_ids", "labels"))
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            total += F.cross_entropy(logits.float(), labels[0, 1:], reduction="sum").item()
            num_targets += int((labels[0, 1:] != -100).sum())
    return total / num_targets


def plain_model(material: Material) -> nn.Module:
    """The same model at the same start, made by transformers and PEFT alone, in the dtypes of the plan."""
    plan, settings = material.plan, dict[str, Any]()
    if material.cell.method == "qlora":
        from transformers import BitsAndBytesConfig

        compute = torch.bfloat16 if material.cell.precision == "bf16" else torch.float32
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    is_half = material.cell.precision == "bf16" and material.cell.method != "full"
    model = AutoModelForCausalLM.from_pretrained(
        material.model, dtype=torch.bfloat16 if is_half else torch.float32, attn_implementation="sdpa", **settings
    )
    if material.cell.method == "full":
        return model
    from peft import LoraConfig, get_peft_model

    for parameter in model.parameters():
        parameter.requires_grad = False
    adapter: Any = plan.adapter
    peft_model = get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM", r=adapter.rank, lora_alpha=adapter.alpha, target_modules="all-linear", lora_dropout=0.0
        ),
    )
    unexpected = peft_model.load_state_dict(material.start, strict=False).unexpected_keys
    assert not unexpected, f"other names of trained weights: {unexpected[:3]}"
    assert {name for name, value in peft_model.named_parameters() if value.requires_grad} == material.start.keys()
    return peft_model


def described(material: Material) -> dict[str, Any]:
    """What a figure says of what was trained."""
    cell, shape, store = material.cell, SHAPES[material.cell.shape], material.plan.data.train
    return {
        "model": f"Llama, {shape.layers} layers, width {shape.width}, vocabulary {shape.vocabulary}",
        "head_share": round(shape.head_share, 3),
        "method": cell.method,
        "precision": cell.precision,
        "rows": material.source,
        "documents": len(material.documents),
        "longest_document": max(len(document["input_ids"]) for document in material.documents),
        "tokens": store.num_tokens,
        "useful_tokens": store.num_targets,
        "updates": material.num_updates,
        "threads": 1,
    }
