"""How many targets the loss projects onto the vocabulary at a time: bytes that are moved against bytes that are held. Pure.

Each chunk reads all weights of the output head, twice, and adds to the gradient of them all. Many small chunks move more bytes
than the rest of a step: 128 targets at a time, as 64 MiB hold of a vocabulary of 128k, are 64 chunks of 8k targets, which move
400 GB of an 8B model's head. A CPU computes so long on a few hundred targets that this is lost in it (tests/bench/loss.py).
"""

from raytune.units import MIB

CHUNK_BYTES = 64 * MIB
FULL_LOGITS_BYTES = 256 * MIB
FEWEST, MOST = 1024, 4096
"""Targets of a chunk in 16 bits on a GPU that has room for them: fewer leave it idle, more move hardly fewer bytes."""
SHARE_OF_PRODUCTS = 0.25
"""Of the time of a chunk's products, what its traffic may take: kernels hide most of it behind them."""
FLOPS_PER_BYTE = 220.0
"""Floating-point operations of products in 16 bits for each byte that a GPU can move meanwhile, where its rates are not known: an
H100's."""


def exceeds_full_logits(num_targets: int, vocab: int) -> bool:
    """Whether the fp32 logits of all targets are more than is worth holding (256 MiB)."""
    return 4 * num_targets * vocab > FULL_LOGITS_BYTES


def smallest_chunk(vocab: int) -> int:
    """Targets whose fp32 logits take between 32 and 64 MiB: a power of two. More cost memory, and save no time on a CPU."""
    return _power_of_two(CHUNK_BYTES // (4 * vocab))


def chunk_within(vocab: int, wanted: int, *, bytes_per_target: float, room: float | None) -> int:
    """The chunk that comes nearest to what is wanted: a power of two.

    Args:
        wanted: see `wanted_chunk`.
        bytes_per_target: that each target of a chunk takes while it is there.
        room: bytes that are left beside the smallest chunk; None: not known, and taken to be enough.
    """
    smallest = smallest_chunk(vocab)
    if room is None:
        return max(smallest, wanted)
    affordable = smallest + int(max(0.0, room) // bytes_per_target)
    return max(smallest, min(wanted, _power_of_two(affordable)))


def wanted_chunk(*, width: int, is_trained: bool, flops_per_byte: float | None) -> int:
    """The fewest targets beside whose products the traffic of a chunk is small: a power of two.

    Args:
        width: bytes of a number in products.
        is_trained: whether the head's weights have a gradient.
        flops_per_byte: of the GPU; None: not known.
    """
    flops_per_target = 6 if is_trained else 4  # per weight: as of any linear layer (Kaplan et al. 2020, section 2.1)
    traffic = bytes_per_weight(width=width, is_trained=is_trained) * (flops_per_byte or FLOPS_PER_BYTE)
    chunk = FEWEST
    while chunk < MOST and traffic > SHARE_OF_PRODUCTS * flops_per_target * chunk:
        chunk *= 2
    return chunk


def bytes_per_weight(*, width: int, is_trained: bool) -> int:
    """Bytes that a chunk moves for each weight of the head: read forward and backward, and the sum of gradients in fp32 read and
    written, by the product itself."""
    return 2 * width + 8 * is_trained


def num_chunks(num_targets: int, chunk_tokens: int | None) -> int:
    return 1 if chunk_tokens is None else -(-num_targets // chunk_tokens)


def _power_of_two(number: int) -> int:
    """The largest that is not above a number; at least 1."""
    return 1 << max(0, number.bit_length() - 1)
