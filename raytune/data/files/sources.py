"""What is in the files of a source (`source_files`): its fingerprint, and the parts that can be read alone (`readers`).

`datasets` is imported here only, and only for hub data sets and `save_to_disk` folders: of a damaged file it says neither the
line nor always the name, and it empties rows with lone surrogates without a word (`docs/facts.md`).
"""

import codecs
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from raytune.config.sections.data import DataSource
from raytune.data.files.compression import Compression, compression_of, open_bytes
from raytune.data.files.demo import demo_rows
from raytune.data.files.pieces import Version, version_of
from raytune.data.files.source_files import DEMO_ROWS, SourceFile, kind_of_file
from raytune.errors import DataError, RaytuneError
from raytune.hub.cache import is_offline
from raytune.local_files import local_errors
from raytune.units import MIB

SEGMENT_BYTES = MIB
SEGMENT_ROWS = 2000

BOM = codecs.BOM_UTF8
_NAMES_OF_LISTS = (
    "data",
    "train",
    "validation",
    "valid",
    "test",
    "rows",
    "examples",
    "records",
    "items",
    "instances",
    "samples",
    "dataset",
)
"""Keys under which one object holds all rows. A row of one's own format has others, such as `messages`."""
_COLUMNS_OF_ROWS = frozenset({"messages", "conversations", "prompt", "instruction", "text"})
"""A file with one of them in its only object has one row."""
_MAX_OBJECT_BYTES = 256 * MIB
"""A larger file is read row by row only."""
_LONG_LINE = 32 * MIB
_STREAMED_MODULES = ("json", "parquet", "text", "arrow")
"""Of `datasets`, that read a file's rows as we do; from CSV it makes numbers of what looks like some."""
_SAID_OF_FILES = ("name", "version", "data_dir", "data_files", "description", "features")
"""Of a data set's configuration, what changes no row: which files there are, and which types they have."""
_ZIP = b"PK\x03\x04"
_TABLES = {b"PAR1": "parquet", b"ARROW1": "arrow"}
_LFS = b"version https://git-lfs.github.com/spec"
COMPRESSED_SEGMENTS: dict[Compression, int] = {"gzip": 16, "zstd": 16, "xz": 8, "bz2": 4}
"""Of a compressed file at most, and one more. Who reads a segment has to decompress all that is before it, which with n of them
costs n / 2 passes over the file, and bzip2 is slow."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a file that can be read alone: bytes of a file of lines (before it was compressed), row groups of a Parquet file,
    batches of an Arrow file, rows of a data set."""

    file: SourceFile
    start: int
    stop: int | None
    """None: to the end."""
    first_line: int


@dataclass(frozen=True, slots=True)
class ScannedFile:
    file: SourceFile
    fingerprint: str
    """Says what the content is; equal only for equal content."""
    segments: tuple[Segment, ...]
    about_rows: int | None
    """Rows, or lines where it is not known how many of them are rows; None: nothing tells."""


def scan(file: SourceFile, max_rows: int | None, advance: Callable[[int], None] = lambda num_bytes: None) -> ScannedFile:
    """Read a file through once: its fingerprint, and the parts that can be read in parallel.

    Args:
        advance: called with the bytes that are read, as they are.

    Raises:
        DataError: if the file is empty or cannot be read.
    """
    if file.kind == "demo":
        num_rows = max_rows or DEMO_ROWS[file.path]
        rows = json.dumps(demo_rows(file.path, num_rows))
        return ScannedFile(file, hashlib.sha256(rows.encode()).hexdigest(), (Segment(file, 0, num_rows, 1),), num_rows)
    if file.kind == "dataset":
        dataset = load_dataset(file)
        starts = range(0, len(dataset), SEGMENT_ROWS)
        segments = tuple(Segment(file, start, min(start + SEGMENT_ROWS, len(dataset)), start + 1) for start in starts)
        return ScannedFile(file, dataset._fingerprint, segments, len(dataset))
    _refuse_other_content(file)
    with local_errors(file.name), open_bytes(file) as stream:
        fingerprint, cuts, size, lines = _digest_and_cuts(stream, advance)
    if size == 0:
        raise DataError(f"{file.name} is empty (0 bytes).")
    if file.kind == "parquet":
        return ScannedFile(file, fingerprint, *_row_groups(file))
    if file.kind == "arrow":
        return ScannedFile(file, fingerprint, *_batches(file))
    is_array = file.kind == "json" and _first_character(file) == b"["
    if file.kind == "json" and not is_array:
        _refuse_one_object(file, size)
    if file.kind == "txt" or (file.kind == "json" and not is_array):
        if (compression := compression_of(file)) is not None:
            cuts = cuts[:: -(-len(cuts) // COMPRESSED_SEGMENTS[compression]) or 1]
        starts, stops = [(0, 1), *cuts], [offset for offset, _ in cuts] + [size]
        segments = (Segment(file, start, stop, line) for (start, line), stop in zip(starts, stops) if stop > start)
        return ScannedFile(file, fingerprint, tuple(segments), lines)
    return ScannedFile(file, fingerprint, (Segment(file, 0, None, 1),), None if is_array else lines)


def unread_parts(file: SourceFile) -> tuple[Segment, ...]:
    """The parts of a file in order, without reading it through.

    Raises:
        DataError: if it is empty, or no file of rows.
    """
    if file.kind in ("demo", "dataset"):
        return scan(file, None).segments
    _refuse_other_content(file)
    if not file.size:
        raise DataError(f"{file.name} is empty (0 bytes).")
    if file.kind == "parquet":
        return _row_groups(file)[0]
    if file.kind == "arrow":
        # To know where its batches begin, all of them are looked at, which a file behind a URL would be fetched for.
        return _batches(file)[0] if file.ahead is None else (Segment(file, 0, None, 1),)
    is_lines = file.kind == "txt" or (file.kind == "json" and _first_character(file) != b"[")
    return (Segment(file, 0, sys.maxsize if is_lines else None, 1),)


def unscanned(file: SourceFile) -> ScannedFile:
    """A file that nobody reads through, for who wants its first rows; see `unread_parts`."""
    return ScannedFile(file, "", unread_parts(file), None)


# --- Details -----------------------------------------------------------------------------------------------------------------


def _digest_and_cuts(stream: BinaryIO, advance: Callable[[int], None]) -> tuple[str, list[tuple[int, int]], int, int]:
    """Hash of the content, places to cut it (offset of a line's first byte, number of that line), its size, and its lines."""
    digest, cuts, size, line = hashlib.sha256(), [], 0, 1
    while chunk := stream.read(SEGMENT_BYTES):
        digest.update(chunk)
        line += chunk.count(b"\n")
        if (last := chunk.rfind(b"\n")) >= 0:
            cuts.append((size + last + 1, line))
        size += len(chunk)
        advance(len(chunk))
    return digest.hexdigest(), cuts, size, line


def _refuse_other_content(file: SourceFile) -> None:
    """Refuse what its first bytes say is no file of rows, rather than call each line of it a bad row.

    Raises:
        DataError: saying what it is.
    """
    with local_errors(file.name), file.open() as stream:
        begins = stream.read(len(_LFS))
    if begins.startswith(_ZIP):
        raise DataError(f"{file.name} is a zip archive. Unpack it, and name the files that were in it.")
    if file.kind in ("json", "csv", "tsv", "txt"):
        if (encoding := _other_encoding(begins)) is not None:
            name = Path(file.name).name
            raise DataError(f"{file.name} is {encoding}. Save it as UTF-8: iconv -f {encoding} -t UTF-8 {name} > NEW.")
        if (table := next((kind for magic, kind in _TABLES.items() if begins.startswith(magic)), None)) is not None:
            raise DataError(f"{file.name} is of the kind {table}. Give it the ending .{table}.")
    if begins == _LFS:
        raise DataError(f"{file.name} is not the file itself but a pointer of Git LFS to it. Fetch it: git lfs pull.")


def _other_encoding(begins: bytes) -> str | None:
    """The encoding of a text that is not UTF-8, where its first bytes tell."""
    if begins.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):  # the former begins like UTF-16's
        return "UTF-32"
    if begins.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    even, odd = begins[0:8:2], begins[1:8:2]  # without a mark: of ASCII letters each other byte is 0
    if len(odd) == 4 and any(even) != any(odd) and all(even) != all(odd):
        return "UTF-16LE" if any(even) else "UTF-16BE"
    return None


def _refuse_equal_columns(file: SourceFile, schema: Any) -> None:
    """Refuse a table of which one of two columns would be lost."""
    if twice := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise DataError(f"{file.name} has more than one column with the name '{twice[0]}'. Give each a name of its own.")


def _first_character(file: SourceFile) -> bytes:
    """The first byte that is no white space; empty if there is none."""
    with open_bytes(file) as stream:
        chunk = stream.read(4096).removeprefix(BOM)
        while chunk:
            if text := chunk.lstrip():
                return text[:1]
            chunk = stream.read(4096)
    return b""


def _begins_with_a_row(file: SourceFile) -> bool:
    """Whether the first line is an object, or longer than any row, and others follow."""
    with open_bytes(file) as stream:
        first = stream.readline(_LONG_LINE).removeprefix(BOM)
        while first.isspace():
            first = stream.readline(_LONG_LINE)
        is_long, piece = len(first) >= _LONG_LINE, first
        while piece and not piece.endswith(b"\n"):
            piece = stream.readline(SEGMENT_BYTES)
        while (piece := stream.read(SEGMENT_BYTES)).isspace():
            pass
    if is_long or not piece:
        return bool(piece)
    try:
        json.loads(first.decode(errors="replace"))
    except (ValueError, RecursionError):
        return False
    return True


def _refuse_one_object(file: SourceFile, size: int) -> None:
    """Refuse a file whose objects are no rows: one that holds all rows in a list, or one that lies over several lines.

    Raises:
        DataError: saying how to make rows of it.
    """
    if size > _MAX_OBJECT_BYTES or _first_character(file) != b"{" or _begins_with_a_row(file):
        return
    with open_bytes(file) as stream:
        text = stream.read().decode("utf-8-sig", errors="replace").strip()
    try:
        first, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return  # who reads the rows says which line is wrong
    rest, is_over_lines = text[end:], "\n" in text[:end]
    lists = {
        key: value
        for key, value in first.items()
        if key in _NAMES_OF_LISTS and isinstance(value, list) and value and all(isinstance(row, dict) for row in value)
    }
    if lists and not rest and _COLUMNS_OF_ROWS.isdisjoint(first):
        key = max(lists, key=lambda name: len(lists[name]))
        others = [name for name in lists if name != key]
        more = f" Beside it are lists under {', '.join(map(repr, others))}: give each a file of its own." if others else ""
        raise DataError(
            f"{file.name} is one JSON object with {len(lists[key])} rows in a list under {key!r}, not a file of rows. Write that "
            f"list alone: jq -c '.{key}[]' {Path(file.name).name} > {Path(file.name).stem}-{key}.jsonl.{more}"
        )
    if is_over_lines:
        what = "objects that lie over several lines each" if rest else "one JSON object over several lines"
        raise DataError(
            f"{file.name} holds {what}, where each line has to be a row. Write an object per line: "
            f"jq -c . {Path(file.name).name} > {Path(file.name).stem}-rows.jsonl; or put them into one list, [...]."
        )


def _row_groups(file: SourceFile) -> tuple[tuple[Segment, ...], int]:
    """The parts of a Parquet file, and its rows."""
    with named_errors(file), open_parquet(file) as parquet:
        _refuse_equal_columns(file, parquet.schema_arrow)
        counts = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
    first_rows = [1 + sum(counts[:group]) for group in range(len(counts))]
    return tuple(Segment(file, group, group + 1, first_rows[group]) for group in range(len(counts))), sum(counts)


def _batches(file: SourceFile) -> tuple[tuple[Segment, ...], int]:
    """The parts of an Arrow file, and its rows."""
    segments, first, rows, begun = [], 1, 0, 0
    with named_errors(file), open_arrow(file) as batches:
        for number, batch in enumerate(batches, 1):
            _refuse_equal_columns(file, batch.schema)
            rows += batch.num_rows
            if rows >= SEGMENT_ROWS:
                segments.append(Segment(file, begun, number, first))
                first, rows, begun = first + rows, 0, number
        return (*segments, Segment(file, begun, None, first)), first - 1 + rows


def open_parquet(file: SourceFile) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(file.path if file.ahead is None else file.open())


@contextmanager
def open_arrow(file: SourceFile) -> Iterator[Iterator[Any]]:
    """The record batches of an Arrow file, in either of its forms; of a local one without a copy of them in memory."""
    import pyarrow.ipc

    with pyarrow.memory_map(file.path) if file.ahead is None else file.open() as stream:
        if stream.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(stream)
            yield (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            stream.seek(0)
            yield iter(pyarrow.ipc.open_stream(stream))


def load_dataset(file: SourceFile) -> Any:
    """A hub data set or a `save_to_disk` folder, one split of it.

    Raises:
        DataError: if it cannot be loaded or has no such split.
    """
    import datasets

    loaded: Any
    with named_errors(file):
        if os.path.isdir(file.path):
            loaded = datasets.load_from_disk(file.path)
            if isinstance(loaded, datasets.DatasetDict):
                if file.split not in loaded:
                    raise DataError(f"{file.name} has no split '{file.split}', only {', '.join(map(str, loaded))}.")
                loaded = loaded[file.split]
            elif file.split not in (DataSource.model_fields["split"].default, str(loaded.split)):
                raise DataError(f"{file.name} is one data set without splits, so that it has no split '{file.split}'.")
            return loaded
        name, _, subset = file.path.partition(":")
        return datasets.load_dataset(name, subset or None, split=file.split)


def files_of_hub(file: SourceFile) -> list[SourceFile]:
    """The files of a split of a hub's data set at the commit that it stands at now, as `datasets` finds them; read from there.

    Raises:
        DataError: if it has no such split, or `datasets` would read more out of its files than is in their rows.
    """
    import datasets

    if is_offline():
        raise DataError(
            f"{file.name} is a data set of a hub, which is streamed from there, but HF_HUB_OFFLINE is set on "
            f"{os.uname().nodename}. Unset it, or leave data.streaming out: then what `datasets` has in its cache is read.",
            keys=("data.train", "data.streaming"),
        )
    name, _, subset = file.path.partition(":")
    with named_errors(file):
        builder = datasets.load_dataset_builder(name, subset or None)
    module, config = type(builder).__module__.rpartition(".")[2], builder.config
    where = f"Name its files, such as hf://datasets/{name}@COMMIT/FILE, or leave data.streaming out"
    if module not in _STREAMED_MODULES:
        raise DataError(
            f"{file.name} has files of the kind {module}, which data.streaming does not read as `datasets` does. {where}."
        )
    usual = type(config)()
    if options := [
        one.name
        for one in fields(config)
        if one.name not in _SAID_OF_FILES and getattr(config, one.name) != getattr(usual, one.name)
    ]:
        raise DataError(
            f"{file.name} is to be read with options of its own ({', '.join(options)}), which data.streaming does not know. "
            f"{where}."
        )
    found = config.data_files or {}
    if file.split not in found:
        raise DataError(f"{file.name} has no split '{file.split}', only {', '.join(map(str, found))}.")
    return [_file_of_hub(file.path, url) for url in found[file.split]]


def _file_of_hub(data_set: str, url: str) -> SourceFile:
    commit, _, inside = url.partition("@")[2].partition("/")
    return SourceFile(f"{data_set}/{inside}", url, kind_of_file(inside), "", Version(version_of(url).size, commit))


@contextmanager
def named_errors(file: SourceFile) -> Iterator[None]:
    """Turn whatever a library says about a file into a DataError that names the file."""
    try:
        yield
    except RaytuneError:
        raise
    except Exception as error:
        what = {"dataset": "a data set", "arrow": "an arrow file"}.get(file.kind, f"a {file.kind} file")
        raise DataError(f"{file.name} cannot be read as {what}: {type(error).__name__}: {error}") from error
