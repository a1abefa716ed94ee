"""The tokenised store as workers read it: packed rows in Arrow files, mapped into memory.

    <folder>/<address>/rows-00000.arrow ...    a record per packed row
    <folder>/<address>/meta.json               counts, report, size and hash of each file of rows; written last

`build` makes stores. Reading one needs none of the libraries that building it does.
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raytune.data.store.mixing import DrawnRows, EpochRows
from raytune.errors import DataError
from raytune.plan.data.data_report import StoreReport
from raytune.storage import Digest, local_path, read_json

META_FILE = "meta.json"
WEIGHTS_COLUMN = "target_weights"
"""Of files of rows, beside "weight": both are there only if some target does not weigh 1."""
NUM_NAMED = 5
"""Documents that a message names of the rows it is about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreInfo:
    """A store, as its builder reports it."""

    path: str
    num_rows: int
    """In its files; an epoch may have a part of them."""
    rows_per_epoch: int
    """These and the counts below are of an epoch: of the mean one, where each has other documents."""
    num_documents: int
    num_tokens: int
    num_targets: int
    num_bytes: int
    """UTF-8 bytes of the text behind all targets."""
    longest_document: int
    report: StoreReport
    """What became of the rows of its sources."""


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Documents laid end to end."""

    input_ids: np.ndarray
    """int32."""
    is_target: np.ndarray
    """bool; never true for the first token of a document."""
    document_lengths: np.ndarray
    """int32; their sum is the number of tokens."""
    target_weights: np.ndarray | None = None
    """float32, a number per token, of which only those of targets mean anything; None in a store whose targets all weigh 1."""


class PackedRows:
    """Packed rows in record batches, by their number.

    Args:
        files: as the user named them, in the order of their numbers.
    """

    def __init__(self, batches: Sequence[pa.RecordBatch], files: Sequence[str]) -> None:
        self._files = list(files)
        self._first_rows = list(accumulate((batch.num_rows for batch in batches), initial=0))
        self._batches = [_MappedBatch.of(batch) for batch in batches]
        has_weights = WEIGHTS_COLUMN in batches[0].schema.names
        self.num_targets_of_row = joined([batch.column("num_targets") for batch in batches])
        """int64."""
        self.num_bytes_of_row = joined([batch.column("num_bytes") for batch in batches])
        """int64; UTF-8 bytes of the text behind each row's targets."""
        self.weight_of_row = joined([batch.column("weight") for batch in batches], np.float64) if has_weights else None
        """float64: sum of the weights of each row's targets; None where every target weighs 1."""

    @property
    def num_rows(self) -> int:
        return self._first_rows[-1]

    def targets_of(self, rows: np.ndarray) -> np.ndarray:
        """Targets of each of some rows."""
        return self.num_targets_of_row[rows]

    def weights_of(self, rows: np.ndarray) -> np.ndarray | None:
        """Sum of the weights of the targets of each of some rows; None where every target weighs 1."""
        return None if self.weight_of_row is None else self.weight_of_row[rows]

    def row(self, index: int) -> PackedRow:
        """A packed row. Its arrays are read-only views of the file, except `is_target`."""
        batch, place = self._place(index)
        start, stop = batch.token_offsets[place], batch.token_offsets[place + 1]
        first_document, last_document = batch.document_offsets[place], batch.document_offsets[place + 1]
        bits = np.unpackbits(batch.is_target_bits[start // 8 : (stop + 7) // 8], bitorder="little")
        return PackedRow(
            input_ids=batch.input_ids[start:stop],
            is_target=bits[start % 8 : start % 8 + stop - start].view(bool),
            document_lengths=batch.document_lengths[first_document:last_document],
            target_weights=None if batch.target_weights is None else batch.target_weights[start:stop],
        )

    @property
    def files(self) -> list[str]:
        """As the user named them, in order."""
        return list(self._files)

    def sources(self, index: int) -> list[tuple[str, int]]:
        """File and line of each document of a row."""
        batch, place = self._place(index)
        documents = slice(batch.document_offsets[place], batch.document_offsets[place + 1])
        files, lines = batch.files[documents].tolist(), batch.lines[documents].tolist()
        return [(self._files[file], line) for file, line in zip(files, lines)]

    def origins(self, index: int) -> list[str]:
        """File and line of each document of a row, in words."""
        return [f"{file}:{line}" for file, line in self.sources(index)]

    def named(self, rows: Iterable[int]) -> str:
        """Rows in words that a user finds them by: file and line of their first documents."""
        indices = list(rows)
        origins = [origin for index in indices for origin in self.origins(index)]
        more = f" and {len(origins) - NUM_NAMED} more" if len(origins) > NUM_NAMED else ""
        return f"rows {', '.join(map(str, indices))} ({', '.join(origins[:NUM_NAMED])}{more})"

    def _place(self, index: int) -> tuple["_MappedBatch", int]:
        if not 0 <= index < self.num_rows:
            raise IndexError(f"row {index} of a store of {self.num_rows}")
        batch = bisect_right(self._first_rows, index) - 1
        return self._batches[batch], index - self._first_rows[batch]


class Store(PackedRows):
    """Reads a store through a memory map."""

    @classmethod
    def open(cls, path: str | Path) -> "Store":
        """Open a store.

        Raises:
            DataError: if there is none, or it is not what its builder left.
        """
        folder = local_path(path)
        meta = complete_meta(folder)
        if meta is None:
            raise DataError(
                f"{path} on {os.uname().nodename} is no complete store of tokenised rows. "
                f"Is it on storage that every node sees? If it is damaged, delete it and run the same command again."
            )
        return cls(folder, meta)

    def __init__(self, folder: Path, meta: dict[str, Any]) -> None:
        self.info = read_info(folder, meta)
        # An open map keeps a file alive even if the store is deleted.
        super().__init__([batch for name in row_files(meta) for batch in batches_of(folder / name)], meta["source_files"])
        drawn = drawn_rows(meta)
        self.epoch = EpochRows(self.num_rows - sum(part.num_rows for part in drawn), drawn, self.num_targets_of_row)
        """Which of the rows an epoch has."""

    @property
    def num_tokens(self) -> int:
        return self.info.num_tokens

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text behind all targets of an epoch, for bits per byte."""
        return self.info.num_bytes

    @property
    def report(self) -> StoreReport:
        return self.info.report

    def rows_at(self, positions: np.ndarray, seed: int) -> np.ndarray:
        """The rows at positions of a run, epoch after epoch."""
        return self.epoch.rows_at(positions, seed)


@dataclass(frozen=True, slots=True)
class _MappedBatch:
    """Views of a record batch's buffers."""

    token_offsets: np.ndarray
    input_ids: np.ndarray
    is_target_bits: np.ndarray
    document_offsets: np.ndarray
    document_lengths: np.ndarray
    files: np.ndarray
    lines: np.ndarray
    target_weights: np.ndarray | None

    @classmethod
    def of(cls, batch: pa.RecordBatch) -> "_MappedBatch":
        ids, targets = batch.column("input_ids"), batch.column("is_target")
        documents = batch.column("document_lengths")
        return cls(
            token_offsets=view(ids.offsets, np.int64),
            input_ids=view(ids.values, np.int32),
            is_target_bits=np.frombuffer(targets.values.buffers()[1], np.uint8),
            document_offsets=view(documents.offsets, np.int32),
            document_lengths=view(documents.values, np.int32),
            files=view(batch.column("files").values, np.int32),
            lines=view(batch.column("lines").values, np.int64),
            target_weights=view(batch.column(WEIGHTS_COLUMN).values, np.float32)
            if WEIGHTS_COLUMN in batch.schema.names
            else None,
        )


def read_meta(folder: Path, name: str = META_FILE) -> dict[str, Any] | None:
    """The meta file's content, or None if there is none or it is not what was written."""
    try:
        meta = read_json(folder / name)
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(meta, dict):
        return None
    checksum = meta.pop("checksum", None)
    return meta if checksum == checksum_of(meta) else None


def complete_meta(folder: Path) -> dict[str, Any] | None:
    """The meta file's content, or None if it is not what was written, or a file that it names is not there in its size."""
    meta = read_meta(folder)
    if meta is None:
        return None
    if "files" not in meta:
        meta |= _as_one_file(meta)
    files = {folder / name: digest.size for name, digest in row_files(meta).items()}
    return meta if all(file.is_file() and file.stat().st_size == size for file, size in files.items()) else None


def _as_one_file(meta: dict[str, Any]) -> dict[str, Any]:
    """What the meta file of an older store does not say: a run that was begun with it goes on with one that has the same rows."""
    files = {"rows.arrow": {"size": meta["size"], "sha256": meta["sha256"]}}
    return {"files": files, "drawn": [], "rows_per_epoch": meta["num_rows"]}


def read_info(folder: Path, meta: dict[str, Any]) -> StoreInfo:
    counts = ("num_rows", "rows_per_epoch", "num_documents", "num_tokens", "num_targets", "num_bytes", "longest_document")
    report = StoreReport.model_validate(meta["report"])
    return StoreInfo(path=str(folder), report=report, **{name: meta[name] for name in counts})


def row_files(meta: dict[str, Any]) -> dict[str, Digest]:
    """Names of the files of rows, in order, and what is in them."""
    return {name: Digest(**digest) for name, digest in meta["files"].items()}


def drawn_rows(meta: dict[str, Any]) -> list[DrawnRows]:
    return [DrawnRows(**part) for part in meta["drawn"]]


def batches_of(file: str | Path) -> Iterator[pa.RecordBatch]:
    """The record batches of an Arrow file, mapped into memory for as long as one of them is held."""
    reader = pa.ipc.open_file(pa.memory_map(str(file)))
    return (reader.get_batch(index) for index in range(reader.num_record_batches))


def checksum_of(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def joined(columns: Sequence[pa.Array], dtype: type = np.int64) -> np.ndarray:
    return np.concatenate([view(column, dtype) for column in columns])


def view(array: pa.Array, dtype: type) -> np.ndarray:
    """An array's numbers where they lie. `array.to_numpy()` gives the same, and imports pandas."""
    return np.frombuffer(array.buffers()[1], dtype)[array.offset : array.offset + len(array)]
