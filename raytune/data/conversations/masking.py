"""What is a target. Pure: turns and character spans in, a truth value per token out."""

from collections.abc import Sequence

import numpy as np

from raytune.data.conversations.conversation import Message

Targets = str | tuple[str, ...]
"""`data.targets`: "completion", "assistant", "last", "all", or roles."""


def trained_turns(messages: Sequence[Message], targets: Targets) -> list[int]:
    """Indices of the turns that carry loss: those that `data.targets` means, without those whose row says `train: False`.

    With "all" the whole text does, turns or not, and the caller does not ask.
    """
    return [turn for turn in _meant_turns(messages, targets) if not is_excepted(messages[turn])]


def excepted_turns(messages: Sequence[Message], targets: Targets) -> list[int]:
    """Indices of the turns that would carry loss, did their row not say `train: False`."""
    return [turn for turn in _meant_turns(messages, targets) if is_excepted(messages[turn])]


def is_excepted(message: Message) -> bool:
    return message.get("train") is False


def weight_of(message: Message) -> float:
    """How much each target of a turn counts in the loss, if it has any."""
    return message.get("weight", 1.0)


def _meant_turns(messages: Sequence[Message], targets: Targets) -> list[int]:
    assert targets != "all"
    roles = targets if isinstance(targets, tuple) else ("assistant",)
    turns = [index for index, message in enumerate(messages) if message["role"] in roles]
    return turns[-1:] if targets == "last" else turns


def target_mask(
    token_starts: np.ndarray,
    token_ends: np.ndarray,
    span_starts: Sequence[int] | np.ndarray,
    span_ends: Sequence[int] | np.ndarray,
) -> np.ndarray:
    """Which tokens are targets: those that share text with a span.

    Args:
        token_starts, token_ends: where each token's text begins and ends; neither may ever decrease.
        span_starts, span_ends: the trained pieces of text, in the same units.
    """
    first, behind = _tokens_of_spans(token_starts, token_ends, span_starts, span_ends)
    depth = np.zeros(len(token_starts) + 1, np.int32)
    np.add.at(depth, first, 1)
    np.add.at(depth, behind, -1)
    return np.cumsum(depth[:-1]) > 0


def target_weights(
    token_starts: np.ndarray,
    token_ends: np.ndarray,
    span_starts: Sequence[int],
    span_ends: Sequence[int],
    span_weights: Sequence[float],
) -> np.ndarray:
    """Weight of each token, float32: that of the span it shares text with (the last of them), 1 outside of spans.

    Args:
        token_starts, token_ends, span_starts, span_ends: as for `target_mask`.
        span_weights: of each span.
    """
    weights = np.ones(len(token_starts), np.float32)
    for first, behind, weight in zip(*_tokens_of_spans(token_starts, token_ends, span_starts, span_ends), span_weights):
        weights[first:behind] = weight
    return weights


def _tokens_of_spans(
    token_starts: np.ndarray,
    token_ends: np.ndarray,
    span_starts: Sequence[int] | np.ndarray,
    span_ends: Sequence[int] | np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """For each span the first token that shares text with it, and the one behind the last."""
    first = np.searchsorted(token_ends, span_starts, side="right")
    return first, np.maximum(first, np.searchsorted(token_starts, span_ends, side="left"))
