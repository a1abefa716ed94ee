"""Readers name every bad row by file and line, lose no good one, and need no memory for huge ones."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import ipc, parquet

from raytune.config.sections.data import DataSource, source_name
from raytune.data.files import readers
from raytune.data.files.readers import BadRow, FileRow, read_segment
from raytune.data.files.source_files import find_files
from raytune.data.files.sources import scan
from raytune.data.formats.recognising import reading_of
from raytune.errors import DataError
from tests.tiny import PATIENT

GOOD = b'{"text": "good"}\n'


def read(path: Path | str, **source: Any) -> list[FileRow | BadRow]:
    files = find_files(DataSource(path=str(path), **source), Path("/nonexistent"))
    return [row for file in files for segment in scan(file, None).segments for row in read_segment(segment)]


def values(rows: list[FileRow | BadRow]) -> list[dict[str, Any]]:
    return [row.values for row in rows if isinstance(row, FileRow)]


def bad(rows: list[FileRow | BadRow]) -> list[tuple[int, str]]:
    return [(row.line, row.reason) for row in rows if isinstance(row, BadRow)]


FINE = {
    "plain.jsonl": GOOD * 3,
    "no-newline-at-end.jsonl": GOOD * 2 + GOOD.rstrip(),
    "bom.jsonl": b"\xef\xbb\xbf" + GOOD * 3,
    "crlf.jsonl": GOOD.replace(b"\n", b"\r\n") * 3,
    "blank-lines.jsonl": b"\n \t\n" + GOOD + b"\r\n\n" + GOOD * 2 + b"\n\n",
    "array-in.jsonl": b"[" + b",".join([GOOD] * 3) + b"]",
    "array.json": b'\xef\xbb\xbf \n[{"text": "good"},\n\n{"text":\n"good"} , {"text": "good"}\n]\n\n',
    "lines.json": GOOD * 3,
    "pairs.jsonl": b'{"text": "\\ud83d\\ude00"}\n' + GOOD * 2,
    "table.csv": b"text\ngood\ngood\ngood\n",
    "quoted.csv": b'\xef\xbb\xbftext,other\r\n"good, with comma",1\r\n"good\r\nover\r\nlines",2\r\n"good ""quoted""",3\r\n',
    "tabs.tsv": b"text\tn\ngood, one\t1\ngood\t2\ngood\t3\n",
    "plain.txt": b"good\n\n  \ngood \r\ngood",
}


@pytest.mark.parametrize("name", FINE)
def test_harmless_oddities_are_read(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FINE[name])
    rows = read(tmp_path / name)
    assert not bad(rows)
    assert len(values(rows)) == 3
    assert all(row["text"].startswith(("good", "\U0001f600")) for row in values(rows))


# Content with one bad row on the given line, among good ones, and a word of the reason.
BAD_ROWS = {
    "torn.jsonl": (GOOD + b'{"text": "goo', 2, "ends in the middle"),
    "torn-in-the-middle.jsonl": (GOOD + b'{"text": "goo\n' + GOOD, 2, "not JSON"),
    "bad-utf8.jsonl": (GOOD * 2 + b'{"text": "\xff"}\n' + GOOD, 3, "not UTF-8: byte 0xff at column 11"),
    "latin1.jsonl": (GOOD + '{"text": "café"}\n'.encode("latin-1"), 2, "not UTF-8"),
    "utf16.jsonl": (GOOD + '{"text": "a"}'.encode("utf-16"), 2, "not UTF-8"),
    "lone-surrogate.jsonl": (GOOD + b'{"text": "\\ud800"}\n' + GOOD, 2, "surrogate"),
    "lone-surrogate-upper.jsonl": (b'{"text": "a\\uDC00b"}\n' + GOOD, 1, "surrogate"),
    "surrogate-in-key.jsonl": (b'{"\\uD800": "a"}\n' + GOOD, 1, "surrogate"),
    "list.jsonl": (GOOD + b'["a"]\n', 2, "a list"),
    "string.jsonl": (GOOD + b'"a"\n', 2, "text, expected"),
    "null.jsonl": (GOOD + b"null\n", 2, "null, expected"),
    "number.jsonl": (GOOD + b"12\n", 2, "a number, expected"),
    "huge-number.jsonl": (GOOD + b'{"n": ' + b"9" * 5000 + b"}\n", 2, "not usable JSON"),
    "duplicate-key.jsonl": (GOOD + b'{"text": "a", "text": "b"}\n', 2, "'text' appears twice"),
    "nested.jsonl": (GOOD + b'{"a":' * 200_000 + b"1" + b"}" * 200_000 + b"\n", 2, "not usable JSON"),
    "two-on-a-line.jsonl": (GOOD + GOOD.rstrip() + GOOD, 2, "Extra data"),
    "single-quotes.jsonl": (GOOD + b"{'text': 'a'}\n", 2, "not JSON"),
    "nul.jsonl": (GOOD + b"\x00\x00\x00\n" + GOOD, 2, "not JSON"),
    "control.jsonl": (GOOD + b'{"text": "a\x01b"}\n', 2, "control character"),
    "duplicate-key.json": (b"[" + GOOD + b', {"text": "a", "text": "b"},' + GOOD + b"]", 2, "'text' appears twice"),
    "surrogate.json": (b"[" + GOOD + b',\n{"text": "\\udc00"}]', 3, "surrogate"),
    "number.json": (b"[" + GOOD + b", 12]", 2, "a number, expected"),
    "too-many-fields.csv": (b"text,n\ngood,1\ngood,1,2\ngood,1\n", 3, "3 fields, but the header names 2"),
    "too-few-fields.csv": (b"text,n\ngood\ngood,1\n", 2, "1 fields"),
    "bad-utf8.csv": (b"text\ngood\n\xe9t\xe9\ngood\n", 3, "not UTF-8"),
    "bad-utf8-in-quotes.csv": (b'text\ngood\n"two\n\xe9t\xe9"\ngood\n', 3, "not UTF-8"),
    "open-quote.csv": (b'text\ngood\n"never closed\ngood\n', 3, "unexpected end of data"),
    "text-after-quote.csv": (b'text\ngood\n"a" b\ngood\n', 3, "not CSV"),
    "bad-utf8.txt": (b"good\n\xff\xfe\ngood\n", 2, "not UTF-8"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_by_its_line_and_costs_no_other_row(name: str, tmp_path: Path) -> None:
    content, line, reason = BAD_ROWS[name]
    (tmp_path / name).write_bytes(content)
    rows = read(tmp_path / name)
    assert [bad_line for bad_line, _ in bad(rows)] == [line]
    assert reason in bad(rows)[0][1]
    assert values(rows)
    assert all(row.get("text") == "good" for row in values(rows))


UNREADABLE = {
    "empty.jsonl": (b"", "is empty"),
    "empty.csv": (b"", "is empty"),
    "empty.parquet": (b"", "is empty"),
    "truncated.json": (b'[{"text": "good"}, {"text": "go', "truncated.json:1: .*cannot be read from here"),
    "unclosed.json": (b'[{"text": "good"}\n', "unclosed.json:2: expected , or ]"),
    "two-arrays.json": (
        b'[{"text": "good"}]\n[{"text": "good"}]\n',
        "two-arrays.json:2: the JSON array has ended, but '\\[' follows",
    ),
    "behind-empty.json": (b'[]\n{"text": "good"}\n', "behind-empty.json:2: the JSON array has ended, but '{' follows"),
    "garbage.json": (b'[{"text": "good"},\n ,]', "garbage.json:2: .*cannot be read from here"),
    "bad-utf8.json": (b'[{"text": "good"},\n{"text": "\xff"}]', "bad-utf8.json: not UTF-8"),
    "deep.json": (b"[" * 200_000, "deep.json:1"),
    "header.csv": (b"a,a\n1,2\n", "header.csv:1: the header cannot be used"),
    "nameless.csv": (b"a,,b\n1,2,3\n", "every column needs a name"),
    "latin1-header.csv": (b"caf\xe9,b\n1,2\n", "not UTF-8"),
    "semicolons.csv": (b"question;answer\nq;a\n", "semicolons.csv:1: the header is one column, .* separated by ';'"),
    "tabs.csv": (b"question\tanswer\nq\ta\n", "tabs.csv:1: the header is one column"),
    "commas.tsv": (b"question,answer\nq,a\n", "commas.tsv:1: the header is one column"),
    "utf16.csv": ("question,answer\nq,a\n".encode("utf-16"), "is UTF-16. Save it as UTF-8"),
    "utf16-be.jsonl": (b"\xfe\xff\x00{", "is UTF-16"),
    "pointer.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a pointer of Git LFS"),
    "broken.parquet": (b"PAR1 this is not it PAR1", "cannot be read as a parquet file"),
    "picture.png": (b"\x89PNG", "cannot read files that end in '.png'"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_cannot_be_read_at_all_is_named(name: str, tmp_path: Path) -> None:
    content, message = UNREADABLE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_a_huge_line_is_refused_in_constant_memory(tmp_path: Path) -> None:
    path = tmp_path / "huge.jsonl"
    with open(path, "wb") as file:
        file.write(GOOD + b'{"text": "')
        for _ in range(100):
            file.write(b"x" * 2**20)
        file.write(b'"}\n' + GOOD)
    code = (
        "import resource\n"
        "from raytune.config.sections.data import DataSource\n"
        "from raytune.data.files.readers import read_segment\n"
        "from raytune.data.files.source_files import find_files\n"
        "from raytune.data.files.sources import scan\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"(file,) = find_files(DataSource(path={str(path)!r}), None)\n"
        "rows = [row for segment in scan(file, None).segments for row in read_segment(segment)]\n"
        "print([(row.line, type(row).__name__) for row in rows])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert output[0] == "[(1, 'FileRow'), (2, 'BadRow'), (3, 'FileRow')]"
    assert int(output[1]) < 80 * 1024  # KiB; the line has 100 MiB, two pieces of at most 32 MiB are held at once


def test_long_lines_of_text_and_csv_are_refused_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 1000)
    long = b"x" * 5000
    (tmp_path / "a.txt").write_bytes(b"good\n" + long + b"\ngood\n" + long)
    assert [line for line, _ in bad(read(tmp_path / "a.txt"))] == [2, 4]
    (tmp_path / "a.csv").write_bytes(b"text\ngood\n" + long + b"\ngood\n")
    assert [line for line, _ in bad(read(tmp_path / "a.csv"))] == [3]
    (tmp_path / "a.json").write_bytes(b'[{"text": "good"}, {"text": "' + long * 30 + b'"}]')
    with pytest.raises(DataError, match="an element is longer"):
        read(tmp_path / "a.json")


JSON_VALUES = st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.lists(st.text(max_size=3), max_size=3)
JSON_ROWS = st.lists(st.dictionaries(st.text(max_size=5), JSON_VALUES, max_size=3), min_size=1, max_size=8)


@settings(PATIENT, max_examples=40)
@given(rows=JSON_ROWS, ascii_only=st.booleans(), indent=st.sampled_from([None, 1]))
def test_what_was_written_is_read_back_from_lines_and_arrays(
    rows: list[dict[str, Any]], ascii_only: bool, indent: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    lines = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    (folder / "a.jsonl").write_bytes(lines.encode())
    (folder / "a.json").write_bytes(json.dumps(rows, ensure_ascii=ascii_only, indent=indent).encode())
    assert values(read(folder / "a.jsonl")) == values(read(folder / "a.json")) == rows


def test_segments_of_a_large_file_tile_it_with_the_right_line_numbers(tmp_path: Path) -> None:
    rows = [{"text": f"row {index} " + "é" * (index % 700)} for index in range(1, 6001)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    (file,) = find_files(DataSource(path=str(tmp_path / "a.jsonl")), tmp_path)
    segments = scan(file, None).segments
    assert len(segments) >= 3
    for segment in segments:
        for row in read_segment(segment):
            assert isinstance(row, FileRow)
            assert row.values["text"].startswith(f"row {row.line} ")
    assert values(read(tmp_path / "a.jsonl")) == rows
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1))
    array = read(tmp_path / "a.json")
    assert values(array) == rows
    assert [row.line for row in array[:3]] == [2, 5, 8]


def test_fingerprints_follow_content_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "b.jsonl").write_bytes(GOOD)
    (tmp_path / "c.jsonl").write_bytes(GOOD * 2)
    one, same, other = (
        scan(find_files(DataSource(path=str(tmp_path / f"{name}.jsonl")), tmp_path)[0], None).fingerprint for name in "abc"
    )
    assert one == same != other


def test_a_map_of_arrow_is_an_object(tmp_path: Path) -> None:
    arguments = pa.array([[{"f": [("city", "Oslo")]}], None], pa.list_(pa.struct({"f": pa.map_(pa.string(), pa.string())})))
    parquet.write_table(pa.table({"calls": arguments}), tmp_path / "a.parquet")
    assert values(read(tmp_path / "a.parquet")) == [{"calls": [{"f": {"city": "Oslo"}}]}, {"calls": None}]


def test_the_index_that_pandas_writes_into_a_csv_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",prompt,completion\n0,a,b\n")
    (row,) = values(read(tmp_path / "a.csv"))
    assert row == {"Unnamed: 0": "0", "prompt": "a", "completion": "b"}
    assert reading_of(DataSource(path="a.csv"), row).format == "prompt_completion"


def test_parquet_row_groups_are_segments(tmp_path: Path) -> None:
    table = pa.table({"text": [f"row {index}" for index in range(1, 11)], "tags": [["a", None]] * 10})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    rows = read(tmp_path / "a.parquet")
    assert [(row.line, row.values) for row in rows if isinstance(row, FileRow)] == list(enumerate(table.to_pylist(), 1))
    (file,) = find_files(DataSource(path=str(tmp_path / "a.parquet")), tmp_path)
    assert len(scan(file, None).segments) == 3


def test_a_table_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        with pytest.raises(DataError, match=f"{name} has more than one column with the name 'text'"):
            read(tmp_path / name)


def test_folders_of_save_to_disk_are_read_by_split(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    train, test = ([{"text": f"{name} {index}"} for index in range(5)] for name in ("train", "test"))
    datasets.Dataset.from_list(train).save_to_disk(tmp_path / "single")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(train), "test": datasets.Dataset.from_list(test)}).save_to_disk(
        tmp_path / "both"
    )
    assert values(read(tmp_path / "single")) == train
    assert values(read(tmp_path / "both", split="test")) == test
    with pytest.raises(DataError, match="no split 'dev', only train, test"):
        read(tmp_path / "both", split="dev")


def test_globs_are_sorted_and_must_match(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    assert [row["text"] for row in values(read(tmp_path / "*.jsonl"))] == ["a", "b", "c"]
    with pytest.raises(DataError, match="No file matches"):
        read(tmp_path / "*.csv")


def test_urls_are_read_through_fsspec(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for name in ("one", "two"):
        memory.pipe(f"/raytune-data/{name}.jsonl", json.dumps({"text": name}).encode())
    files = find_files(DataSource(path="memory://raytune-data/*.jsonl"), tmp_path)
    rows = [row for file in files for segment in scan(file, None).segments for row in read_segment(segment)]
    assert [row["text"] for row in values(rows)] == ["one", "two"]
    assert [file.name for file in files] == ["memory://raytune-data/one.jsonl", "memory://raytune-data/two.jsonl"]
    with pytest.raises(DataError, match="There is no file 'memory://raytune-data/three"):
        find_files(DataSource(path="memory://raytune-data/three.jsonl"), tmp_path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.jsonl", "There is no file 'missing.jsonl'"),
        ("./missing", "There is no file"),
        ("demo:nothing", "demo:train, demo:validation, demo:test"),
        ("", ""),
    ],
)
def test_a_path_that_leads_nowhere_is_refused(path: str, message: str, tmp_path: Path) -> None:
    if not path:
        path, message = str(tmp_path), "is a folder, but not one that `save_to_disk` wrote"
    with pytest.raises(DataError, match=message):
        read(path)


def test_an_unknown_hub_data_set_is_an_error_that_names_it() -> None:
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match="nobody/nothing cannot be read as a data set"):
        read("nobody/nothing")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("demo:validation", "validation"),
        ("a/b/dev.jsonl", "dev"),
        ("s3://bucket/held-out.parquet", "held-out"),
        ("owner/data", "data"),
        ("folder/", "folder"),
    ],
)
def test_a_source_is_named_after_the_last_part_of_its_path(path: str, name: str) -> None:
    assert source_name(DataSource(path=path)) == name
    assert source_name(DataSource(path=path, name="mine")) == "mine"


ROW = '{"text": "a"}'


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        (f"[{ROW}, 7, {ROW}]", [1, 2, 3]),
        (f"\ufeff\n[{ROW}, {ROW}]\n\n", [1, 2]),
        (f"[\n{ROW},\n{ROW}\n]\n", [2, 3]),
        (f"[{ROW}, {ROW},\n{ROW}]", [1, 1, 2]),
    ],
)
def test_a_row_of_an_array_is_known_by_its_line_or_where_there_is_but_one_by_its_number(
    text: str, numbers: list[int], tmp_path: Path
) -> None:
    (tmp_path / "a.json").write_text(text)
    assert [row.line for row in read(tmp_path / "a.json")] == numbers
