"""Virtual tokens in front of each document of a batch: where all lie then, which positions they have, and what predicts a target.

A virtual token belongs to its document alone: positions start again at 0 with the first of each document, and the documents of a
packed row see no others. Pure, and on whichever device the batch is.

Shapes: N tokens of the micro-batch, D documents, V virtual tokens of each, M targets.
"""

from dataclasses import replace

import torch
from torch import Tensor

from raytune.data.batches.batches import Batch


def with_tokens_in_front(batch: Batch, num_virtual: int) -> Batch:
    """A batch whose documents have virtual tokens in front, which pass through the layers as others do.

    `input_ids` stay as they are; all else is that of rows of N + D V tokens, with `token_positions` for those that have an id.
    """
    num_documents, device = len(batch.cumulative_lengths) - 1, batch.cumulative_lengths.device
    token_positions_N = _behind_virtual(batch, num_virtual)
    cumulative_D1 = longer(batch.cumulative_lengths, num_virtual)
    position_ids = torch.zeros(1, batch.num_tokens + num_documents * num_virtual, dtype=torch.long, device=device)
    position_ids[:, token_positions_N] = batch.position_ids + num_virtual
    position_ids[:, virtual_positions(cumulative_D1, num_virtual)] = torch.arange(num_virtual, device=device).repeat(
        num_documents
    )
    return replace(
        batch,
        position_ids=position_ids,
        cumulative_lengths=cumulative_D1,
        max_document_length=batch.max_document_length + num_virtual,
        target_positions=token_positions_N[batch.target_positions],
        token_positions=token_positions_N,
    )


def with_keys_in_front(batch: Batch, num_virtual: int) -> Batch:
    """A batch whose documents have virtual tokens in front of their keys and values only: rows stay as they are."""
    return replace(
        batch,
        position_ids=batch.position_ids + num_virtual,
        token_positions=_behind_virtual(batch, num_virtual),
        num_virtual_keys=num_virtual,
    )


def virtual_positions(cumulative_D1: Tensor, num_virtual: int) -> Tensor:
    """(D V,) where the virtual tokens of each document lie.

    Args:
        cumulative_D1: where each document begins, its virtual tokens with it.
    """
    return (cumulative_D1[:-1, None].long() + torch.arange(num_virtual, device=cumulative_D1.device)).flatten()


def laid_out(own: Tensor, virtual: Tensor, token_positions_N: Tensor, virtual_positions_DV: Tensor) -> Tensor:
    """Rows of tokens with virtual ones in front of each document.

    Args:
        own: (..., N, width)
        virtual: (V, width) or (..., V, width)

    Returns:
        (..., N + D V, width) in the dtype of `own`. The gradient of `virtual` is summed over documents in its own dtype, in the
        same order each time.
    """
    num_virtual, around = virtual.shape[-2], own.shape[:-2]
    num_documents = len(virtual_positions_DV) // num_virtual
    of_each = virtual.unsqueeze(-3).expand(*around, num_documents, *virtual.shape[-2:]).flatten(-3, -2)
    rows = own.new_zeros(*around, len(token_positions_N) + len(virtual_positions_DV), own.shape[-1])
    # Not index_copy, which keeps what it copies for the backward pass.
    rows[..., token_positions_N, :] = own
    rows[..., virtual_positions_DV, :] = of_each.to(own.dtype)
    return rows


def document_of(ends: Tensor, length: int) -> Tensor:
    """(length,) the document that each token, or key, of a row belongs to.

    Args:
        ends: (D + 1,) where each document begins, and the last one ends.
    """
    positions = torch.arange(length, dtype=torch.int32, device=ends.device)
    return torch.bucketize(positions, ends[1:], right=True)


def longer(cumulative_D1: Tensor, num_virtual: int) -> Tensor:
    """(D + 1,) where documents begin that have as many virtual tokens in front."""
    if not num_virtual:
        return cumulative_D1
    return cumulative_D1 + num_virtual * torch.arange(len(cumulative_D1), dtype=cumulative_D1.dtype, device=cumulative_D1.device)


def _behind_virtual(batch: Batch, num_virtual: int) -> Tensor:
    """(N,) where each token lies."""
    tokens = torch.arange(batch.num_tokens, device=batch.cumulative_lengths.device)
    return tokens + (document_of(batch.cumulative_lengths, batch.num_tokens) + 1) * num_virtual
