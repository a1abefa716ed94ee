"""The documents of tokenised shards on their way into rows: a stated number at a time, mapped into memory.

What is held of a document is given up with its buffer, so that packing takes as much memory for a hundred million documents as
for some ten thousands.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from raytune.data.rows.shards import ShardResult
from raytune.data.store.store import batches_of, joined, view

DOCUMENTS_AT_ONCE = 1 << 16
"""That are packed together: enough for rows as full as packing all at once makes them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceUse:
    """What is made of the documents of one source."""

    passes: float = 1.0
    """Over them, in an epoch."""
    loss_weight: float = 1.0
    """Of each of its targets, times what its row says."""
    num_documents: int
    num_tokens: int


class Documents:
    """Some documents, in the order of their shards."""

    def __init__(self, batches: Sequence[pa.RecordBatch], loss_weights: Sequence[float]) -> None:
        """Args:
        batches: of shards, or slices of them.
        loss_weights: of each batch's targets.
        """
        offsets = [view(batch.column("input_ids").offsets, np.int32) for batch in batches]
        self._input_ids = [view(batch.column("input_ids").values, np.int32) for batch in batches]
        self._is_target = [view(batch.column("is_target").values, np.uint8).view(bool) for batch in batches]
        weights = [batch.column("target_weights") for batch in batches]
        self._weights = [None if column.null_count else view(column.values, np.float32) for column in weights]
        self._loss_weights = loss_weights
        self._batch = np.repeat(np.arange(len(batches)), [batch.num_rows for batch in batches])
        self._start = np.concatenate([one[:-1] for one in offsets])
        self.lengths = np.concatenate([np.diff(one) for one in offsets])
        self.num_bytes = joined([batch.column("num_bytes") for batch in batches])
        self.files = joined([batch.column("file") for batch in batches], np.int32)
        self.lines = joined([batch.column("line") for batch in batches])

    def tokens(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and targets of documents, end to end."""
        places = self._places(documents)
        return (
            np.concatenate([self._input_ids[batch][start:stop] for batch, start, stop in places]),
            np.concatenate([self._is_target[batch][start:stop] for batch, start, stop in places]),
        )

    def weights(self, documents: np.ndarray) -> np.ndarray:
        """Weights of the tokens of documents, end to end."""
        return np.concatenate([self._weights_of(*place) for place in self._places(documents)])

    def _weights_of(self, batch: int, start: int, stop: int) -> np.ndarray:
        weights, loss_weight = self._weights[batch], np.float32(self._loss_weights[batch])
        return np.full(stop - start, loss_weight) if weights is None else weights[start:stop] * loss_weight

    def _places(self, documents: np.ndarray) -> list[tuple[int, int, int]]:
        """The record batch of each document, and where its tokens lie in it."""
        starts = self._start[documents]
        stops = starts + self.lengths[documents]
        return list(zip(self._batch[documents].tolist(), starts.tolist(), stops.tolist()))


def in_buffers(shards: Sequence[ShardResult], uses: Sequence[SourceUse]) -> Iterator[Documents]:
    """All documents in order, `DOCUMENTS_AT_ONCE` and then the rest: how shards divide them does not matter."""
    held: list[pa.RecordBatch] = []
    weights: list[float] = []
    room = DOCUMENTS_AT_ONCE
    for shard in shards:
        for batch in batches_of(shard.path):
            rest = batch
            while rest.num_rows:
                held.append(rest.slice(0, room))
                weights.append(uses[shard.source].loss_weight)
                rest = rest.slice(room)
                room -= held[-1].num_rows
                if not room:
                    yield Documents(held, weights)
                    held, weights, room = [], [], DOCUMENTS_AT_ONCE
    if held:
        yield Documents(held, weights)


def have_weights(shards: Sequence[ShardResult], uses: Sequence[SourceUse]) -> bool:
    """Whether some target counts other than as 1."""
    return any(
        uses[shard.source].loss_weight != 1 or not batch.column("target_weights").null_count
        for shard in shards
        for batch in batches_of(shard.path)
    )
