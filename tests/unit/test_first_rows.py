"""Of a file behind a URL of which the first rows are wanted, no more is fetched than has them, and they are the same rows."""

import bz2
import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import raytune
from raytune.config.sections.data import DataSource
from raytune.data.files.first_rows import find_first_files
from raytune.data.files.readers import read_segment
from raytune.data.files.source_files import find_files
from raytune.data.files.sources import scan
from raytune.units import MIB
from tests.variants import chequered

ROWS = [{"prompt": f"question {number}, " + "words\n\n" * 1500, "completion": f"answer {number}"} for number in range(1000)]


class Fetched:
    num_bytes = 0


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Fetched]]:
    """A store behind URLs that counts the bytes it gives."""
    read, Fetched.num_bytes = MemoryFileSystem.cat_file, 0

    def counted(self: Any, path: str, *arguments: Any, **named: Any) -> bytes:
        content = read(self, path, *arguments, **named)
        Fetched.num_bytes += len(content)
        return content

    monkeypatch.setattr(MemoryFileSystem, "cat_file", counted)
    yield Fetched
    MemoryFileSystem.store.clear()


def lines() -> bytes:
    return b"\n".join([b"", *(json.dumps(row).encode() for row in ROWS)])


def table() -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["prompt", "completion"])
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def parquet() -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), sink, row_group_size=100, compression="none", use_dictionary=False)
    return sink.getvalue()


def put(name: str, content: bytes) -> str:
    fsspec.filesystem("memory").pipe_file(f"/rows/{name}", content)
    return f"memory://rows/{name}"


def values(files: list[Any], most: int) -> list[tuple[str, int, Any]]:
    read = (
        (file.name, row.line, getattr(row, "values", None))
        for file in files
        for part in scan(file, None).segments
        for row in read_segment(part)
    )
    return [row for row, _ in zip(read, range(most))]


FILES: dict[str, tuple[Callable[[], bytes], bool]] = {
    "a.jsonl": (lines, True),
    "a.csv": (table, True),
    "a.parquet": (parquet, True),
    "a.txt": (lines, True),
    "a.jsonl.gz": (lambda: gzip.compress(lines(), 0), True),
    "a.jsonl.bz2": (lambda: bz2.compress(lines()[: 4 * MIB]), False),  # which is small
    "a.json": (lambda: json.dumps(ROWS).encode(), False),
}
"""What makes a file, and whether it is read in pieces."""


@pytest.mark.parametrize(("name", "most"), chequered([*FILES], [1, 20]))
def test_the_first_rows_are_those_of_the_whole_file(name: str, most: int, store: type[Fetched], tmp_path: Path) -> None:
    make, is_piecewise = FILES[name]
    content = make()
    url = put(name, content)
    source = DataSource(path=url, max_rows=most)
    found = values(find_first_files(source, tmp_path / "some"), most)
    fetched = store.num_bytes
    assert found == values(find_files(source, tmp_path / "all"), most)
    assert len(found) == most
    if is_piecewise:
        assert fetched <= 9 * MIB < len(content), "pieces are of 4 MiB, and the end of a Parquet file is one"


def test_of_several_files_those_are_read_that_have_the_rows(store: type[Fetched], tmp_path: Path) -> None:
    short = b"\n\n".join(json.dumps({"text": f"text {number}"}).encode() for number in range(10))
    for name in ("a", "b", "c", "d"):
        put(f"{name}.jsonl", short)
    source = DataSource(path="memory://rows/*.jsonl", max_rows=15)
    files = find_first_files(source, tmp_path)
    assert [file.name for file in files] == ["memory://rows/a.jsonl", "memory://rows/b.jsonl"]
    assert values(files, 15) == values(find_files(source, tmp_path / "all"), 15)
    assert len(find_first_files(source.model_copy(update={"max_rows": None}), tmp_path)) == 4
    assert len(find_first_files(source.model_copy(update={"max_rows": 100}), tmp_path)) == 4


def test_a_check_of_the_first_rows_fetches_no_more_and_names_the_file(store: type[Fetched], tmp_path: Path) -> None:
    url = put("a.jsonl", lines().replace(b"answer 2", b"", 1))
    config = {
        "model": {"base": "demo"},
        "storage": str(tmp_path),
        "data": {"train": url, "template": "chatml", "max_length": 2048, "too_long": "truncate_left"},
    }
    check = raytune.data_check(config, max_rows=20)
    (source,) = check.report.train.sources
    assert source.rows == 20
    assert source.examples["blank_answers"] == [f"{url}:4: turn 2"]
    assert store.num_bytes <= 9 * MIB < len(lines())
