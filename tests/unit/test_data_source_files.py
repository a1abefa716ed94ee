"""Compressed files, Arrow files and folders give the rows that `datasets` reads from them, or say why they give none."""

import bz2
import gzip
import json
import lzma
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import feather, ipc

from raytune.config.sections.data import DataSource, ending_of, source_name
from raytune.data.files.compression import compression_of
from raytune.data.files.readers import BadRow, FileRow, read_segment
from raytune.data.files.source_files import find_files
from raytune.data.files.sources import COMPRESSED_SEGMENTS, scan
from raytune.data.rows.shards import Tally
from raytune.data.rows.source_rows import read_conversations
from raytune.errors import DataError
from raytune.storage import write_bytes

ROWS = [{"question": f"What is {index}?", "answer": "é" * (index % 5)} for index in range(40)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def read(path: Path | str, **source: Any) -> list[FileRow | BadRow]:
    files = find_files(DataSource(path=str(path), **source), Path("/nonexistent"))
    return [row for file in files for segment in scan(file, None).segments for row in read_segment(segment)]


def values(rows: list[FileRow | BadRow]) -> list[dict[str, Any]]:
    assert not [row for row in rows if isinstance(row, BadRow)]
    return [row.values for row in rows if isinstance(row, FileRow)]


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# --- Compressed --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".txt"])
def test_a_compressed_file_has_the_rows_and_the_fingerprint_of_the_plain_one(ending: str, kind: str, tmp_path: Path) -> None:
    contents = {
        ".jsonl": b"\xef\xbb\xbf" + LINES,
        ".json": json.dumps(ROWS, indent=1).encode(),
        ".csv": b"question,answer\n" + b"".join(f'"What, is\n{index}?",a\n'.encode() for index in range(9)),
        ".txt": b"one\n\ntwo\r\nthree",
    }
    plain = written(tmp_path / f"rows{kind}", contents[kind])
    packed = written(tmp_path / f"packed{kind}{ending}", COMPRESS[ending](contents[kind]))
    assert read(packed) == read(plain)
    (one,), (other,) = (find_files(DataSource(path=str(path)), tmp_path) for path in (plain, packed))
    assert scan(one, None).fingerprint == scan(other, None).fingerprint


@pytest.mark.parametrize("ending", COMPRESS)
def test_streams_one_behind_another_are_all_read_and_a_damaged_or_torn_one_is_an_error(ending: str, tmp_path: Path) -> None:
    packed = COMPRESS[ending](LINES)
    path = written(tmp_path / f"rows.jsonl{ending}", packed + packed)
    assert values(read(path)) == ROWS + ROWS
    for content in (packed[: len(packed) // 2], packed[:-3], packed + b"garbage", packed + packed[: len(packed) // 2]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"rows.jsonl{ending} cannot be decompressed .* it is damaged or cut off behind"):
            read(path)


def test_frames_that_zstd_skips_may_stand_in_front_as_pzstd_writes_them(tmp_path: Path) -> None:
    skipped = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"size"
    assert values(read(written(tmp_path / "rows.jsonl.zst", (skipped + zstd(LINES)) * 2))) == ROWS + ROWS


def test_content_and_not_the_name_says_what_is_compressed(tmp_path: Path) -> None:
    assert values(read(written(tmp_path / "plain.jsonl.gz", LINES))) == ROWS
    assert values(read(written(tmp_path / "packed.jsonl", gzip.compress(LINES)))) == ROWS
    assert values(read(written(tmp_path / "other.jsonl.gz", zstd(LINES)))) == ROWS
    assert values(read(written(tmp_path / "UPPER.JSONL.GZ", gzip.compress(LINES)))) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.jsonl.gz", gzip.compress(b""), "is empty"),
        ("empty.jsonl.gz", b"", "is empty"),
        ("rows.gz", gzip.compress(LINES), r"files that end in '.gz', .* for example rows.jsonl.gz"),
        ("rows", LINES, r"whose name has no ending"),
        ("rows.tar.gz", gzip.compress(LINES), "Unpack the archive"),
        ("rows.zip", b"PK\x03\x04", "Unpack the archive"),
        ("rows.parquet.gz", gzip.compress(b"PAR1"), "a parquet file is compressed inside"),
        ("object.json.gz", gzip.compress(json.dumps({"data": ROWS}, indent=1).encode()), "one JSON object with 40 rows"),
        ("picture.jsonl", b"\x89PNG\r\n\x1a\n", "rows.jsonl|not UTF-8"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    path = written(tmp_path / name, content)
    if name.startswith("picture"):
        assert [row.reason[:9] for row in read(path) if isinstance(row, BadRow)] == ["not UTF-8", "not JSON:"]
        return
    with pytest.raises(DataError, match=reason) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_a_zip_by_another_name_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "rows.jsonl", "w") as archive:
        archive.writestr("rows.jsonl", LINES)
    with pytest.raises(DataError, match=r"is a zip archive\. Unpack it"):
        read(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("ending", [".gz", ".bz2"])
def test_segments_of_a_compressed_file_tile_it_and_are_few(ending: str, tmp_path: Path) -> None:
    rows = [{"text": f"row {index} " + "x" * 2000} for index in range(1, 12_001)]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = written(tmp_path / f"rows.jsonl{ending}", COMPRESS[ending](content))
    (file,) = find_files(DataSource(path=str(path)), tmp_path)
    segments = scan(file, None).segments
    most = COMPRESSED_SEGMENTS[compression_of(file) or "gzip"]
    assert most / 2 < len(segments) <= most + 1
    assert values(read(path)) == rows
    (last, *_) = read_segment(segments[-1])
    assert isinstance(last, FileRow)
    assert last.values["text"].startswith(f"row {last.line} ")


@pytest.mark.parametrize(
    ("path", "ending", "name"),
    [
        ("a/rows.jsonl.gz", ".jsonl", "rows"),
        ("s3://b/dev.CSV.ZST", ".csv", "dev"),
        ("rows.gz", ".gz", "rows"),
        ("v1.2/rows", "", "rows"),
        ("shard-*.jsonl.xz", ".jsonl", "shard-"),
    ],
)
def test_a_compressed_file_is_named_and_told_by_the_ending_before(path: str, ending: str, name: str) -> None:
    assert (ending_of(path), source_name(DataSource(path=path))) == (ending, name)


# --- Arrow -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["file", "stream", "feather"])
def test_each_form_of_arrow_is_read_in_segments(form: str, tmp_path: Path) -> None:
    table = pa.table({"text": [f"row {index}" for index in range(1, 9001)]})
    path = tmp_path / ("rows.feather" if form == "feather" else "rows.arrow")
    if form == "feather":
        feather.write_feather(table, str(path), chunksize=700)
    else:
        open_writer = ipc.new_file if form == "file" else ipc.new_stream
        with open_writer(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=700)
    rows = read(path)
    assert [(row.line, row.values) for row in rows if isinstance(row, FileRow)] == list(enumerate(table.to_pylist(), 1))
    (file,) = find_files(DataSource(path=str(path)), tmp_path)
    assert len(scan(file, None).segments) == 5  # of 3 batches, 2100 rows, each


@pytest.mark.parametrize("content", [b"ARROW1 this is not it", b"nor this"])
def test_a_damaged_arrow_file_is_named(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.arrow cannot be read as an arrow file"):
        read(written(tmp_path / "rows.arrow", content))


def test_numbers_of_classes_are_read_by_the_names_that_their_data_set_gives_them(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])})
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 0}, {"text": "c", "label": -1}, {"text": "d", "label": None}]
    dataset = datasets.Dataset.from_list(rows, features=features)
    dataset.save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "rows.parquet")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    for path in (tmp_path / "saved", tmp_path / "rows.parquet", arrow):
        assert [row["label"] for row in values(read(path))] == ["good", "bad", -1, None]


# --- Folders -----------------------------------------------------------------------------------------------------------------


def folder(tmp_path: Path, *names: str) -> Path:
    for name in names:
        written(tmp_path / name, json.dumps({"text": name}).encode() + b"\n")
    return tmp_path


@pytest.mark.parametrize(
    "names",
    [
        ("b.jsonl", "a.jsonl"),
        ("a.jsonl", "b.jsonl.gz"),
        ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"),
        ("attestation.jsonl", "latest.jsonl"),
    ],
)
def test_the_files_of_one_kind_in_a_folder_are_its_rows(names: tuple[str, ...], tmp_path: Path) -> None:
    folder(tmp_path, *names, "README.md", "LICENSE", ".hidden.jsonl", "_metadata.jsonl")
    assert [row["text"] for row in values(read(tmp_path))] == sorted(names)
    assert [row["text"] for row in values(read(f"{tmp_path}/"))] == sorted(names)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("dev.jsonl", "test.jsonl", "LICENSE"), r"with LICENSE, dev.jsonl, test.jsonl in it.* none is of the split 'train'"),
        (("gsm-train.jsonl", "more.jsonl"), "Not all of its files say that they are of a split"),
        (("a.jsonl", "b.txt"), "of several kinds: 1 .jsonl, 1 .txt. Name those that are meant, for example '.*jsonl'"),
        (("README.md",), "with README.md in it. It has no file of rows itself"),
    ],
)
def test_a_folder_that_does_not_say_which_files_are_meant_says_what_is_in_it(
    names: tuple[str, ...], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=reason):
        read(folder(tmp_path, *names))


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("train", ["my-train-0.jsonl", "my-train-1.jsonl"]),
        ("validation", ["my-dev.jsonl"]),
        ("dev", ["my-dev.jsonl"]),
        ("test", ["my-test.jsonl"]),
    ],
)
def test_of_a_folder_whose_files_name_splits_one_is_read_as_datasets_does(split: str, names: list[str], tmp_path: Path) -> None:
    folder(tmp_path, "my-train-0.jsonl", "my-train-1.jsonl", "my-dev.jsonl", "my-test.jsonl", "LICENSE")
    assert [row["text"] for row in values(read(tmp_path, split=split))] == names


@pytest.mark.parametrize("split", ["validation", "train[90%:]"])
@pytest.mark.parametrize("names", [("train-0.jsonl", "train-1.jsonl"), ("a.jsonl", "b.jsonl")])
def test_a_split_that_a_folder_does_not_have_is_not_all_that_it_has(split: str, names: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none is of the split '" + re.escape(split)):
        read(folder(tmp_path, *names), split=split)


def test_a_saved_data_set_without_splits_has_no_other_than_its_own(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["a"]}, split="test").save_to_disk(str(tmp_path / "rows"))
    for split in ("train", "test"):
        assert [row["text"] for row in values(read(tmp_path / "rows", split=split))] == ["a"]
    with pytest.raises(DataError, match=r"rows is one data set without splits, so that it has no split 'train\[:90%\]'"):
        read(tmp_path / "rows", split="train[:90%]")


def test_a_folder_behind_a_url_is_one_too(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for name in ("one", "two"):
        memory.pipe(f"/raytune-folder/{name}.jsonl.gz", gzip.compress(json.dumps({"text": name}).encode()))
    for path in ("memory://raytune-folder", "memory://raytune-folder/"):
        files = find_files(DataSource(path=path), tmp_path)
        assert [row["text"] for file in files for part in scan(file, None).segments for row in values([*read_segment(part)])] == [
            "one",
            "two",
        ]


def test_files_folders_and_patterns_of_an_object_store_are_read(s3: str, tmp_path: Path) -> None:
    for name in ("train-0", "train-1", "test"):
        write_bytes(f"{s3}/rows/{name}.jsonl.gz", gzip.compress(json.dumps({"text": name}).encode()))
    write_bytes(f"{s3}/rows/README.md", b"# Rows")

    def texts(path: str, **source: Any) -> list[str]:
        files = find_files(DataSource(path=path, **source), tmp_path)
        return [row["text"] for file in files for part in scan(file, None).segments for row in values([*read_segment(part)])]

    assert texts(f"{s3}/rows/test.jsonl.gz") == ["test"]
    assert texts(f"{s3}/rows/*.jsonl.gz") == ["test", "train-0", "train-1"]
    assert texts(f"{s3}/rows/") == ["train-0", "train-1"]
    assert texts(f"{s3}/rows", split="test") == ["test"]
    with pytest.raises(DataError, match=r"with README.md, test.jsonl.gz, train-0.jsonl.gz, train-1.jsonl.gz in it"):
        texts(f"{s3}/rows", split="dev")
    with pytest.raises(DataError, match=r"There is no file 's3://runs/rows/other.jsonl'"):
        texts(f"{s3}/rows/other.jsonl")


def test_other_columns_in_a_later_file_are_bad_rows_with_its_name(tmp_path: Path) -> None:
    contents = [{"question": "Q", "answer": "A"}, {"question": "Q", "answer": "A", "hint": "H"}, {"text": "T"}]
    for name, row in zip("abc", contents):
        written(tmp_path / f"{name}.jsonl", json.dumps(row).encode())
    tally = Tally()
    assert len(list(read_conversations(DataSource(path=f"{tmp_path}/*.jsonl"), tmp_path, tally))) == 1
    assert tally.counts == {"rows": 3, "bad": 2}
    assert [example.split(": ", 1)[0] for example in tally.examples["bad"]] == [f"{tmp_path}/{name}.jsonl:1" for name in "bc"]
    assert "'hint' would be left unread" in tally.examples["bad"][0]
    assert "has no 'question', only 'text'" in tally.examples["bad"][1]


# --- As others read them -----------------------------------------------------------------------------------------------------

SAME = {
    "json": {
        "lines.jsonl": LINES,
        "crlf.jsonl": LINES.replace(b"\n", b"\r\n"),
        "no-end.jsonl": LINES.rstrip(),
        "lines.json": LINES,
        "array.json": json.dumps(ROWS, indent=2).encode(),
        "array.jsonl": json.dumps(ROWS).encode(),
        "packed.jsonl.gz": gzip.compress(LINES),
        "nested.jsonl": json.dumps({"a": {"b": [1, {"c": "x"}]}, "messages": [{"role": "user", "content": "q"}]}).encode()
        + b"\n",
    },
    "csv": {
        "quotes.csv": b'text,other\n"a, ""b""\nc",x\nplain,"y\r\nz"\n',
        "packed.csv.xz": lzma.compress(b"text,other\na,b\n"),
    },
    "text": {"lines.txt": b"one\ntwo\r\nthree"},
}


@pytest.mark.parametrize(("builder", "name"), [(builder, name) for builder, files in SAME.items() for name in files])
def test_rows_are_those_that_datasets_reads_from_the_same_file(builder: str, name: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    path = written(tmp_path / name, SAME[builder][name])
    options = {"keep_default_na": False} if builder == "csv" else {}
    theirs = datasets.load_dataset(builder, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"), **options)
    assert values(read(path)) == theirs.to_list()
