"""A row divided among ranks: each has as many of its tokens, and knows where all of its documents lie. Pure.

Attention sees whole rows (model.sequence_parallel); all else that a token passes through needs that token alone.

Shapes: N tokens of the micro-batch, D documents, M targets.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from raytune.data.batches.batches import Batch
from raytune.plan.run_plan import BatchPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Which rows a rank works on, and which of their tokens: ranks that stand beside each other share rows."""

    group: int
    """The place of its rows among those of all groups: what a rank is to data where nobody shares rows."""
    num_groups: int
    place: int
    """In the group, and so of its slice in each row."""
    size: int
    """Of the group."""

    @classmethod
    def of(cls, batch: BatchPlan, rank: int, world_size: int) -> "Seat":
        size = batch.sequence_parallel
        return cls(group=rank // size, num_groups=world_size // size, place=rank % size, size=size)

    def own(self, batch: Batch) -> Batch:
        """This rank's part of its group's batch."""
        return batch if self.size == 1 else slice_of(batch, self.place, self.size)


def slice_of(batch: Batch, place: int, size: int) -> Batch:
    """One of `size` parts of a batch, all with the same number of tokens; `cumulative_lengths` stay those of all tokens.

    What lacks for that is filled up behind the last document, by a document of its own without targets, which nobody sees. A
    target belongs to the part that predicts it, which may be the one before the part that has its token.
    """
    num_tokens = batch.num_tokens
    length = -(-num_tokens // size)
    num_filled = length * size - num_tokens
    own = slice(place * length, (place + 1) * length)
    positions = torch.cat([batch.position_ids, torch.arange(num_filled, device=batch.position_ids.device)[None]], dim=1)
    ends = batch.cumulative_lengths
    is_own = (batch.target_positions >= own.start) & (batch.target_positions < own.stop)
    return replace(
        batch,
        input_ids=F.pad(batch.input_ids, (0, num_filled))[:, own].contiguous(),
        position_ids=positions[:, own].contiguous(),
        cumulative_lengths=torch.cat([ends, ends[-1:] + num_filled]) if num_filled else ends,
        max_document_length=max(batch.max_document_length, num_filled),
        target_positions=batch.target_positions[is_own] - own.start,
        target_ids=batch.target_ids[is_own],
        target_weights=None if batch.target_weights is None else batch.target_weights[is_own],
    )
