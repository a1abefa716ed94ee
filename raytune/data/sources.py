"""Where rows come from. Our own readers stream files in constant memory and name every bad row by file and line.

`datasets` is imported here only, and only for hub data sets and `save_to_disk` folders: of a damaged file it says neither the
line nor always the name, and it empties rows with lone surrogates without a word (FAULTS.md).
"""

import codecs
import csv
import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO

from raytune.config.data import DataSource
from raytune.data.conversation import kind_of
from raytune.data.demo import demo_rows
from raytune.errors import DataError, RaytuneError
from raytune.storage import download_file, is_local, list_folder, local_errors, local_path
from raytune.units import MIB, format_bytes

DEMO_ROWS = {"train": 4000, "validation": 400, "test": 400}
MAX_ROW_BYTES = 32 * MIB
"""A longer line is refused rather than read into memory."""
SEGMENT_BYTES = MIB
SEGMENT_ROWS = 2000

FileKind = Literal["json", "csv", "tsv", "txt", "parquet", "dataset", "demo"]
_KINDS: dict[str, FileKind] = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "txt",
    ".parquet": "parquet",
}
_BOM = codecs.BOM_UTF8
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class Row:
    values: dict[str, Any]
    line: int


@dataclass(frozen=True, slots=True)
class BadRow:
    reason: str
    line: int


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file (or data set) of a source."""

    name: str
    """As the user knows it: for messages."""
    path: str
    """What is opened: a local path, a hub id, or the split of the demo."""
    kind: FileKind
    split: str
    """Split of a data set; empty for files."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a file that can be read alone: bytes of a file of lines, row groups of a Parquet file, rows of a data set."""

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


def find_files(source: DataSource, downloads: Path) -> list[SourceFile]:
    """The files behind a source, in the order in which they are read. Files behind a URL are copied to `downloads` first.

    Raises:
        DataError: if there are none, or one of them has an ending that we cannot read.
    """
    path = source.path
    if path.startswith("demo:"):
        split = path.removeprefix("demo:")
        if split not in DEMO_ROWS:
            raise DataError(f"There is no data set '{path}'. The built-in ones are demo:train, demo:validation, demo:test.")
        return [SourceFile(path, split, "demo", "")]
    if not is_local(path):
        return [_downloaded(url, downloads) for url in _matching_urls(path)]
    local = local_path(path)
    if local.is_dir():
        if not any((local / marker).exists() for marker in ("state.json", "dataset_dict.json")):
            raise DataError(
                f"{path} is a folder, but not one that `save_to_disk` wrote. "
                f"Name its files, for example '{path.rstrip('/')}/*.jsonl'."
            )
        return [SourceFile(path, str(local), "dataset", source.split)]
    if local.is_file():
        return [SourceFile(path, str(local), _kind_of(path), "")]
    if glob.has_magic(path):
        matches = [match for match in sorted(glob.glob(str(local), recursive=True)) if os.path.isfile(match)]
        if not matches:
            raise DataError(f"No file matches '{path}' (looked in {local.parent} on {os.uname().nodename}).")
        return [SourceFile(match, match, _kind_of(match), "") for match in matches]
    if _HUB_ID.fullmatch(path) and Path(path).suffix.lower() not in _KINDS and not path.startswith("."):
        return [SourceFile(path, path, "dataset", source.split)]
    raise DataError(f"There is no file '{path}' on {os.uname().nodename} (looked for {local}).")


def scan(file: SourceFile, max_rows: int | None) -> ScannedFile:
    """Read a file through once: its fingerprint, and the parts that can be read in parallel.

    Raises:
        DataError: if the file is empty or cannot be read.
    """
    if file.kind == "demo":
        num_rows = max_rows or DEMO_ROWS[file.path]
        rows = json.dumps(demo_rows(file.path, num_rows))
        return ScannedFile(file, hashlib.sha256(rows.encode()).hexdigest(), (Segment(file, 0, num_rows, 1),))
    if file.kind == "dataset":
        dataset = _load_dataset(file)
        starts = range(0, len(dataset), SEGMENT_ROWS)
        segments = tuple(Segment(file, start, min(start + SEGMENT_ROWS, len(dataset)), start + 1) for start in starts)
        return ScannedFile(file, dataset._fingerprint, segments)
    with local_errors(file.name), open(file.path, "rb") as stream:
        fingerprint, cuts, size = _digest_and_cuts(stream)
    if size == 0:
        raise DataError(f"{file.name} is empty (0 bytes).")
    if file.kind == "parquet":
        return ScannedFile(file, fingerprint, _row_groups(file))
    if file.kind == "txt" or (file.kind == "json" and not _is_json_array(file)):
        starts, stops = [(0, 1), *cuts], [offset for offset, _ in cuts] + [size]
        segments = (Segment(file, start, stop, line) for (start, line), stop in zip(starts, stops) if stop > start)
        return ScannedFile(file, fingerprint, tuple(segments))
    return ScannedFile(file, fingerprint, (Segment(file, 0, None, 1),))


def read_segment(segment: Segment) -> Iterator[Row | BadRow]:
    """The rows of a segment in order, bad ones included. Blank lines are not rows.

    Raises:
        DataError: if the rest of the file cannot be read at all.
    """
    return _READERS[segment.file.kind](segment)


# --- Readers -----------------------------------------------------------------------------------------------------------------


def _read_json(segment: Segment) -> Iterator[Row | BadRow]:
    reader = _read_json_array if segment.stop is None else _read_json_lines
    return reader(segment)


def _read_json_lines(segment: Segment) -> Iterator[Row | BadRow]:
    for line, data in _lines(segment):
        if data is None:
            yield BadRow(f"the line is longer than {format_bytes(MAX_ROW_BYTES)}", line)
        elif not data.isspace():
            yield _json_row(data, line)


def _json_row(data: bytes, line: int) -> Row | BadRow:
    try:
        values = json.loads(data.decode().rstrip(), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8: byte 0x{data[error.start]:02x} at column {error.start + 1}", line)
    except json.JSONDecodeError as error:
        torn = "; the file ends in the middle of the row" if not data.endswith(b"\n") else ""
        return BadRow(f"not JSON: {error.msg} at column {error.colno}{torn}", line)
    except (ValueError, RecursionError) as error:
        return BadRow(f"not usable JSON: {error}", line)
    return _checked_row(values, line, suspicious=b"\\ud" in data or b"\\uD" in data)


def _checked_row(values: Any, line: int, *, suspicious: bool) -> Row | BadRow:
    """A row if it is an object whose text can be encoded. Only an escape (`\\ud800`) can bring in half a character."""
    if not isinstance(values, dict):
        return BadRow(f"{kind_of(values)}, expected an object with named columns", line)
    if suspicious:
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            return BadRow(f"half of a surrogate pair (\\u{ord(error.object[error.start]):04x}), which is no character", line)
    return Row(values, line)


class _UnusableElement(ValueError):
    """JSON that is well formed but that we refuse."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _UnusableElement(f"the key '{twice}' appears twice in one object")
    return values


def _read_json_array(segment: Segment) -> Iterator[Row | BadRow]:
    """The objects of one JSON array. A syntax error ends the file: what follows it cannot be told apart from what precedes it."""
    name, decoder = segment.file.name, json.JSONDecoder(object_pairs_hook=_object)
    with open(segment.file.path, encoding="utf-8-sig", newline="") as stream:
        text = _Window(stream, name)
        text.skip("[")
        if text.peek() == "]":
            return
        while True:
            line = text.line_of_next()
            try:
                element, end = text.decode(decoder)
                suspicious = "\\ud" in text.buffer[text.at : end].lower()
                row = _checked_row(element, line, suspicious=suspicious)
            except _UnusableElement as error:
                _, end = text.decode(json.JSONDecoder())
                row = BadRow(f"not usable JSON: {error}", line)
            text.at = end
            yield row
            if text.skip(",]") == "]":
                return


class _Window:
    """A window on a text stream for the JSON decoder."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self.buffer, self.at = "", 0
        self._stream, self._name = stream, name
        self._line, self._counted = 1, 0

    def decode(self, decoder: json.JSONDecoder) -> tuple[Any, int]:
        """The value that begins here and where it ends, reading on until it is whole.

        Raises:
            DataError: if there is no whole value.
        """
        line = self.line_of_next()
        while True:
            try:
                value, end = decoder.raw_decode(self.buffer, self.at)
                # A number at the end of the buffer may go on behind it.
                if end < len(self.buffer) or not self._read_more():
                    return value, end
            except (json.JSONDecodeError, RecursionError) as error:
                too_long = len(self.buffer) - self.at > MAX_ROW_BYTES
                if too_long or isinstance(error, RecursionError) or not self._read_more():
                    reason = f"an element is longer than {format_bytes(MAX_ROW_BYTES)}" if too_long else str(error)
                    raise DataError(
                        f"{self._name}:{line}: the JSON array cannot be read from here on: {reason}. "
                        f"Repair the file, or write one object per line (jsonl), where only the bad line is lost."
                    ) from error

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            while self.at < len(self.buffer):
                if not self.buffer[self.at].isspace():
                    return self.buffer[self.at]
                self.at += 1
            if not self._read_more():
                return ""

    def skip(self, expected: str) -> str:
        """Step over the next character, which must be one of `expected`."""
        found = self.peek()
        if not found or found not in expected:
            what = f"found {found!r}" if found else "the file ends"
            raise DataError(f"{self._name}:{self.line_of_next()}: expected {' or '.join(expected)} in a JSON array, but {what}.")
        self.at += 1
        return found

    def line_of_next(self) -> int:
        self.peek()
        self._count_lines()
        return self._line

    def _read_more(self) -> bool:
        """Drop what was decoded and read on, in growing steps so that a long element is not decoded too often."""
        try:
            more = self._stream.read(max(1 << 16, len(self.buffer)))
        except UnicodeDecodeError as error:
            line = self._line + self.buffer.count("\n", self._counted)
            raise DataError(f"{self._name}: not UTF-8 after line {line}: byte 0x{error.object[error.start]:02x}.") from error
        if not more:
            return False
        self._count_lines()
        self.buffer = self.buffer[self.at :] + more
        self.at = self._counted = 0
        return True

    def _count_lines(self) -> None:
        self._line += self.buffer.count("\n", self._counted, self.at)
        self._counted = self.at


def _read_csv(segment: Segment) -> Iterator[Row | BadRow]:
    """Rows of a CSV file under the names in its first row. A quoted field may hold line breaks; a row's line is its first."""
    csv.field_size_limit(MAX_ROW_BYTES)
    problems: list[str] = []
    reader = csv.reader(_csv_lines(segment, problems), strict=True, delimiter="\t" if segment.file.kind == "tsv" else ",")
    try:
        columns = next(reader, [])
    except csv.Error as error:
        raise DataError(f"{segment.file.name}:1: the header cannot be read: {error}.") from error
    if problems or len(set(columns)) < len(columns) or not all(column.strip() for column in columns):
        reason = problems[0] if problems else f"every column needs a name of its own, found {columns}"
        raise DataError(f"{segment.file.name}:1: the header cannot be used: {reason}.")
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            yield BadRow(f"not CSV: {error}", line)
            continue
        if fields is None:
            return
        if problems:
            yield BadRow(problems.pop(0), line)
            problems.clear()
        elif fields and len(fields) != len(columns):
            yield BadRow(f"{len(fields)} fields, but the header names {len(columns)}", line)
        elif fields:
            yield Row(dict(zip(columns, fields)), line)


def _csv_lines(segment: Segment, problems: list[str]) -> Iterator[str]:
    for _, data in _lines(segment):
        if data is None:
            problems.append(f"a line is longer than {format_bytes(MAX_ROW_BYTES)}")
            yield "\n"
            continue
        try:
            yield data.decode()
        except UnicodeDecodeError as error:
            problems.append(f"not UTF-8: byte 0x{data[error.start]:02x} at column {error.start + 1}")
            yield data.decode(errors="replace")


def _read_txt(segment: Segment) -> Iterator[Row | BadRow]:
    """A document per line, as `datasets` reads text files."""
    for line, data in _lines(segment):
        if data is None:
            yield BadRow(f"the line is longer than {format_bytes(MAX_ROW_BYTES)}", line)
        elif not data.isspace():
            try:
                yield Row({"text": data.decode().rstrip("\r\n")}, line)
            except UnicodeDecodeError as error:
                yield BadRow(f"not UTF-8: byte 0x{data[error.start]:02x} at column {error.start + 1}", line)


def _read_parquet(segment: Segment) -> Iterator[Row | BadRow]:
    import pyarrow.parquet

    with _named_errors(segment.file), pyarrow.parquet.ParquetFile(segment.file.path) as parquet:
        batches = parquet.iter_batches(batch_size=256, row_groups=list(range(segment.start, segment.stop or 0)))
        rows = chain.from_iterable(batch.to_pylist() for batch in batches)
        for line, values in enumerate(rows, segment.first_line):
            yield Row(values, line)


def _read_dataset(segment: Segment) -> Iterator[Row | BadRow]:
    with _named_errors(segment.file):
        dataset = _load_dataset(segment.file)
        assert segment.stop is not None
        for index in range(segment.start, segment.stop):
            yield Row(dataset[index], index + 1)


def _read_demo(segment: Segment) -> Iterator[Row | BadRow]:
    assert segment.stop is not None
    return (Row(values, line) for line, values in enumerate(demo_rows(segment.file.path, segment.stop), 1))


_READERS: dict[FileKind, Callable[[Segment], Iterator[Row | BadRow]]] = {
    "json": _read_json,
    "csv": _read_csv,
    "tsv": _read_csv,
    "txt": _read_txt,
    "parquet": _read_parquet,
    "dataset": _read_dataset,
    "demo": _read_demo,
}


# --- Details -----------------------------------------------------------------------------------------------------------------


def _lines(segment: Segment) -> Iterator[tuple[int, bytes | None]]:
    """Lines of a segment with their numbers; None in place of one that is too long. A byte order mark is not part of line 1."""
    with open(segment.file.path, "rb") as stream:
        stream.seek(segment.start)
        if segment.start == 0 and stream.read(len(_BOM)) != _BOM:
            stream.seek(0)
        line = segment.first_line
        while segment.stop is None or stream.tell() < segment.stop:
            data = stream.readline(MAX_ROW_BYTES + 1)
            if not data:
                return
            if len(data) <= MAX_ROW_BYTES:
                yield line, data
            else:
                while data and not data.endswith(b"\n"):
                    data = stream.readline(MAX_ROW_BYTES)
                yield line, None
            line += 1


def _digest_and_cuts(stream: BinaryIO) -> tuple[str, list[tuple[int, int]], int]:
    """Hash of the content, places to cut it (offset of a line's first byte, number of that line), and its size."""
    digest, cuts, size, line = hashlib.sha256(), [], 0, 1
    while chunk := stream.read(SEGMENT_BYTES):
        digest.update(chunk)
        line += chunk.count(b"\n")
        if (last := chunk.rfind(b"\n")) >= 0:
            cuts.append((size + last + 1, line))
        size += len(chunk)
    return digest.hexdigest(), cuts, size


def _is_json_array(file: SourceFile) -> bool:
    with open(file.path, "rb") as stream:
        if stream.read(len(_BOM)) != _BOM:
            stream.seek(0)
        while chunk := stream.read(4096):
            if text := chunk.lstrip():
                return text.startswith(b"[")
    return False


def _row_groups(file: SourceFile) -> tuple[Segment, ...]:
    import pyarrow.parquet

    with _named_errors(file), pyarrow.parquet.ParquetFile(file.path) as parquet:
        counts = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
    first_rows = [1 + sum(counts[:group]) for group in range(len(counts))]
    return tuple(Segment(file, group, group + 1, first_rows[group]) for group in range(len(counts)))


def _load_dataset(file: SourceFile) -> Any:
    """A hub data set or a `save_to_disk` folder, one split of it.

    Raises:
        DataError: if it cannot be loaded or has no such split.
    """
    import datasets

    loaded: Any
    with _named_errors(file):
        if os.path.isdir(file.path):
            loaded = datasets.load_from_disk(file.path)
            if isinstance(loaded, datasets.DatasetDict):
                if file.split not in loaded:
                    raise DataError(f"{file.name} has no split '{file.split}', only {', '.join(map(str, loaded))}.")
                loaded = loaded[file.split]
            return loaded
        name, _, subset = file.path.partition(":")
        return datasets.load_dataset(name, subset or None, split=file.split)


@contextmanager
def _named_errors(file: SourceFile) -> Iterator[None]:
    """Turn whatever a library says about a file into a DataError that names the file."""
    try:
        yield
    except RaytuneError:
        raise
    except Exception as error:
        what = "data set" if file.kind == "dataset" else f"{file.kind} file"
        raise DataError(f"{file.name} cannot be read as a {what}: {type(error).__name__}: {error}") from error


def _matching_urls(url: str) -> list[str]:
    """The URL itself, or those in its folder that match its last part."""
    folder, _, pattern = url.rpartition("/")
    if not glob.has_magic(pattern):
        return [url]
    matches = [f"{folder}/{name}" for name in list_folder(folder) if fnmatchcase(name, pattern)]
    if not matches:
        raise DataError(f"No file matches '{url}'.")
    return matches


def _downloaded(url: str, downloads: Path) -> SourceFile:
    kind = _kind_of(url)
    target = downloads / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{url.split('/')[-1]}"
    try:
        download_file(url, target)
    except FileNotFoundError as error:
        raise DataError(f"There is no file '{url}'.") from error
    return SourceFile(url, str(target), kind, "")


def _kind_of(path: str) -> FileKind:
    kind = _KINDS.get(Path(path).suffix.lower())
    if kind is None:
        raise DataError(f"{path}: cannot read files that end in '{Path(path).suffix}', only {', '.join(_KINDS)}.")
    return kind
