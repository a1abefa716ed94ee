"""The loss layer against all logits and cross-entropy: CPU seconds and peak memory of a forward and backward pass of the head.

    python -m tests.bench.loss --output

2,048 tokens of which half are targets, width 512, vocabulary 32,768. Memory is exact and counted, not sampled: the bytes of all
tensors that PyTorch's operations return and that live at the same time, gradients included, weights and hidden states not.
Buffers inside a kernel are not seen.
"""

import argparse
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raytune.data.batches.batches import Batch
from raytune.training.losses.losses import attach_loss
from tests.bench.measure import Rival, interleaved, ratios, report

NUM_TOKENS, WIDTH, VOCABULARY = 2048, 512, 32768
NUM_TARGETS = NUM_TOKENS // 2

FULL = "all logits, cross_entropy"
TARGETS_ONLY = "raytune, full"
CHUNKED = "raytune, chunked"
GOALS = {"cpu_s": 0.95, "memory": 0.3}
"""Largest share of what all logits need (`raytune explain performance`): time of the faster of our two, memory of the chunks."""


class PeakMemory(TorchDispatchMode):
    """Bytes of the tensors that operations return, at the moment when most of them live."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._before: set[int] = set()
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def ignore(self, *tensors: Tensor) -> None:
        """Do not count these, which exist already."""
        self._before |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self._before:
                storage = leaf.untyped_storage()
                self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._live = {key: (reference, size) for key, (reference, size) in self._live.items() if not reference.expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


class HeadOnly(nn.Module):
    """A causal language model without a backbone."""

    def __init__(self, width: int = WIDTH, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.head = nn.Linear(width, vocabulary, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, hidden: Tensor | None = None, **kwargs: Any) -> Any:
        return SimpleNamespace(logits=self.head(hidden))


def make_batch(num_tokens: int = NUM_TOKENS, num_targets: int = NUM_TARGETS, vocabulary: int = VOCABULARY) -> Batch:
    target_positions = torch.randperm(num_tokens)[:num_targets].sort().values
    return Batch(
        input_ids=torch.zeros((1, num_tokens), dtype=torch.long),
        position_ids=torch.arange(num_tokens)[None],
        cumulative_lengths=torch.tensor([0, num_tokens], dtype=torch.int32),
        max_document_length=num_tokens,
        target_positions=target_positions,
        target_ids=torch.randint(vocabulary, (num_targets,)),
        num_targets_in_step=num_targets,
        rows=(0,),
    )


def losses(model: HeadOnly, batch: Batch, hidden: Tensor, chunk_tokens: int) -> dict[str, Callable[[], Tensor]]:
    labels = torch.full((NUM_TOKENS,), -100)
    labels[batch.target_positions] = batch.target_ids
    full, chunked = attach_loss(model, None), attach_loss(model, chunk_tokens)
    return {
        FULL: lambda: F.cross_entropy(model(hidden=hidden).logits[0].float(), labels, ignore_index=-100, reduction="sum"),
        TARGETS_ONLY: lambda: full.loss_sum(model, batch, {"hidden": hidden}),
        CHUNKED: lambda: chunked.loss_sum(model, batch, {"hidden": hidden}),
    }


def peak_bytes(model: HeadOnly, hidden: Tensor, loss: Callable[[], Tensor]) -> tuple[int, float, list[Tensor]]:
    """Peak memory, loss and gradients of one forward and backward pass."""
    model.zero_grad(set_to_none=True)
    hidden.grad = None
    with PeakMemory() as memory:
        memory.ignore(model.head.weight, hidden)
        value = loss()
        (value / NUM_TARGETS).backward()
    assert model.head.weight.grad is not None
    assert hidden.grad is not None
    return memory.peak, value.item(), [model.head.weight.grad, hidden.grad]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunk-tokens", type=int, default=512)
    parser.add_argument("--output", action="store_true", help="append the figures to tests/bench/baselines")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, batch = HeadOnly(), make_batch()
    hidden = torch.randn(1, NUM_TOKENS, WIDTH, requires_grad=True)
    rivals = losses(model, batch, hidden, arguments.chunk_tokens)

    peaks, values, gradients = {}, {}, {}
    for name, loss in rivals.items():
        peaks[name], values[name], gradients[name] = peak_bytes(model, hidden, loss)
        for ours, theirs in zip(gradients[name], gradients[FULL]):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)

    def rival(loss: Callable[[], Tensor]) -> Rival:
        def make_ready() -> Callable[[], object]:
            model.zero_grad(set_to_none=True)
            hidden.grad = None
            return lambda: (loss() / NUM_TARGETS).backward()

        return make_ready

    seconds = interleaved({name: rival(loss) for name, loss in rivals.items()}, arguments.rounds)
    ours = min((TARGETS_ONLY, CHUNKED), key=lambda name: min(seconds[name]))
    report(
        "loss",
        {
            "tokens": NUM_TOKENS,
            "targets": NUM_TARGETS,
            "width": WIDTH,
            "vocabulary": VOCABULARY,
            "chunk_tokens": arguments.chunk_tokens,
            "dtype": "fp32",
            "rounds": arguments.rounds,
            "cpu_s": {name: [round(time, 3) for time in times] for name, times in seconds.items()},
            "cpu_s_against_full": {name: ratios(times, seconds[FULL]) for name, times in seconds.items()},
            "peak_mb": {name: round(peak / 1e6, 1) for name, peak in peaks.items()},
            "peak_against_full": {name: round(peak / peaks[FULL], 3) for name, peak in peaks.items()},
            "loss": {name: round(value, 3) for name, value in values.items()},
            "goals": GOALS,
            "goals_met": {
                "cpu_s": min(seconds[ours]) <= GOALS["cpu_s"] * min(seconds[FULL]),
                "memory": peaks[CHUNKED] <= GOALS["memory"] * peaks[FULL],
            },
        },
        arguments.output,
    )


if __name__ == "__main__":
    main()
