"""The rows of a store on their way to the disk: documents of all shards, packed and written as `store` reads them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from raytune.data.files.columns import column, large_lists, lists
from raytune.data.rows.shards import ShardResult
from raytune.data.store.mixing import FEWEST_DRAWN, DrawnRows
from raytune.data.store.packing import Packing, pack
from raytune.data.store.shard_documents import Documents, SourceUse, have_weights, in_buffers
from raytune.data.store.store import WEIGHTS_COLUMN, view
from raytune.local_files import local_errors

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


_TOKENS_PER_FILE = 1 << 28


@dataclass(slots=True)
class RowCounts:
    """Of some rows of a store."""

    rows: int = 0
    documents: int = 0
    tokens: int = 0
    targets: int = 0
    bytes: int = 0
    longest_document: int = 0

    def add(self, other: "RowCounts", drawn: DrawnRows | None = None) -> None:
        """Add others, or what an epoch has of them in the mean."""
        share = (lambda count: round(count * drawn.per_epoch / drawn.num_rows)) if drawn else (lambda count: count)
        self.rows += drawn.per_epoch if drawn else other.rows
        self.documents += share(other.documents)
        self.tokens += share(other.tokens)
        self.targets += share(other.targets)
        self.bytes += share(other.bytes)
        self.longest_document = max(self.longest_document, other.longest_document)


@dataclass(slots=True)
class WrittenRows:
    """What is in the files of a store."""

    passes: list[float]
    """Of an epoch over each source, with whole rows."""
    num_rows: int = 0
    epoch: RowCounts = field(default_factory=RowCounts)
    drawn: list[DrawnRows] = field(default_factory=list)


def write_rows(
    folder: Path,
    shards: Sequence[ShardResult],
    uses: Sequence[SourceUse],
    row_length: int,
    packing: Packing,
    num_virtual: int = 0,
) -> WrittenRows:
    """Pack the documents of all shards and write the rows: those of each whole pass by themselves, so that no row has a document
    twice; then, for each source that is passed over a part of a time more, rows of which an epoch has that part.

    Args:
        folder: for files of rows.
        uses: of each source.
        row_length, packing, num_virtual: as of `pack`.
    """
    written = WrittenRows(passes=[int(use.passes) for use in uses])
    with _RowFiles(folder, is_weighted=have_weights(shards, uses)) as files:

        def write(shards: Sequence[ShardResult], most_tokens: int) -> RowCounts:
            counts = RowCounts()
            for documents in in_buffers(shards, uses):
                lengths = documents.lengths if most_tokens == row_length else np.minimum(documents.lengths, most_tokens)
                counts.add(files.write(pack(lengths, most_tokens, packing, num_virtual=num_virtual), documents))
            written.num_rows += counts.rows
            return counts

        for number in range(max(map(int, written.passes))):
            written.epoch.add(write([shard for shard in shards if uses[shard.source].passes >= number + 1], row_length))
        for source, use in enumerate(uses):
            part = use.passes - int(use.passes)
            if part * use.num_documents < 0.5:
                continue
            first = written.num_rows
            most_tokens = min(row_length, max(1, int(part * use.num_tokens / FEWEST_DRAWN)))
            counts = write([shard for shard in shards if shard.source == source], most_tokens)
            drawn = DrawnRows(first_row=first, num_rows=counts.rows, per_epoch=max(1, round(part * counts.rows)))
            written.drawn.append(drawn)
            written.epoch.add(counts, drawn)
            written.passes[source] += drawn.per_epoch / drawn.num_rows
    return written


def packed_in_memory(
    documents: Sequence[pa.RecordBatch],
    loss_weights: Sequence[float],
    row_length: int,
    packing: Packing,
    num_virtual: int,
    in_order: Callable[[int], np.ndarray],
) -> list[pa.RecordBatch]:
    """Packed rows of documents, in another order.

    Args:
        loss_weights: of each batch's targets.
        row_length, packing, num_virtual: as of `pack`.
        in_order: given how many rows there are, their numbers in the order that they are to have.
    """
    found = Documents(documents, loss_weights)
    are_weighted = set(loss_weights) != {1.0} or any(not batch.column("target_weights").null_count for batch in documents)
    schema = _WEIGHTED_ROWS_SCHEMA if are_weighted else _ROWS_SCHEMA
    rows = pack(found.lengths, row_length, packing, num_virtual=num_virtual)
    ordered = [rows[row] for row in in_order(len(rows))]
    return [_record_batch(some, found, schema) for some in _in_batches(ordered, found.lengths)]


class _RowFiles:
    """Writes rows into files, a new one where the last has enough tokens."""

    def __init__(self, folder: Path, *, is_weighted: bool) -> None:
        self._folder, self._schema = folder, _WEIGHTED_ROWS_SCHEMA if is_weighted else _ROWS_SCHEMA
        self._num_files, self._num_tokens = 0, 0
        self._sink: Any = None
        self._writer: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._end_file()

    def write(self, rows: Sequence[list[int]], documents: Documents) -> RowCounts:
        """Write rows, each a list of documents."""
        lengths, counts = documents.lengths, RowCounts(rows=len(rows), documents=len(documents.lengths))
        for some_rows in _in_batches(rows, lengths):
            batch = _record_batch(some_rows, documents, self._schema)
            with local_errors(self._folder):
                self._file_with_room().write_batch(batch)
            self._num_tokens += len(batch.column("input_ids").values)
            counts.targets += int(view(batch.column("num_targets"), np.int64).sum())
        counts.tokens, counts.bytes = int(lengths.sum(dtype=np.int64)), int(documents.num_bytes.sum())
        counts.longest_document = int(lengths.max())
        return counts

    def _file_with_room(self) -> Any:
        """Arrow's writer of the file that is being written, or of the next one."""
        if self._writer is None or self._num_tokens >= _TOKENS_PER_FILE:
            self._end_file()
            self._sink = pa.OSFile(str(self._folder / f"rows-{self._num_files:05d}.arrow"), "wb")
            self._writer = pa.ipc.new_file(self._sink, self._schema)
            self._num_files, self._num_tokens = self._num_files + 1, 0
        return self._writer

    def _end_file(self) -> None:
        if self._writer is not None:
            with local_errors(self._folder):
                self._writer.close()
                self._sink.close()
            self._writer = None


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


def _record_batch(rows: Sequence[list[int]], documents: Documents, schema: pa.Schema) -> pa.RecordBatch:
    members = np.concatenate([np.asarray(row) for row in rows])
    document_offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    lengths = documents.lengths[members]
    token_offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[document_offsets]
    input_ids, is_target = documents.tokens(members)
    columns: list[Any] = [
        large_lists(token_offsets, input_ids, pa.int32()),
        large_lists(token_offsets, is_target, pa.bool_()),
        lists(document_offsets, lengths, pa.int32()),
        lists(document_offsets, documents.files[members], pa.int32()),
        lists(document_offsets, documents.lines[members], pa.int64()),
        column(np.add.reduceat(is_target, token_offsets[:-1], dtype=np.int64), pa.int64()),
        column(np.add.reduceat(documents.num_bytes[members], document_offsets[:-1]), pa.int64()),
    ]
    if WEIGHTS_COLUMN in schema.names:
        weights = documents.weights(members)
        columns += [
            large_lists(token_offsets, weights, pa.float32()),
            column(np.add.reduceat(np.where(is_target, weights, 0), token_offsets[:-1], dtype=np.float64), pa.float64()),
        ]
    return pa.record_batch(columns, schema=schema)
