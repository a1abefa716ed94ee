"""Full, LoRA and QLoRA steps of a random model of a real size: MFU, peak memory and tokens per second, a JSON line per method.

    python -m tests.gpu.steps --size 8b --output
    python -m tests.gpu.steps --size tiny --device cpu      # the same code where there is no GPU

The plan is the one that `raytune train` would make for the machine (`--set training.gradient_checkpointing=true` changes it), and
the engine and the loop are the real ones. Every token is a target, so that MFU means what it means elsewhere. Without a GPU it
prints why it skips, and succeeds.
"""

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch

from raytune.data.store.store import Store
from raytune.errors import UserError
from raytune.plan.costs.memory import tensor_bytes
from raytune.plan.model.base_model import read_model_shape
from raytune.plan.model.shapes import ModelShape
from raytune.plan.run_plan import RunPlan
from raytune.training.steps.recorder import peak_memory_bytes
from raytune.units import GIB
from tests.bench.measure import report
from tests.gpu.material import Material, add_options, free_memory, make_plan, material_for, name_of, skips, start

BENCH = "gpu_steps"
DATA_SHEET_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10G": 70e12, "L4": 121e12}
"""Dense bf16 FLOP/s by a part of the GPU's name, more special names first."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, BENCH)
    parser.add_argument("--warmup", type=int, default=10, help="steps before those that are measured")
    parser.add_argument("--steps", type=int, default=20, help="steps that are measured")
    options = parser.parse_args(arguments)
    if skips(BENCH, options.device):
        return
    with material_for(options) as material:
        ceiling_flops = measure_matmul(material.device)
        for method in options.methods:
            figures = measure(material, method, ceiling_flops, options)
            report(BENCH, {"size": options.size, "method": method, **figures}, options.output)


def measure(material: Material, method: str, ceiling_flops: float, options: argparse.Namespace) -> dict[str, Any]:
    """Train for some steps; the figures, or why the plan refuses.

    Args:
        ceiling_flops: FLOP/s of a large bf16 product on this device.
    """
    device = material.device
    steps = options.warmup + options.steps
    try:
        plan = make_plan(material, method, tokens=options.tokens, steps=steps, training={}, settings=options.set)
    except UserError as error:
        return {"device": name_of(device), "refused": str(error)}
    free_memory(device)
    seconds, last_loss = timed_steps(plan, material, options.warmup)
    flops = flops_per_step(plan, material.store, read_model_shape(str(material.model)))
    flops_per_s = flops * options.steps / seconds
    sheet = next((value for name, value in DATA_SHEET_FLOPS.items() if name in name_of(device)), None)
    peak = peak_memory_bytes(device)
    free_memory(device)
    return {
        "device": name_of(device),
        "tokens_per_s": round(plan.data.row_length * options.steps / seconds, 1),
        "step_s": round(seconds / options.steps, 5),
        "tflops_per_s": round(flops_per_s / 1e12, 3),
        "mfu_of_measured_matmul": round(flops_per_s / ceiling_flops, 4),
        "measured_matmul_tflops": round(ceiling_flops / 1e12, 2),
        "mfu_of_data_sheet": round(flops_per_s / sheet, 4) if sheet else None,
        "data_sheet_tflops": sheet / 1e12 if sheet else None,
        "peak_memory_gib": round(peak / GIB, 3),
        "planned_memory_gib": round(tensor_bytes(plan.memory) / GIB, 3),
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


def timed_steps(plan: RunPlan, material: Material, warmup: int) -> tuple[float, float]:
    """Seconds of the measured steps, and the last loss."""
    engine, steps = start(plan, material)
    for _ in range(warmup):
        next(steps).read(engine)
    clock = Clock(material.device)
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
    width, repeats = (8192, 50) if device.type == "cuda" else (256, 3)
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
    is_full = plan.adapter.method == "full"
    per_weight = 6 if is_full else 4
    linear = per_weight * shape.num_quantizable * num_tokens
    head = per_weight * shape.hidden * shape.vocab * num_targets
    adapter = 0 if is_full else 6 * plan.num_trainable * num_tokens
    # Scores and mixing are 2 products forward and 4 backward, of which causality needs half.
    squares = sum(int(length) ** 2 for length in row.document_lengths)
    attention = 6 * squares * shape.heads * shape.head_dim * shape.num_layers
    return float(linear + head + adapter + attention)


if __name__ == "__main__":
    main()
