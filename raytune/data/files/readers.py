"""Rows out of a segment of a source, streamed in constant memory; every bad row is named by file and line."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import Any, TextIO

from raytune.config.sections.data import FileKind
from raytune.data.conversations.conversation import kind_of
from raytune.data.conversations.strict_json import TOO_DEEP, refuse_unusable, strict_json, unique_keys
from raytune.data.files.compression import open_bytes
from raytune.data.files.demo import demo_rows
from raytune.data.files.sources import BOM, Segment, load_dataset, named_errors, open_arrow, open_parquet
from raytune.errors import DataError
from raytune.units import MIB, format_bytes

MAX_ROW_BYTES = 32 * MIB
"""A longer line is refused rather than read into memory."""


@dataclass(frozen=True, slots=True)
class FileRow:
    values: dict[str, Any]
    line: int
    """Where it begins; in a table, and in a JSON array that is all on one line, its number. From 1."""


@dataclass(frozen=True, slots=True)
class BadRow:
    reason: str
    line: int


def read_segment(segment: Segment) -> Iterator[FileRow | BadRow]:
    """The rows of a segment in order, bad ones included. Blank lines are not rows.

    Raises:
        DataError: if the rest of the file cannot be read at all.
    """
    return _READERS[segment.file.kind](segment)


def _read_json(segment: Segment) -> Iterator[FileRow | BadRow]:
    reader = _read_json_array if segment.stop is None else _read_json_lines
    return reader(segment)


def _read_json_lines(segment: Segment) -> Iterator[FileRow | BadRow]:
    return _json_rows(Lines(segment))


def _json_rows(lines: "Lines") -> Iterator[FileRow | BadRow]:
    for line, data in lines:
        if data is None:
            yield BadRow(f"the line is longer than {format_bytes(MAX_ROW_BYTES)}", line)
        elif data and not data.isspace():
            yield _json_row(data, line)


def _json_row(data: bytes, line: int) -> FileRow | BadRow:
    try:
        values = strict_json(data.decode().rstrip())
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8: byte 0x{data[error.start]:02x} at column {error.start + 1}", line)
    except json.JSONDecodeError as error:
        is_at_end = error.pos >= len(error.doc) or error.msg.startswith("Unterminated")
        torn = "; the file ends in the middle of the row" if is_at_end and not data.endswith(b"\n") else ""
        return BadRow(f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}{torn}", line)
    except ValueError as error:
        return BadRow(f"not usable JSON: {error}", line)
    return _row_of(values, line)


def _row_of(values: Any, line: int) -> FileRow | BadRow:
    if isinstance(values, dict):
        return FileRow(values, line)
    return BadRow(f"{kind_of(values)}, expected an object with named columns", line)


def _read_json_array(segment: Segment) -> Iterator[FileRow | BadRow]:
    """The objects of one JSON array. A syntax error ends the file: what follows it cannot be told apart from what precedes it."""
    name, decoder = segment.file.name, json.JSONDecoder(object_pairs_hook=unique_keys)
    with open_bytes(segment.file) as content:
        text = _Window(io.TextIOWrapper(content, encoding="utf-8-sig", newline=""), name)
        text.skip("[")
        if text.peek() == "]":
            text.skip("]")
            text.must_end()
            return
        counted = count(1) if _is_one_line(segment) else None
        while True:
            line = text.line_of_next() if counted is None else next(counted)
            try:
                element, end = text.decode(decoder)
                refuse_unusable(element, text.buffer[text.at : end])
                row = _row_of(element, line)
            except ValueError as error:
                _, end = text.decode(json.JSONDecoder(parse_int=str))  # a number may have more digits than Python reads
                row = BadRow(f"not usable JSON: {error}", line)
            text.at = end
            yield row
            if text.skip(",]") == "]":
                text.must_end()
                return


def _is_one_line(segment: Segment) -> bool:
    """Whether lines tell nothing of where a row is: all that is in the file stands on one."""
    has_begun, has_ended = False, False
    with open_bytes(segment.file) as stream:
        while chunk := stream.read(MIB):
            if has_ended and chunk.strip():
                return False
            body, newline, rest = (chunk if has_begun else chunk.removeprefix(BOM).lstrip()).partition(b"\n")
            has_begun = has_begun or bool(body)
            has_ended = has_ended or bool(newline)
            if rest.strip():
                return False
    return True


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
                    reason = TOO_DEEP if isinstance(error, RecursionError) else reason
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

    def must_end(self) -> None:
        """Refuse what stands behind the array: a second one would be lost."""
        if found := self.peek():
            raise DataError(
                f"{self._name}:{self.line_of_next()}: the JSON array has ended, but {found!r} follows. Make one array of the "
                f"file, or write one object per line (jsonl)."
            )

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


def _read_csv(segment: Segment) -> Iterator[FileRow | BadRow]:
    """Rows of a CSV file under the names in its first row. A quoted field may hold line breaks; a row's line is its first."""
    csv.field_size_limit(MAX_ROW_BYTES)
    problems: list[str] = []
    delimiter = "\t" if segment.file.kind == "tsv" else ","
    reader = csv.reader(_csv_lines(segment, problems), strict=True, delimiter=delimiter)
    header, header_line = [], 1
    try:
        while not header:  # blank lines before it
            header_line = reader.line_num + 1
            if (header := next(reader, None)) is None:
                return
    except csv.Error as error:
        raise DataError(f"{segment.file.name}:{header_line}: the header cannot be read: {_in_words(error)}.") from error
    # The index that pandas writes, under the name that pandas reads it by.
    columns = ["Unnamed: 0", *header[1:]] if header[0] == "" else header
    if len(columns) == 1 and (other := next((mark for mark in ",;\t|" if mark in columns[0] and mark != delimiter), None)):
        raise DataError(
            f"{segment.file.name}:{header_line}: the header is one column, {columns[0]!r}, as if columns were separated by "
            f"{other!r}. Write the file with commas, or with tabs and the ending .tsv."
        )
    if problems or len(set(columns)) < len(columns) or not all(column.strip() for column in columns):
        reason = problems[0] if problems else f"every column needs a name of its own, found {columns}"
        raise DataError(f"{segment.file.name}:{header_line}: the header cannot be used: {reason}.")
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            lost = f"; lines {line} to {reader.line_num} are lost with it" if reader.line_num > line else ""
            yield BadRow(f"not CSV: {_in_words(error)}{lost}", line)
            continue
        if fields is None:
            return
        if problems:
            yield BadRow(problems.pop(0), line)
            problems.clear()
        elif fields and len(fields) != len(columns):
            yield BadRow(f"{len(fields)} fields, but the header names {len(columns)}", line)
        elif len(fields) > 1 and [fields[0].removeprefix("\ufeff"), *fields[1:]] == header:
            yield BadRow("the header once more, as where files were put behind each other", line)
        elif fields:
            yield FileRow(dict(zip(columns, fields)), line)


def _in_words(error: csv.Error) -> str:
    is_line_end = str(error).startswith("new-line character")
    return "a line ends in a carriage return alone; write line feeds" if is_line_end else str(error)


def _csv_lines(segment: Segment, problems: list[str]) -> Iterator[str]:
    for _, data in Lines(segment):
        if data is None:
            problems.append(f"a line is longer than {format_bytes(MAX_ROW_BYTES)}")
            yield "\n"
            continue
        try:
            yield data.decode()
        except UnicodeDecodeError as error:
            problems.append(f"not UTF-8: byte 0x{data[error.start]:02x} at column {error.start + 1}")
            yield data.decode(errors="replace")


def _read_txt(segment: Segment) -> Iterator[FileRow | BadRow]:
    """A document per line, as `datasets` reads text files."""
    return _text_rows(Lines(segment))


def _text_rows(lines: "Lines") -> Iterator[FileRow | BadRow]:
    for line, data in lines:
        if data is None:
            yield BadRow(f"the line is longer than {format_bytes(MAX_ROW_BYTES)}", line)
        elif data and not data.isspace():
            try:
                yield FileRow({"text": data.decode().rstrip("\r\n")}, line)
            except UnicodeDecodeError as error:
                yield BadRow(f"not UTF-8: byte 0x{data[error.start]:02x} at column {error.start + 1}", line)


def _read_parquet(segment: Segment) -> Iterator[FileRow | BadRow]:
    with named_errors(segment.file), open_parquet(segment.file) as parquet:
        groups = range(segment.start, segment.stop or 0)
        # One after another: of several that it is asked for at once the library fetches all into memory first.
        batches = chain.from_iterable(parquet.iter_batches(batch_size=256, row_groups=[group]) for group in groups)
        yield from _rows_of_table(batches, parquet.schema_arrow, segment)


def _read_arrow(segment: Segment) -> Iterator[FileRow | BadRow]:
    with named_errors(segment.file), open_arrow(segment.file) as batches:
        wanted = islice(batches, segment.start, segment.stop)
        first = next(wanted, None)
        if first is not None:
            pieces = (batch.slice(start, 256) for batch in chain([first], wanted) for start in range(0, batch.num_rows, 256))
            yield from _rows_of_table(pieces, first.schema, segment)


def _rows_of_table(batches: Iterable[Any], schema: Any, segment: Segment) -> Iterator[FileRow | BadRow]:
    rows, classes = chain.from_iterable(map(_rows_of_batch, batches)), _classes(schema)
    for line, values in enumerate(rows, segment.first_line):
        if isinstance(values, str):
            yield BadRow(values, line)
        else:
            yield FileRow(_with_class_names(_without_filled_nulls(values), classes), line)


# Text that is no UTF-8, a date behind the year 9999, a key twice in one map: what Arrow holds and Python does not.
_NO_VALUE = (ValueError, OverflowError, KeyError)


def _rows_of_batch(batch: Any) -> list[Any]:
    """The rows of a batch, with the reason in place of one that has a value which cannot be read."""
    try:
        return batch.to_pylist(maps_as_pydicts="strict")
    except _NO_VALUE:
        if batch.num_rows == 1:
            return [_reason_of_none(batch)]
        return [row for index in range(batch.num_rows) for row in _rows_of_batch(batch.slice(index, 1))]


def _reason_of_none(batch: Any) -> str:
    for name in batch.schema.names:
        try:
            batch.select([name]).to_pylist(maps_as_pydicts="strict")
        except UnicodeDecodeError as error:
            return f"not UTF-8: byte 0x{error.object[error.start]:02x} in a text"
        except _NO_VALUE as error:
            return f"'{name}' cannot be read ({type(error).__name__}: {error.args[0]})"
    raise AssertionError("a row without a column that cannot be read")


def _classes(schema: Any) -> dict[str, list[str]]:
    """Columns that hold numbers of classes, with the names of these, as `datasets` notes them beside the schema of a table."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        named = {column: feature["names"] for column, feature in features.items() if feature.get("_type") == "ClassLabel"}
    except (TypeError, KeyError, ValueError, AttributeError):
        return {}
    return {column: names for column, names in named.items() if isinstance(names, list)}


def _with_class_names(values: dict[str, Any], classes: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """A row with the names of its classes for their numbers. -1 stands for none, and stays."""
    for column, names in classes.items():
        number = values.get(column)
        if isinstance(number, int) and 0 <= number < len(names):
            values[column] = names[number]
    return values


def _read_dataset(segment: Segment) -> Iterator[FileRow | BadRow]:
    with named_errors(segment.file):
        dataset = load_dataset(segment.file)
        assert segment.stop is not None
        classes = _classes(dataset.features.arrow_schema)
        for index in range(segment.start, segment.stop):
            yield FileRow(_with_class_names(_without_filled_nulls(dataset[index]), classes), index + 1)


def _without_filled_nulls(values: dict[str, Any]) -> dict[str, Any]:
    """A row of an Arrow table without the null keys of its objects: a column has one struct for all rows, so that each has a null
    for every key that any other row has. Which of them the file's writer meant cannot be told."""
    return {column: _pruned(value) for column, value in values.items()}


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _pruned(inner) for key, inner in value.items() if inner is not None}
    return [_pruned(inner) for inner in value] if isinstance(value, list) else value


def _read_demo(segment: Segment) -> Iterator[FileRow | BadRow]:
    assert segment.stop is not None
    return (FileRow(values, line) for line, values in enumerate(demo_rows(segment.file.path, segment.stop), 1))


_READERS: dict[FileKind, Callable[[Segment], Iterator[FileRow | BadRow]]] = {
    "json": _read_json,
    "csv": _read_csv,
    "tsv": _read_csv,
    "txt": _read_txt,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "dataset": _read_dataset,
    "demo": _read_demo,
}


ROWS_OF_LINES: dict[FileKind, Callable[["Lines"], Iterator[FileRow | BadRow]]] = {"json": _json_rows, "txt": _text_rows}
"""Rows of files with a row per line, one line after another as they are asked for."""


class Lines:
    """Lines of a segment with their numbers; None in place of one that is too long. A byte order mark is not part of line 1."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self.at, self.line = segment.start, segment.first_line
        """Where the next line begins, and its number."""

    def __iter__(self) -> Iterator[tuple[int, bytes | None]]:
        segment = self._segment
        with open_bytes(segment.file, segment.start) as stream:
            while segment.stop is None or self.at < segment.stop:
                data = stream.readline(MAX_ROW_BYTES + 1)
                if not data:
                    return
                begins_file, line = self.at == 0, self.line
                self.at, self.line = self.at + len(data), line + 1
                if len(data) <= MAX_ROW_BYTES:
                    yield line, data.removeprefix(BOM) if begins_file else data
                else:
                    while data and not data.endswith(b"\n"):
                        data = stream.readline(MAX_ROW_BYTES)
                        self.at += len(data)
                    yield line, None
