"""Tokenised shards of any size without tokenising, and what packing them takes: `python -m tests.synthetic_shards NUM FOLDER`."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from raytune.data.rows.shards import ShardResult, Tally
from raytune.data.store.row_file import write_rows
from raytune.data.store.shard_documents import SourceUse
from raytune.data.store.tokenising import DOCUMENTS_SCHEMA
from raytune.units import MIB

_DOCUMENTS_PER_SHARD = 50_000
_DOCUMENTS_PER_BATCH = 256


def short_lengths(count: int, seed: int) -> np.ndarray:
    """Tokens of short answers, 40 in the mean."""
    return np.clip(np.random.default_rng(seed).lognormal(3.5, 0.7, count), 2, 512).astype(np.int64)


def write_shard(
    path: Path, lengths: np.ndarray, first_line: int, source: int = 0, per_batch: int = _DOCUMENTS_PER_BATCH
) -> ShardResult:
    """Documents whose tokens are all their line; every token but the first is a target."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, DOCUMENTS_SCHEMA) as writer:
        for start in range(0, len(lengths), per_batch):
            own = lengths[start : start + per_batch]
            lines = np.arange(len(own)) + first_line + start
            offsets = pa.array(np.concatenate([[0], np.cumsum(own)]), pa.int32())
            is_target = np.ones(own.sum(), np.uint8)
            is_target[np.cumsum(own) - own] = 0
            columns = [
                pa.ListArray.from_arrays(offsets, pa.array(np.repeat(lines, own), pa.int32())),
                pa.ListArray.from_arrays(offsets, pa.array(is_target)),
                pa.nulls(len(own), pa.list_(pa.float32())),
                pa.array(own),
                pa.array(np.zeros(len(own), np.int32)),
                pa.array(lines),
            ]
            writer.write_batch(pa.record_batch(columns, schema=DOCUMENTS_SCHEMA))
    return _shard_in(path)


def _shard_in(path: Path) -> ShardResult:
    return ShardResult(source=0, number=0, path=str(path), tally=Tally(), was_found=False)


def write_shards(folder: Path, count: int) -> list[ShardResult]:
    sizes = [min(_DOCUMENTS_PER_SHARD, count - start) for start in range(0, count, _DOCUMENTS_PER_SHARD)]
    return [
        write_shard(folder / f"shard-{index}.arrow", short_lengths(size, index), index * _DOCUMENTS_PER_SHARD)
        for index, size in enumerate(sizes)
    ]


def pack_shards(shards: Sequence[ShardResult], folder: Path, row_length: int = 2048) -> dict[str, float]:
    """Pack all documents into a store's files in `folder`; what that took of this process."""
    before, started_s = _peak_mib(), time.process_time()
    written = write_rows(folder, shards, [SourceUse(num_documents=0, num_tokens=0)], row_length, "best_fit")
    return {
        "documents": written.epoch.documents,
        "cpu_us_per_document": (time.process_time() - started_s) * 1e6 / written.epoch.documents,
        "peak_mib": _peak_mib(),
        "peak_before_mib": before,
        "fill": written.epoch.tokens / (written.num_rows * row_length),
    }


def _peak_mib() -> float:
    """The most memory that this process has had, mapped files included."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / MIB


if __name__ == "__main__":
    count, folder = int(sys.argv[1]), Path(sys.argv[2])
    if count:  # shards are made by a process of their own, whose memory does not count
        write_shards(folder, count)
    else:
        (folder / "store").mkdir()
        found = list(map(_shard_in, sorted(folder.glob("shard-*.arrow"))))
        sys.stdout.write(json.dumps(pack_shards(found, folder / "store")) + "\n")
