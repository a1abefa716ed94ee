"""Whether two stores hold the same rows, though they were made of files with other names or by the code of another raytune."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa

from raytune.data.store import ROWS_FILE

_ORIGINS = ("files", "lines")
"""Columns that say where a document came from, for messages about it; a step computes with all others."""


def have_same_rows(folder: Path, other: Path) -> bool:
    """Compare two stores by everything that is trained on; reads both."""
    return _digests(folder) == _digests(other)


def _digests(folder: Path) -> dict[str, str]:
    """A hash of each column, however the file divides its rows among record batches."""
    with pa.memory_map(str(folder / ROWS_FILE)) as file:
        reader = pa.ipc.open_file(file)
        columns = [name for name in reader.schema.names if name not in _ORIGINS]
        values, lengths = {name: hashlib.sha256() for name in columns}, {name: hashlib.sha256() for name in columns}
        for index in range(reader.num_record_batches):
            batch = reader.get_batch(index)
            for name in columns:
                column = batch.column(name)
                if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
                    lengths[name].update(column.value_lengths().to_numpy().astype(np.int64).tobytes())
                    column = column.flatten()
                values[name].update(column.to_numpy(zero_copy_only=False).tobytes())
    return {name: values[name].hexdigest() + lengths[name].hexdigest() for name in columns}
