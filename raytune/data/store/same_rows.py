"""Whether two stores hold the same rows, though they were made of files with other names or by the code of another raytune."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raytune.data.store.store import batches_of, complete_meta, drawn_rows, row_files

_ORIGINS = ("files", "lines")
"""Columns that say where a document came from, for messages about it; a step computes with all others."""


def have_same_rows(folder: Path, other: Path) -> bool:
    """Compare two stores by everything that is trained on; reads both. False if one is not complete."""
    metas = complete_meta(folder), complete_meta(other)
    if metas[0] is None or metas[1] is None or drawn_rows(metas[0]) != drawn_rows(metas[1]):
        return False
    return _digests(folder, row_files(metas[0])) == _digests(other, row_files(metas[1]))


def _digests(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """A hash of each column, however the files divide their rows among record batches."""
    values: defaultdict[str, Any] = defaultdict(hashlib.sha256)
    lengths: defaultdict[str, Any] = defaultdict(hashlib.sha256)
    for batch in (batch for name in files for batch in batches_of(folder / name)):
        for name in set(batch.schema.names).difference(_ORIGINS):
            column = batch.column(name)
            if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
                lengths[name].update(column.value_lengths().to_numpy().astype(np.int64).tobytes())
                column = column.flatten()
            values[name].update(column.to_numpy(zero_copy_only=False).tobytes())
    return {name: values[name].hexdigest() + lengths[name].hexdigest() for name in values}
