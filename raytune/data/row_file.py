"""The rows of a store on their way to the disk: documents of all shards, packed and written as `store` reads them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raytune.data.mixing import documents_of_passes
from raytune.data.packing import Packing, pack
from raytune.data.shards import ShardResult
from raytune.data.store import WEIGHTS_COLUMN, joined, view
from raytune.local_files import local_errors
from raytune.plan.data_report import EpochPart

_ROWS_SCHEMA = pa.schema(
    [
        ("input_ids", pa.large_list(pa.int32())),
        ("is_target", pa.large_list(pa.bool_())),
        ("document_lengths", pa.list_(pa.int32())),
        ("files", pa.list_(pa.int32())),
        ("lines", pa.list_(pa.int64())),
        ("num_targets", pa.int64()),
        ("num_bytes", pa.int64()),
    ]
)
_WEIGHTED_ROWS_SCHEMA = pa.schema(
    [*_ROWS_SCHEMA, (WEIGHTS_COLUMN, pa.large_list(pa.float32())), ("weight", pa.float64())]  # of each row: sum over its targets
)
_TOKENS_PER_RECORD_BATCH = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceUse:
    """What is made of the documents of one source."""

    passes: float = 1.0
    """Over them, in an epoch."""
    loss_weight: float = 1.0
    """Of each of its targets, times what its row says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenRows:
    sizes: dict[str, int]
    """The counts of `StoreInfo`."""
    mixed: list[EpochPart] | None
    """What the rows have of each source; None: each document once."""


class _Documents:
    """Documents in record batches.

    Args:
        read: each with the number of its source.
    """

    def __init__(self, read: Sequence[tuple[int, pa.RecordBatch]], uses: Sequence[SourceUse]) -> None:
        batches = [batch for _, batch in read]
        self._source_of_batch = np.array([source for source, _ in read])
        self._loss_weights = [uses[source].loss_weight for source, _ in read]
        offsets = [view(batch.column("input_ids").offsets, np.int32) for batch in batches]
        self._input_ids = [view(batch.column("input_ids").values, np.int32) for batch in batches]
        self._is_target = [view(batch.column("is_target").values, np.uint8).view(bool) for batch in batches]
        weights = [batch.column("target_weights") for batch in batches]
        self._weights = [None if column.null_count else view(column.values, np.float32) for column in weights]
        self.are_weighted = any(one is not None for one in self._weights) or any(one != 1 for one in self._loss_weights)
        self._batch = np.repeat(np.arange(len(batches)), [batch.num_rows for batch in batches])
        self._starts = [one[:-1] for one in offsets]
        self._start = np.concatenate(self._starts)
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

    @property
    def sources(self) -> np.ndarray:
        """The source of each document."""
        return self._source_of_batch[self._batch]

    def num_targets(self) -> np.ndarray:
        """Of each document; reads all of them."""
        counted = [np.add.reduceat(targets, starts, dtype=np.int64) for targets, starts in zip(self._is_target, self._starts)]
        return np.concatenate(counted)

    def _places(self, documents: np.ndarray) -> list[tuple[int, int, int]]:
        """The record batch of each document, and where its tokens lie in it."""
        return list(zip(self._batch[documents], self._start[documents], self._start[documents] + self.lengths[documents]))


def _batches_of(path: str) -> Iterator[pa.RecordBatch]:
    reader = pa.ipc.open_file(pa.memory_map(path))
    return (reader.get_batch(index) for index in range(reader.num_record_batches))


def write_rows(
    path: Path,
    shards: Sequence[ShardResult],
    uses: Sequence[SourceUse],
    row_length: int,
    packing: Packing,
    num_virtual: int = 0,
) -> WrittenRows:
    """Pack the documents of all shards, those of each pass by themselves, and write the rows.

    Args:
        uses: of each source.
        row_length, packing, num_virtual: as of `pack`.
    """
    documents = _Documents([(shard.source, batch) for shard in shards for batch in _batches_of(shard.path)], uses)
    if all(use.passes == 1 for use in uses):
        rows, mixed = pack(documents.lengths, row_length, packing, num_virtual=num_virtual), None
        seen = np.arange(len(documents.lengths))
    else:
        passes, mixed = _mixed(documents, uses)
        rows, seen = [], np.concatenate(passes)
        for members in passes:  # so that no row has a document twice
            packed = pack(documents.lengths[members], row_length, packing, num_virtual=num_virtual)
            rows += [members[row].tolist() for row in packed]
    num_targets = 0
    schema = _WEIGHTED_ROWS_SCHEMA if documents.are_weighted else _ROWS_SCHEMA
    with local_errors(path), pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for some_rows in _in_batches(rows, documents.lengths):
            batch = _record_batch(some_rows, documents)
            num_targets += int(view(batch.column("num_targets"), np.int64).sum())
            writer.write_batch(batch)
    sizes = {
        "num_rows": len(rows),
        "num_documents": len(seen),
        "num_tokens": int(documents.lengths[seen].sum(dtype=np.int64)),
        "num_targets": num_targets,
        "num_bytes": int(documents.num_bytes[seen].sum()),
        "longest_document": int(documents.lengths[seen].max()),
    }
    return WrittenRows(sizes=sizes, mixed=mixed)


def packed_in_memory(
    documents: Sequence[pa.RecordBatch],
    row_length: int,
    packing: Packing,
    num_virtual: int,
    in_order: Callable[[int], np.ndarray],
) -> list[pa.RecordBatch]:
    """Packed rows of documents, in another order.

    Args:
        row_length, packing, num_virtual: as of `pack`.
        in_order: given how many rows there are, their numbers in the order that they are to have.
    """
    found = _Documents([(0, batch) for batch in documents], [SourceUse()])
    rows = pack(found.lengths, row_length, packing, num_virtual=num_virtual)
    return [_record_batch(some, found) for some in _in_batches([rows[row] for row in in_order(len(rows))], found.lengths)]


def _mixed(documents: _Documents, uses: Sequence[SourceUse]) -> tuple[list[np.ndarray], list[EpochPart]]:
    """The documents of each pass, and what all passes have of each source."""
    sources, num_targets = documents.sources, documents.num_targets()
    passes = documents_of_passes([use.passes for use in uses], sources, num_targets)
    seen = np.concatenate(passes)
    counts = [
        np.bincount(sources[seen], of, minlength=len(uses))
        for of in (np.ones(len(seen)), documents.lengths[seen], num_targets[seen])
    ]
    return passes, [EpochPart(documents=int(a), tokens=int(b), targets=int(c)) for a, b, c in zip(*counts)]


def _in_batches(rows: Sequence[list[int]], lengths: np.ndarray) -> Iterator[list[list[int]]]:
    some_rows, num_tokens = [], 0
    for row in rows:
        some_rows.append(row)
        num_tokens += int(lengths[row].sum())
        if num_tokens >= _TOKENS_PER_RECORD_BATCH:
            yield some_rows
            some_rows, num_tokens = [], 0
    if some_rows:
        yield some_rows


def _record_batch(rows: Sequence[list[int]], documents: _Documents) -> pa.RecordBatch:
    members = np.concatenate([np.asarray(row) for row in rows])
    document_offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    lengths = documents.lengths[members]
    token_offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[document_offsets]
    input_ids, is_target = documents.tokens(members)
    offsets = pa.array(document_offsets, pa.int32())
    columns: list[Any] = [
        pa.LargeListArray.from_arrays(pa.array(token_offsets), pa.array(input_ids)),
        pa.LargeListArray.from_arrays(pa.array(token_offsets), pa.array(is_target)),
        pa.ListArray.from_arrays(offsets, pa.array(lengths, pa.int32())),
        pa.ListArray.from_arrays(offsets, pa.array(documents.files[members])),
        pa.ListArray.from_arrays(offsets, pa.array(documents.lines[members])),
        pa.array(np.add.reduceat(is_target, token_offsets[:-1], dtype=np.int64)),
        pa.array(np.add.reduceat(documents.num_bytes[members], document_offsets[:-1])),
    ]
    if not documents.are_weighted:
        return pa.record_batch(columns, schema=_ROWS_SCHEMA)
    weights = documents.weights(members)
    columns += [
        pa.LargeListArray.from_arrays(pa.array(token_offsets), pa.array(weights)),
        pa.array(np.add.reduceat(np.where(is_target, weights, 0), token_offsets[:-1], dtype=np.float64)),
    ]
    return pa.record_batch(columns, schema=_WEIGHTED_ROWS_SCHEMA)
