"""Full, LoRA and QLoRA steps of a random model of a real size: MFU, peak memory and tokens per second, a JSON line per method.

    python -m tests.gpu.steps --size 8b --output
    python -m tests.gpu.steps --size tiny --device cpu      # the same code where there is no GPU

The plan is the one that `raytune train` would make for the machine (`--set training.gradient_checkpointing=true` changes it), and
the engine and the loop are the real ones. Every token is a target, so that no product is left out and MFU means what it means
elsewhere; documents and rows all have the same length, so that shapes do not change. Without a GPU it prints why it skips, and
succeeds.
"""

import argparse
import gc
import json
import os
import random
import string
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from raytune.config.adapter import FullAdapter
from raytune.config.load import config_from
from raytune.config.run import RunConfig
from raytune.data.batches import Batch, step_batches
from raytune.data.build import StoreRequest, build_store
from raytune.data.store import Store
from raytune.data.template import open_tokenizer, tokenizer_fingerprint
from raytune.errors import UserError
from raytune.model.attention import available_attention
from raytune.model.demo import demo_tokenizer
from raytune.plan.base_model import read_model_shape
from raytune.plan.choose import choose_plan
from raytune.plan.machine import DataFacts, Machine
from raytune.plan.memory import bytes_in
from raytune.plan.run_plan import RunPlan
from raytune.plan.shapes import ModelShape
from raytune.training.loop import StepResult, training_steps
from raytune.training.recorder import peak_memory_bytes
from raytune.training.start import prepare_process, start_engine
from raytune.units import GIB
from tests.bench.measure import report
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
    "1b": Size(2048, 8192, 16, 32, 8, 128_256, True),  # Llama 3.2 1B
    "3b": Size(3072, 8192, 28, 24, 8, 128_256, True),  # Llama 3.2 3B
    "8b": Size(4096, 14_336, 32, 32, 8, 128_256, False),  # Llama 3.1 8B
}
NO_GPU = "PyTorch sees no CUDA device here; --size tiny --device cpu runs the same code"
METHODS = ("full", "lora", "qlora")
NUM_ROWS = 16
DATA_SHEET_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10G": 70e12, "L4": 121e12}
"""Dense bf16 FLOP/s by a part of the GPU's name, more special names first."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """What all methods share."""

    folder: Path
    model: Path
    store: Store
    device: torch.device
    ceiling_flops: float
    """FLOP/s of a large bf16 product on this device, measured."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a forward pass: one packed row")
    parser.add_argument("--document", type=int, default=2048, help="tokens of a document")
    parser.add_argument("--warmup", type=int, default=10, help="steps before those that are measured")
    parser.add_argument("--steps", type=int, default=20, help="steps that are measured")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="keys laid over the config")
    parser.add_argument("--folder", type=Path, help="where model and data are written and stay; default: a temporary folder")
    parser.add_argument("--output", action="store_true", help="append the figures to tests/bench/baselines/gpu_steps.jsonl")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(json.dumps({"bench": "gpu_steps", "skipped": NO_GPU}))
        return
    if options.folder:
        measure_all(options.folder, options)
    else:
        with TemporaryDirectory() as folder:
            measure_all(Path(folder), options)


def measure_all(folder: Path, options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    model = folder / f"model-{options.size}"
    if not model.is_dir():
        write_model(model, SIZES[options.size], device)
    material = Material(
        folder=folder,
        model=model,
        store=make_store(folder, model, options.tokens, options.document),
        device=device,
        ceiling_flops=measure_matmul(device),
    )
    with process_group(folder, device):
        for method in options.methods:
            report("gpu_steps", {"size": options.size, "method": method, **measure(material, method, options)}, options.output)


# --- what is trained


def write_model(folder: Path, size: Size, device: torch.device) -> None:
    """A model with random bf16 weights, and a tokenizer with a token per byte."""
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


def make_store(folder: Path, model: Path, tokens: int, document: int) -> Store:
    """Rows of `tokens` tokens, each of documents of `document` random letters."""
    letters = random.Random(0)
    file = folder / "rows.jsonl"
    # A token per letter, and one that ends the document.
    texts = ["".join(letters.choices(string.ascii_lowercase, k=document - 1)) for _ in range(NUM_ROWS * tokens // document)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = open_tokenizer(str(model))
    request = StoreRequest(
        sources=tuple(config_from({"data": data_section(file, tokens)}).data.train),
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


def data_section(file: Path, tokens: int) -> dict[str, Any]:
    return {"train": {"path": str(file), "format": "text"}, "targets": "all", "max_length": tokens}


def make_plan(material: Material, method: str, options: argparse.Namespace) -> RunPlan:
    """The plan that `raytune train` makes of this config on this machine."""
    config: RunConfig = config_from(
        {
            "name": method,
            "storage": str(material.folder / "runs"),
            "model": {"base": str(material.model)},
            "data": data_section(material.folder / "rows.jsonl", options.tokens),
            "adapter": {"method": method},
            "training": {
                "max_steps": options.warmup + options.steps,
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": 1,
                "precision": "bf16",
                "lr_scheduler_type": "constant",
            },
            "cluster": {"workers": 1},
        },
        options.set,
    )
    info = material.store.info
    return choose_plan(
        config,
        read_model_shape(str(material.model)),
        this_machine(material.device),
        DataFacts(train=store_plan(info), longest_document=info.longest_document),
        model_path=str(material.model),
        storage=config.storage,
    )


def this_machine(device: torch.device) -> Machine:
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
    )


# --- measuring


def measure(material: Material, method: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train for some steps; the figures, or why the plan refuses."""
    device = material.device
    try:
        plan = make_plan(material, method, options)
    except UserError as error:
        return {"device": name_of(device), "refused": str(error)}
    free_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, last_loss = timed_steps(plan, material, options)
    flops = flops_per_step(plan, material.store, read_model_shape(str(material.model)))
    flops_per_s = flops * options.steps / seconds
    sheet = next((value for name, value in DATA_SHEET_FLOPS.items() if name in name_of(device)), None)
    peak = peak_memory_bytes(device)
    planned = bytes_in(plan.memory, "device")
    free_memory(device)
    return {
        "device": name_of(device),
        "tokens_per_s": round(plan.data.row_length * options.steps / seconds, 1),
        "step_s": round(seconds / options.steps, 5),
        "tflops_per_s": round(flops_per_s / 1e12, 3),
        "mfu_of_measured_matmul": round(flops_per_s / material.ceiling_flops, 4),
        "measured_matmul_tflops": round(material.ceiling_flops / 1e12, 2),
        "mfu_of_data_sheet": round(flops_per_s / sheet, 4) if sheet else None,
        "data_sheet_tflops": sheet / 1e12 if sheet else None,
        "peak_memory_gib": round(peak / GIB, 3),
        "planned_memory_gib": round(planned / GIB, 3),
        "last_loss": round(last_loss, 4),
        "steps": options.steps,
        "warmup": options.warmup,
        "tokens_per_step": plan.data.row_length,
        "document": options.document,
        "engine": plan.engine.kind,
        "optimizer": plan.optimization.optimizer,
        "attention": plan.model.attention,
        "gradient_checkpointing": plan.model.gradient_checkpointing,
        "compile": plan.model.compile,
        "chunk_tokens": plan.loss.chunk_tokens,
        "precision": plan.precision,
    }


def timed_steps(plan: RunPlan, material: Material, options: argparse.Namespace) -> tuple[float, float]:
    """Seconds of the measured steps, and the last loss."""
    device = prepare_process(plan, 0)
    engine, loss_sum = start_engine(plan, device, 0, 1)

    def batches_of(step: int) -> list[Batch]:
        return step_batches(
            material.store,
            step=step,
            rank=0,
            world=1,
            micro_batch_size=1,
            accumulation=1,
            num_rows_in_run=plan.optimization.num_rows,
            seed=plan.seed,
        )

    steps: Iterator[StepResult] = training_steps(
        engine,
        batches_of,
        loss_sum,
        lambda step: plan.optimization.learning_rate,
        start=0,
        stop=options.warmup + options.steps,
        seed=plan.seed,
    )
    for _ in range(options.warmup):
        next(steps).read(engine)
    clock = Clock(device)
    last = list(steps)[-1]
    seconds = clock.seconds()
    return seconds, last.read(engine).loss


class Clock:
    """Seconds of work on a device since this was made: by its own events on a GPU, which does its work later than it is told."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events[0].record()
        self._started_s = time.perf_counter()

    def seconds(self) -> float:
        if not self._on_gpu:
            return time.perf_counter() - self._started_s
        begin, end = self._events
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000


def measure_matmul(device: torch.device) -> float:
    """FLOP/s of a large bf16 product: what a step could reach if it were nothing but products."""
    width, repeats = (8192, 50) if device.type == "cuda" else (1024, 3)
    left, right = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(left)
    for _ in range(repeats):
        torch.mm(left, right, out=product)
    clock = Clock(device)
    for _ in range(repeats):
        torch.mm(left, right, out=product)
    return 2 * width**3 * repeats / clock.seconds()


def flops_per_step(plan: RunPlan, store: Store, shape: ModelShape) -> float:
    """Products of a step, as MFU counts them: 6 per weight and token for trained weights, 4 for frozen ones (no weight gradient).

    Recomputation by gradient checkpointing does not count, nor does what FlashAttention computes twice.
    """
    row = store.row(0)
    num_tokens, num_targets = len(row.input_ids), int(row.is_target.sum())
    is_full = isinstance(plan.adapter, FullAdapter)
    per_weight = 6 if is_full else 4
    linear = per_weight * shape.num_quantizable * num_tokens
    head = per_weight * shape.hidden * shape.vocab * num_targets
    adapter = 0 if is_full else 6 * plan.num_trainable * num_tokens
    # Scores and mixing are 2 products forward and 4 backward, of which causality needs half.
    squares = sum(int(length) ** 2 for length in row.document_lengths)
    attention = 6 * squares * shape.heads * shape.head_dim * shape.num_layers
    return float(linear + head + adapter + attention)


@contextmanager
def process_group(folder: Path, device: torch.device) -> Iterator[None]:
    """Context of a process group of one. DeepSpeed needs it, and the same one for all its engines; PlainEngine does without."""
    rendezvous = dist.FileStore(str(folder / f"rendezvous-{os.getpid()}"), 1)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=rendezvous, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


if __name__ == "__main__":
    main()
