"""How much collectives carry at once, by model and fabric: enough that links work, and not only wait. Pure.

In a ring of N ranks each of N - 1 hops takes a latency a and n / (N B) seconds for n bytes at B bytes per second (Thakur et al.
2005, Optimization of Collective Communication Operations, section 4). What is sent is to be so large that latencies are a tenth
of that. Megatron-LM's rule, 40 million numbers and at least a million per rank, comes to about the same on its authors' machines.
More only takes memory, and ends later: a single bucket has nothing to overlap with.
"""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from raytune.config.sections.model import Quantization
from raytune.plan.model.shapes import ModelShape
from raytune.plan.model.trained import Trained
from raytune.plan.run_plan import BucketPlan
from raytune.units import MIB

LATENCY_SHARE = 0.1
FEWEST = 4
"""Buckets of all gradients, so that most travel while a backward pass goes on."""
SMALLEST_BYTES = 25 * MIB
"""Of a bucket, however fast a link is: as much as PyTorch's DistributedDataParallel sends by default."""
LARGEST_BYTES = 400_000_000
"""Two of them lie beside the gradients."""
LARGEST_PREFETCH = 500_000_000
"""Half of the weights that stage 3 may hold whole (stage3_max_live_parameters): the rest are being computed with."""
PERSISTENT_BYTES = 256 * MIB
"""Of small weights that stage 3 leaves whole on every rank."""
PLAIN_ELEMENTS = 16 * MIB
"""Gradients in a bucket of PlainEngine's where the fabric is not known: 64 MiB."""


@dataclass(frozen=True, slots=True)
class Ring:
    """The ring that a collective of all ranks runs along."""

    bytes_per_s: float
    """That pass into a node, or into a GPU: the slower of the two."""
    hop_s: float
    """Latency from one rank to the next, in the mean."""


def buckets_of(
    *,
    engine: str,
    width: int,
    workers: int,
    shape: ModelShape,
    trained: Trained,
    quantization: Quantization | None,
    ring: Ring | None,
) -> BucketPlan:
    """What collectives of a run carry.

    Args:
        engine: "plain" or "zero".
        width: bytes of a gradient, and of a weight that is gathered.
        trained: by the end of the run.
        ring: None: the fabric is not known.
    """
    if ring is None or workers == 1:
        return BucketPlan(reduce_elements=PLAIN_ELEMENTS) if engine == "plain" else BucketPlan()
    in_hops = workers * ring.bytes_per_s * ring.hop_s  # bytes that could have travelled in the latency of all hops
    wanted = in_hops * (1 - LATENCY_SHARE) / LATENCY_SHARE
    few = max(SMALLEST_BYTES, width * trained.num_trainable / FEWEST)
    bucket = min(max(SMALLEST_BYTES, wanted), few, LARGEST_BYTES)
    # One weight arrives while another, which has arrived, waits for its product.
    prefetch = min(LARGEST_PREFETCH, max(wanted / width, 2 * _largest_product(shape)))
    smaller = in_hops / width
    if quantization is not None:  # packed weights have fewer numbers than they stand for
        smaller = min(smaller, min(_packed_sizes(shape)) / 8)
    return BucketPlan(
        reduce_elements=int(bucket / width),
        prefetch_elements=int(prefetch),
        persistent_elements=_most_within(parameter_sizes(shape, trained), smaller, PERSISTENT_BYTES / width),
    )


def largest_persistent(buckets: BucketPlan, num_parameters: int) -> int:
    """Numbers of the largest parameter that stage 3 leaves whole: of a model that has few of them, a thousandth."""
    return min(buckets.persistent_elements, num_parameters // 1000)


def num_persistent(shape: ModelShape, trained: Trained, buckets: BucketPlan) -> int:
    """Numbers in parameters that stage 3 leaves whole."""
    largest = largest_persistent(buckets, shape.num_parameters)
    return sum(size * count for size, count in parameter_sizes(shape, trained).items() if size <= largest)


@lru_cache(maxsize=4)
def parameter_sizes(shape: ModelShape, trained: Trained) -> Counter[int]:
    """How many parameters there are of each size, those of an adapter with them; a base in 4 bits as if it were in 16."""
    sizes: Counter[int] = Counter()
    for module in shape.modules():
        if module.kind == "head" and shape.is_tied:
            continue
        parts = [one.inputs * one.outputs for one in module.matrices] or [module.inputs * module.outputs]
        sizes.update(module.copies * size for size in parts)
        if module.num_biases:
            sizes[module.num_biases] += 1
    if not trained.is_base:
        for part in trained.parts:
            factors = [rows * columns for rows, columns in part.matrices]
            sizes.update(factors if sum(factors) == part.num_parameters else [part.num_parameters])
    del sizes[0]
    return sizes


def _most_within(sizes: Counter[int], smaller: float, most: float) -> int:
    """The largest size below a limit up to which all parameters together have at most so many numbers."""
    total, found = 0, 0
    for size in sorted(sizes):
        total += size * sizes[size]
        if size >= smaller or total > most:
            break
        found = size
    return found


def _largest_product(shape: ModelShape) -> int:
    return max(one.inputs * one.outputs for layer in shape.layers() for one in layer if one.is_linear or one.kind == "experts")


def _packed_sizes(shape: ModelShape) -> list[int]:
    return [one.inputs * one.outputs for layer in shape.layers() for one in layer if one.is_linear]
