"""Losses in the units that people compare."""

import math


def perplexity(loss: float) -> float:
    """exp of the mean cross-entropy per target token (nats); infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_byte(loss: float, num_targets: int, num_bytes: int) -> float:
    """Bits that the model needs per byte of target text: comparable between tokenizers.

    Args:
        loss: mean cross-entropy per target token, in nats.
        num_targets: target tokens that `loss` averages over.
        num_bytes: UTF-8 bytes of the text behind these tokens.
    """
    return loss * num_targets / (math.log(2) * num_bytes)
