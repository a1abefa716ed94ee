"""The loss of an output head of a real size in bf16, in chunks of several sizes: seconds and peak memory, a JSON line for each.

    python -m tests.gpu.loss --output
    python -m tests.gpu.loss --device cpu --width 64 --vocabulary 2048 --targets 256     # the same code where there is no GPU

Forward and backward pass of the head alone, trained and frozen, with every token a target. What a plan takes is marked. Gradients
are held against products in fp32. Without a GPU it prints why it skips, and succeeds.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from raytune.plan.costs.loss_chunks import smallest_chunk, wanted_chunk
from raytune.training.losses.losses import attach_loss
from tests.bench.loss import HeadOnly, make_batch
from tests.bench.measure import report
from tests.gpu.material import free_memory, name_of, skips
from tests.peak import held_bytes, peak_bytes

BENCH = "gpu_loss"
CHUNKS = (128, 256, 512, 1024, 2048, 4096)
TOLERANCE = 0.02
"""Of a gradient, in the Euclidean norm: bf16 has 8 bits."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--targets", type=int, default=8192)
    parser.add_argument("--chunks", nargs="+", type=int, default=CHUNKS, help="sizes of chunks, in targets")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", action="store_true", help=f"append the figures to tests/bench/baselines/{BENCH}.jsonl")
    options = parser.parse_args(arguments)
    if skips(BENCH, options.device):
        return
    for is_trained in (True, False):
        for figures in measure(options, is_trained):
            report(BENCH, figures, options.output)


def measure(options: argparse.Namespace, is_trained: bool) -> Iterator[dict[str, Any]]:
    """Every size of chunks, with weights in fp32 under autocast if they are trained, in bf16 if they are frozen."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    model = HeadOnly(options.width, options.vocabulary).to(device).requires_grad_(is_trained)
    hidden = torch.randn(1, options.targets, options.width, device=device, requires_grad=True)
    batch = make_batch(options.targets, options.targets, options.vocabulary).to(device)
    layer = attach_loss(model, 1024)
    exact = gradients(model, hidden, lambda: layer.loss_sum(model, batch, {"hidden": hidden}))
    if not is_trained:
        model.bfloat16()
    wanted = max(smallest_chunk(options.vocabulary), wanted_chunk(width=2, is_trained=is_trained, flops_per_byte=None))
    for chunk_tokens in options.chunks:
        layer = attach_loss(model, chunk_tokens)

        def loss(layer: Any = layer) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16):
                return layer.loss_sum(model, batch, {"hidden": hidden})

        found = gradients(model, hidden, loss)
        errors = [float((one.float() - other).norm() / other.norm()) for one, other in zip(found, exact, strict=True)]
        assert max(errors) < TOLERANCE, errors
        del found
        free_memory(device)
        work = partial(gradients, model, hidden, loss)
        others = held_bytes(device)
        peak = peak_bytes(device, work) - others
        seconds = [timed(device, work) for _ in range(options.rounds)]
        yield {
            "device": name_of(device),
            "head": "trained" if is_trained else "frozen",
            "chunk_tokens": chunk_tokens,
            "is_planned": chunk_tokens == wanted,
            "seconds": round(median(seconds), 6),
            "peak_mb": round(peak / 1e6, 1),
            "largest_error": round(max(errors), 5),
            "targets": options.targets,
            "width": options.width,
            "vocabulary": options.vocabulary,
            "rounds": options.rounds,
        }


def gradients(model: HeadOnly, hidden: Tensor, loss: Callable[[], Tensor]) -> list[Tensor]:
    """Of hidden states and, if they are trained, of the head's weights."""
    model.zero_grad(set_to_none=True)
    hidden.grad = None
    (loss() / hidden.shape[1]).backward()
    return [one.grad for one in (hidden, model.head.weight) if one.grad is not None]


def timed(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds until a device has done its work: by its own events on a GPU, of the process on a CPU."""
    if device.type != "cuda":
        started_s = time.process_time()
        work()
        return time.process_time() - started_s
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


if __name__ == "__main__":
    main()
