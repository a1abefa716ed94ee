"""Gradients summed over ranks while a backward pass goes on are, bit for bit, those that are summed after it."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raytune.training.engines.gradient_sum import ON_THE_WAY, GradientSum
from tests.numerics.processes import run_on_ranks
from tests.numerics.runs import LORA, SAME_SUMS, Material, largest_difference, make_plan, relative_difference, run, train
from tests.variants import variants

WIDTH, LAYERS = 8, 6
PER_LAYER = 4 * (WIDTH * WIDTH + WIDTH)
BUCKET = 2 * PER_LAYER
"""Of two layers; an embedding is larger."""


class Model(nn.Module):
    """Layers over an embedding that is too large for a bucket; one layer is frozen, and one of them rank 1 does without."""

    def __init__(self, *, skips: bool = False, twice: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(40, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.layers[3].requires_grad_(False)
        self._without = 2 if skips and dist.get_rank() == 1 else None
        self._twice = twice

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for index, layer in enumerate(self.layers):
            if index != self._without:
                hidden = hidden + torch.tanh(layer(hidden))
        if self._twice:  # the last layer again, in a backward pass of its own
            for _ in range(2):
                hidden = checkpoint(lambda values: torch.tanh(self.layers[-1](values)), hidden, use_reentrant=True)
        return hidden.square().mean()


def summed(*, overlaps: bool, steps: int = 3, accumulation: int = 2, **model: Any) -> list[dict[str, Any]]:
    """Of each step: gradients by name, sizes of buckets as they left, and how many left before the backward pass was over."""
    module = Model(**model)
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    sums = GradientSum(trained.values(), bucket_bytes=BUCKET, overlaps=overlaps)
    sizes: list[int] = []
    most = 0
    all_reduce = dist.all_reduce

    def watched(flat: Tensor, **options: Any) -> Any:
        nonlocal most
        sizes.append(flat.numel())
        most = max(most, len(sums._on_the_way) + 1)
        return all_reduce(flat, **options)

    generator = torch.Generator().manual_seed(dist.get_rank())
    found = []
    dist.all_reduce = watched
    try:
        for _ in range(steps):
            for micro in range(accumulation):
                tokens = torch.randint(40, (2, 5), generator=generator)
                with sums.during(is_last=micro == accumulation - 1):
                    module(tokens).backward()
            early = len(sizes)
            sums.finish()
            gradients = {name: parameter.grad.clone() for name, parameter in trained.items() if parameter.grad is not None}
            found.append({"gradients": gradients, "sizes": sizes.copy(), "early": early, "most": most})
            module.zero_grad(set_to_none=True)
            sizes.clear()
    finally:
        dist.all_reduce = all_reduce
    sums.close()
    return found


def both_ways(model: dict[str, Any], accumulation: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return summed(overlaps=True, accumulation=accumulation, **model), summed(overlaps=False, accumulation=accumulation, **model)


@pytest.mark.parametrize(
    ("ranks", "model", "accumulation"),
    variants([(2, {}, 2), (3, {"skips": True}, 1)], [(3, {}, 2), (2, {"skips": True}, 2), (2, {}, 1), (3, {"skips": True}, 2)]),
)
def test_sums_on_the_way_equal_sums_at_the_end(ranks: int, model: dict[str, Any], accumulation: int) -> None:
    of_ranks = run_on_ranks(both_ways, ranks, model, accumulation)
    for rank, (overlapped, at_end) in enumerate(of_ranks):
        for step, (one, other) in enumerate(zip(overlapped, at_end, strict=True)):
            assert one["gradients"].keys() == other["gradients"].keys()
            assert all(torch.equal(one["gradients"][name], other["gradients"][name]) for name in one["gradients"])
            assert all(torch.equal(one["gradients"][name], of_ranks[0][0][step]["gradients"][name]) for name in one["gradients"])
            assert one["sizes"] == other["sizes"] == of_ranks[0][0][step]["sizes"], "one order on all ranks"
            assert other["early"] == 0
            assert one["most"] <= ON_THE_WAY
        first, *later = (step["early"] for step in overlapped)
        assert first == (0 if accumulation == 1 else later[0]), "the first pass is watched"
        # The embedding is the last of four, and complete when the pass is.
        lacks = bool(model) and rank == 1
        assert later == [1 if lacks else 4] * 2


def local_sums() -> dict[str, float]:
    """Largest difference between what is summed and a sum of what each rank has, by name."""
    (step,) = summed(overlaps=False, steps=1, accumulation=1)
    module = Model()
    module(torch.randint(40, (2, 5), generator=torch.Generator().manual_seed(dist.get_rank()))).backward()
    differences = {}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            differences[name] = (parameter.grad - step["gradients"][name]).abs().max().item()
    return differences


def test_sums_are_of_all_ranks() -> None:
    for differences in run_on_ranks(local_sums, 2):
        assert len(differences) == 2 * (LAYERS - 1) + 1
        assert set(differences.values()) == {0.0}


def test_a_gradient_that_comes_in_parts_is_not_sent_with_its_first() -> None:
    for overlapped, at_end in run_on_ranks(both_ways, 2, {"twice": True}, 2):
        for one, other in zip(overlapped, at_end, strict=True):
            assert one["early"] == 0
            assert all(torch.equal(one["gradients"][name], other["gradients"][name]) for name in one["gradients"])


FEW: dict[str, Any] = {"reduce_elements": 2000}
"""Numbers in a bucket, of which a tiny model then has many."""


@pytest.mark.parametrize("adapter", variants([LORA], [{"method": "full"}]), ids=lambda adapter: adapter["method"])
def test_a_run_in_many_buckets_equals_one_process(adapter: dict[str, Any], material: Material) -> None:
    plan = make_plan(material, workers=2, adapter=adapter, engine={"buckets": FEW})
    (first, second), alone = run(plan), train(make_plan(material, adapter=adapter))
    assert first.numbers == second.numbers
    assert relative_difference(first.losses, alone.losses) <= SAME_SUMS
    assert largest_difference(first, alone) <= SAME_SUMS


@pytest.mark.parametrize("stage", variants([1, 3], [2]))
def test_shards_in_small_buckets_with_a_whole_adapter_equal_one_process(stage: int, material: Material) -> None:
    sizes = FEW | {"prefetch_elements": 3000, "persistent_elements": 1000}
    plan = make_plan(material, workers=2, stage=stage, adapter=LORA, engine={"buckets": sizes}, num_parameters=10**6)
    first, alone = run(plan)[0], train(make_plan(material, adapter=LORA))
    assert relative_difference(first.losses, alone.losses) <= SAME_SUMS
    assert largest_difference(first, alone) <= SAME_SUMS
