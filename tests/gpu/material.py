"""What the scripts beside this one train: a random Llama of a real size on full rows, by the plan, engine and loop of a run.

Every token is a target; documents and rows all have the same length, so that shapes do not change from step to step.
"""

import argparse
import gc
import json
import os
import random
import string
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from raytune.config.load import config_from
from raytune.data.batches.batches import Batch, step_batches
from raytune.data.store.build import build_store
from raytune.data.store.request import StoreRequest
from raytune.data.store.store import Store
from raytune.data.templates.tokenizers import open_tokenizer, tokenizer_fingerprint
from raytune.launch.cluster.host import kernel_packages
from raytune.model.attention.attention import available_attention
from raytune.model.demo import demo_tokenizer
from raytune.plan.choosing.choose import choose_plan
from raytune.plan.choosing.setting import settle
from raytune.plan.facts.data_facts import DataFacts
from raytune.plan.facts.machine import Machine
from raytune.plan.model.base_model import read_model_shape
from raytune.plan.run_plan import RunPlan
from raytune.training.engines.engine import Engine
from raytune.training.start.start import prepare_process, start_engine
from raytune.training.steps.loop import StepResult, training_steps
from tests.tiny import store_plan


@dataclass(frozen=True, slots=True)
class Size:
    """A Llama's shape."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool


SIZES = {
    "tiny": Size(64, 192, 2, 4, 2, 512, True),
    "small": Size(128, 352, 3, 8, 4, 2048, False),
    "medium": Size(512, 1408, 4, 8, 4, 8192, False),
    "1b": Size(2048, 8192, 16, 32, 8, 128_256, True),  # Llama 3.2 1B
    "3b": Size(3072, 8192, 28, 24, 8, 128_256, True),  # Llama 3.2 3B
    "8b": Size(4096, 14_336, 32, 32, 8, 128_256, False),  # Llama 3.1 8B
}
METHODS = ("full", "lora", "qlora")
NO_GPU = "PyTorch sees no CUDA device here; --size tiny --device cpu runs the same code"
NUM_ROWS = 16


@dataclass(frozen=True, kw_only=True)
class Material:
    folder: Path
    model: Path
    store: Store
    device: torch.device


def add_options(parser: argparse.ArgumentParser, bench: str) -> None:
    """What all scripts ask."""
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a forward pass: one packed row")
    parser.add_argument("--document", type=int, default=2048, help="tokens of a document")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="keys laid over the config")
    parser.add_argument("--folder", type=Path, help="where model and data are written and stay; default: a temporary folder")
    parser.add_argument("--output", action="store_true", help=f"append the figures to tests/bench/baselines/{bench}.jsonl")


@contextmanager
def material_for(options: argparse.Namespace) -> Iterator[Material]:
    """Context with model, data and a process group of one. DeepSpeed needs one, and the same one for all its engines."""
    device = torch.device(options.device)
    with nullcontext(options.folder) if options.folder else TemporaryDirectory() as place:
        folder = Path(place)
        model = folder / f"model-{options.size}"
        if not model.is_dir():
            _write_model(model, SIZES[options.size], device)
        rendezvous = dist.FileStore(str(folder / f"rendezvous-{os.getpid()}"), 1)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=rendezvous, rank=0, world_size=1)
        try:
            store = _make_store(folder, model, options.tokens, options.document)
            yield Material(folder=folder, model=model, store=store, device=device)
        finally:
            dist.destroy_process_group()


def make_plan(
    material: Material, method: str, *, tokens: int, steps: int, training: Mapping[str, Any], settings: Sequence[str]
) -> RunPlan:
    """The plan that `raytune train` makes on this machine.

    Args:
        training: keys of that section.
        settings: "key=value" laid over the config.
    """
    defaults = {
        "max_steps": steps,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "precision": "bf16",
        "lr_scheduler_type": "constant",
    }
    config = config_from(
        {
            "name": method,
            "storage": str(material.folder / "runs"),
            "model": {"base": str(material.model)},
            "data": _data_section(material.folder / "rows.jsonl", tokens),
            "adapter": {"method": method},
            "training": defaults | dict(training),
            "checkpoint": {"in_background": False},  # nothing is saved here, so nothing is copied
            "cluster": {"workers": 1},
        },
        list(settings),
    )
    info = material.store.info
    shape, machine = read_model_shape(str(material.model)), _this_machine(material.device)
    return choose_plan(
        settle(config, shape, machine),
        DataFacts(train=store_plan(info), longest_document=info.longest_document),
        model_path=str(material.model),
        storage=config.storage,
    )


def start(plan: RunPlan, material: Material) -> tuple[Engine, Iterator[StepResult]]:
    """An engine with a loaded model, and the plan's steps, which are done as they are taken."""
    device = prepare_process(plan, 0)
    engine, loss_sum = start_engine(plan, device, 0, 1)

    def batches_of(step: int) -> list[Batch]:
        return step_batches(
            material.store,
            step=step,
            rank=0,
            world=1,
            micro_batch_size=plan.batch.micro_batch_size,
            accumulation=plan.batch.accumulation,
            num_rows_in_run=plan.optimization.num_rows,
            seed=plan.seed,
        )

    steps = training_steps(
        engine,
        batches_of,
        loss_sum,
        lambda step: plan.optimization.learning_rate,
        start=0,
        stop=plan.optimization.num_steps,
        seed=plan.seed,
    )
    return engine, iter(steps)


def skips(bench: str, device: str) -> bool:
    """Whether there is nothing to measure on; says so."""
    if device == "cuda" and not torch.cuda.is_available():
        print(json.dumps({"bench": bench, "skipped": NO_GPU}))
        return True
    return False


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _write_model(folder: Path, size: Size, device: torch.device) -> None:
    """Random bf16 weights, and a tokenizer with a token per byte."""
    tokenizer = demo_tokenizer()
    config = LlamaConfig(**asdict(size), max_position_embeddings=131_072, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    free_memory(device)


def _make_store(folder: Path, model: Path, tokens: int, document: int) -> Store:
    """Rows of `tokens` tokens, each of documents of `document` random letters."""
    letters = random.Random(0)
    file = folder / "rows.jsonl"
    # A token per letter, and one that ends the document.
    texts = ["".join(letters.choices(string.ascii_lowercase, k=document - 1)) for _ in range(NUM_ROWS * tokens // document)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = open_tokenizer(str(model))
    request = StoreRequest(
        sources=tuple(config_from({"data": _data_section(file, tokens)}).data.train),
        template="",
        targets="all",
        max_length=tokens,
        too_long="error",
        packing="best_fit",
        on_bad_row="error",
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
    )
    store = Store.open(build_store(request, tokenizer_path=str(model), folder=str(folder / "stores")).path)
    assert store.num_tokens == NUM_ROWS * tokens == store.num_rows * tokens, "every row is full"
    return store


def _data_section(file: Path, tokens: int) -> dict[str, Any]:
    return {"train": {"path": str(file), "format": "text"}, "targets": "all", "max_length": tokens}


def _this_machine(device: torch.device) -> Machine:
    on_gpu = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if on_gpu else None
    return Machine(
        num_nodes=1,
        num_cpus=os.cpu_count() or 1,
        host_memory_bytes=psutil.virtual_memory().total,
        num_gpus=int(on_gpu),
        gpu_name=properties.name if properties else None,
        gpu_memory_bytes=properties.total_memory if properties else None,
        supports_bf16=True,
        attention=tuple(option.name for option in available_attention(device, torch.bfloat16) if option.available),
        packages=kernel_packages(),
    )
