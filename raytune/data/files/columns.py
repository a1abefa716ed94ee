"""Arrow columns of numpy's numbers. `pyarrow.array` makes them too, but loads pandas first, which outlasts a small file."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa


def column(values: np.ndarray | Sequence[int], kind: pa.DataType) -> pa.Array:
    """Numbers or truth values, none of them missing; without a copy where they are of this kind already."""
    array = np.asarray(values)
    numbers = (
        np.packbits(array, bitorder="little") if pa.types.is_boolean(kind) else array.astype(kind.to_pandas_dtype(), copy=False)
    )
    return pa.Array.from_buffers(kind, len(array), [None, pa.py_buffer(np.ascontiguousarray(numbers))])


def lists(offsets: np.ndarray, values: np.ndarray, kind: pa.DataType) -> pa.ListArray:
    """Lists with 32 bits for an offset: list i is `values[offsets[i] : offsets[i + 1]]`."""
    return pa.ListArray.from_arrays(column(offsets, pa.int32()), column(values, kind))


def large_lists(offsets: np.ndarray, values: np.ndarray, kind: pa.DataType) -> pa.LargeListArray:
    """Lists with 64 bits for an offset."""
    return pa.LargeListArray.from_arrays(column(offsets, pa.int64()), column(values, kind))
