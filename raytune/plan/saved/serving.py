"""How much an engine takes on at once, and what that is in memory."""

from raytune.errors import PlanError
from raytune.plan.model.shapes import ModelShape
from raytune.plan.value import Plan
from raytune.units import format_bytes

SPARE_COLUMNS = 64
"""That a batch has behind its rows, so that its keys and values are not copied for each token."""
MOST_UNUSED = 1.5
"""Memory that a batch holds at most, as a multiple of its rows with their spare columns, once rows have left it."""
LEAST_CACHED = 512
"""Tokens of keys and values below which serving is not worth a start."""


class EngineLimits(Plan):
    most_at_once: int = 32
    """Answers that are written at once, in all batches together."""
    most_waiting: int = 256
    """Requests that wait for a place; one more is refused."""
    most_cached_tokens: int = 65536
    """Places for keys and values, of all rows that are answered at once: as long as each may become, padded to the longest of
    its batch, with `SPARE_COLUMNS`."""
    most_prefilled: int = 512
    """Tokens of prompts that are read in a step, so that answers that are being written go on meanwhile."""


def most_cached_tokens(room_bytes: int, shape: ModelShape, bytes_per_number: int) -> int:
    """Places for keys and values that a memory has, for `EngineLimits`.

    Every layer is counted as one that keeps all keys: windows and states take less.

    Args:
        room_bytes: what is free beside the model.
        bytes_per_number: 4 for fp32, 2 for 16 bits.

    Raises:
        PlanError: if that is hardly any.
    """
    per_token = 2 * shape.num_layers * shape.kv_heads * shape.head_dim * bytes_per_number
    tokens = int(room_bytes / (per_token * MOST_UNUSED))
    if tokens < LEAST_CACHED:
        raise PlanError(
            f"Keys and values take {format_bytes(per_token)} a token, so that {format_bytes(max(room_bytes, 0))} beside the "
            f"model hold {max(tokens, 0)} of them, and {LEAST_CACHED} are the least to serve with. Free memory, or serve the "
            f"model in 16 bits."
        )
    return tokens
