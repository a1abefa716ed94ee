"""The files of a source of which only the first rows are wanted: of one behind a URL no more is fetched than has them.

What is copied of a file of lines is its beginning, to the byte (decompressed); of a Parquet file, its first row groups, in a file
of their own. Other files are copied whole: in a JSON array and an Arrow file only reading tells where a row ends.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from raytune.config.sections.data import DataSource
from raytune.data.files.compression import open_bytes
from raytune.data.files.pieces import FilesAhead, version_of
from raytune.data.files.source_files import SourceFile, find_files
from raytune.data.files.sources import named_errors, open_parquet
from raytune.errors import DataError
from raytune.local_files import local_errors
from raytune.storage import is_local
from raytune.units import MIB

_LONGEST_LINE = 32 * MIB


def find_first_files(source: DataSource, downloads: Path) -> list[SourceFile]:
    """The files of a source that hold its first `max_rows` rows, all of its files without that, as `find_files` has them.

    Args:
        downloads: folder that files behind URLs, or their beginnings, are copied to.

    Raises:
        DataError: as `find_files`.
    """
    if source.max_rows is None or is_local(source.path):
        return find_files(source, downloads)
    files, left = [], source.max_rows
    for file in find_files(source, None):
        if left <= 0:
            break
        copied = _beginning_of(file, downloads, left)
        if copied is None:  # how many rows it has is not known
            files += find_files(source.model_copy(update={"path": file.path}), downloads)
        else:
            files.append(copied[0])
            left -= copied[1]
    return files


def _beginning_of(file: SourceFile, downloads: Path, most: int) -> tuple[SourceFile, int] | None:
    """A file with the first rows of another, and how many these are at least; None if it has to be copied whole."""
    copy = _COPIES.get(file.kind)
    if copy is None:
        return None
    try:
        version = version_of(file.path)
    except DataError:  # there is none, or its server does not say what it is: who copies it whole says so, or can
        return None
    target = downloads / f"{hashlib.sha256(file.path.encode()).hexdigest()[:16]}-{file.path.split('/')[-1]}"
    with local_errors(target), closing(FilesAhead([(file.path, version)], 0)) as ahead:
        target.parent.mkdir(parents=True, exist_ok=True)
        num_rows = copy(replace(file, version=version, ahead=ahead), target, most)
    if num_rows is None:
        return None
    return replace(file, path=str(target)), num_rows


def _copy_lines(file: SourceFile, target: Path, most: int) -> int | None:
    with open_bytes(file) as stream, target.open("wb") as copy:
        rows = 0
        while rows <= most and (line := stream.readline(_LONGEST_LINE)):  # one more, so that it is no file of one row
            if rows == 0 and file.kind == "json" and not line.isspace() and not _is_row(line):
                return None
            copy.write(line)
            is_whole = line.endswith(b"\n")
            while not is_whole and (more := stream.readline(_LONGEST_LINE)):
                copy.write(more)
                is_whole = more.endswith(b"\n")
            rows += not line.isspace()
    return rows


def _is_row(line: bytes) -> bool:
    """Whether a line is an object by itself, so that the file has a row per line."""
    try:
        return isinstance(json.loads(line.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


def _copy_records(file: SourceFile, target: Path, most: int) -> int | None:
    """A quoted field may hold line breaks, so that rows are counted as they are read."""
    csv.field_size_limit(_LONGEST_LINE)
    with open_bytes(file) as stream, target.open("wb") as copy:
        reader = csv.reader(_copied(stream, copy), strict=True, delimiter="\t" if file.kind == "tsv" else ",")
        rows = -1  # the header is none
        try:
            while rows <= most and (fields := next(reader, None)) is not None:
                rows += bool(fields)
        except csv.Error:
            return None
    return max(rows, 0)


def _copied(stream: BinaryIO, copy: BinaryIO) -> Iterator[str]:
    while line := stream.readline(_LONGEST_LINE):
        if len(line) == _LONGEST_LINE:
            raise csv.Error("a line that is longer than any row")
        copy.write(line)
        yield line.decode(errors="replace")


def _copy_row_groups(file: SourceFile, target: Path, most: int) -> int | None:
    import pyarrow.parquet

    with (
        named_errors(file),
        closing(open_parquet(file)) as parquet,
        pyarrow.parquet.ParquetWriter(target, parquet.schema_arrow) as writer,
    ):
        rows = 0
        for group in range(parquet.num_row_groups):
            if rows >= most:
                break
            table: Any = parquet.read_row_group(group)
            writer.write_table(table)
            rows += table.num_rows
    return rows


_COPIES: dict[str, Callable[[SourceFile, Path, int], int | None]] = {
    "json": _copy_lines,
    "txt": _copy_lines,
    "csv": _copy_records,
    "tsv": _copy_records,
    "parquet": _copy_row_groups,
}
"""Copies at least so many rows of a file, if it has them, and gives how many; None if it has to be copied whole."""
