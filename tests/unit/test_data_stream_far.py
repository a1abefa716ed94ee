"""A stream of files behind URLs is that of the same files on a disk, from any place on; nothing of them is written to one."""

import gzip
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import fsspec
import numpy as np
import pytest

from raytune.config.load import config_from
from raytune.data.files import pieces as file_pieces
from raytune.data.files.pieces import KEPT_PIECES, FilesAhead, Version, version_of
from raytune.data.stream.stream import Position, Stream, Window, windows_from
from raytune.errors import ClusterError, DataError, RaytuneError
from raytune.launch.data.data_preview import preview_data
from raytune.launch.data.first_window import first_window
from tests.bad_store import Fault, bad_store
from tests.hub_stand_in import StandIn
from tests.tiny import tiny_tokenizer
from tests.unit.test_data_stream import KINDS, TEXTS, recipe, source, write_chats
from tests.unit.test_object_store import hurry, use

PIECE = 300


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of some rows each, so that a file has many."""
    monkeypatch.setattr(file_pieces, "PIECE_BYTES", PIECE)


@pytest.fixture
def far(s3: str) -> str:
    return f"{s3}/{uuid4().hex}"


def put(path: Path, url: str) -> None:
    fsspec.filesystem("s3").put_file(str(path), url)


def contents(windows: list[Window]) -> list[list[list[int]]]:
    return [[window.rows.row(row).input_ids.tolist() for row in range(window.rows.num_rows)] for window in windows]


@pytest.mark.parametrize("name", [name for name in KINDS if name != "saved"])
def test_files_behind_urls_are_streamed_as_those_on_a_disk(name: str, far: str, tmp_path: Path, small_pieces: None) -> None:
    KINDS[name](tmp_path / name, TEXTS)
    put(tmp_path / name, f"{far}/{name}")
    fields: dict[str, Any] = {"packing": "none", "read_ahead_mib": 1}
    near = recipe(tmp_path / name, 17, **fields, sources=source(str(tmp_path / name), format="text"))
    away = recipe(f"{far}/{name}", 17, **fields, sources=source(f"{far}/{name}", format="text"))
    expected = list(islice(windows_from(near, Position()), 14))
    unbroken = list(islice(windows_from(away, Position()), 14))
    assert contents(unbroken) == contents(expected)
    assert unbroken[8].rows.origins(0) == [origin.replace(str(tmp_path), far) for origin in expected[8].rows.origins(0)]
    for index in (1, 6):
        position = Position.of(json.loads(json.dumps(unbroken[index].position.to_json())))
        assert contents(list(islice(windows_from(away, position), 4))) == contents(unbroken[index : index + 4])
    away.close()


def write_texts(path: Path, num_rows: int, mark: str = "row") -> Path:
    path.write_text("".join(f"{mark} {number:05}\n" for number in range(num_rows)))
    return path


def far_texts(far: str, tmp_path: Path, num_rows: int, mark: str = "row") -> str:
    put(write_texts(tmp_path / "a.txt", num_rows, mark), f"{far}/a.txt")
    return f"{far}/a.txt"


def test_a_file_that_is_written_again_under_a_stream_stops_it_before_a_row_of_it_is_trained(
    far: str, tmp_path: Path, small_pieces: None
) -> None:
    url = far_texts(far, tmp_path, 400)
    made = recipe(url, 30, read_ahead_mib=0)
    windows = windows_from(made, Position())
    first = list(islice(windows, 2))
    assert far_texts(far, tmp_path, 400, "new") == url
    changed = r"s3://.*/a\.txt is another file than when this run was planned: it had 4000 bytes and has 4000, and its mark was"
    with pytest.raises(DataError, match=changed):
        list(islice(windows, 9))
    with pytest.raises(DataError, match=changed):
        next(windows_from(made, first[-1].after))
    made.close()
    made = recipe(url, 30, read_ahead_mib=0)
    fsspec.filesystem("s3").rm(url)
    with pytest.raises(DataError, match=r"/a\.txt, 4000 bytes when this run was planned, is gone\. Put it back"):
        next(windows_from(made, Position()))
    made.close()


def test_a_local_file_that_is_written_again_stops_a_stream_too(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "a.txt", 400)
    windows = windows_from(recipe(path, 30), Position())
    next(windows)
    write_texts(path, 400, "new")
    with pytest.raises(DataError, match=r"a\.txt is another file than when this run was planned"):
        next(windows)


def test_answers_that_break_off_are_asked_for_again(
    far: str, tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    url = far_texts(far, tmp_path, 200)
    good = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    made = recipe(url, 50, packing="none")
    near = recipe(tmp_path / "a.txt", 50, packing="none")
    hurry(monkeypatch, limit_s=5, patience_s=60)
    faults: list[Fault] = ["cut", "500", "cut", "slow down", "cut", "pass on"]
    with bad_store(*faults, upstream=(str(good.hostname), int(good.port or 0))) as store:
        use(store, monkeypatch)
        found = contents(list(islice(windows_from(made, Position()), 4)))
        made.close()
    assert found == contents(list(islice(windows_from(near, Position()), 4)))
    assert f"Could not read {url}" in caplog.text


def test_a_store_that_does_not_answer_ends_a_stream_with_its_url_and_holds_up_nobody_who_has_left(
    far: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = far_texts(far, tmp_path, 200)
    made, left, before = recipe(url, 50), recipe(url, 50), threading.enumerate()
    with bad_store("mute") as store:
        use(store, monkeypatch)
        hurry(monkeypatch, limit_s=0.6, patience_s=0.6)
        with pytest.raises(ClusterError, match=rf"Could not read {url} in 2 attempts .*run the same command again"):
            next(windows_from(made, Position()))
        hurry(monkeypatch, limit_s=30, patience_s=60)
        stream = Stream(left)
        began = time.monotonic()
        stream.close()
        assert time.monotonic() - began < 5
        assert not [thread for thread in threading.enumerate() if thread.name == "stream" and thread not in before]
    made.close()


SIZES = [5 * PIECE, 0, 2 * PIECE + 1, 1, 7 * PIECE - 1]


@pytest.fixture
def blobs(small_pieces: None) -> list[tuple[str, bytes, Version]]:
    """Files of bytes in memory."""
    chance, files = np.random.default_rng(0), fsspec.filesystem("memory")
    found = []
    for number, size in enumerate(SIZES):
        url, content = f"memory://{uuid4().hex}/{number}", chance.bytes(size)
        files.pipe_file(url, content)
        found.append((url, content, version_of(url)))
    return found


@pytest.mark.parametrize("ahead", [0, 1, 3 * PIECE, 100 * PIECE])
def test_a_file_in_pieces_is_read_as_a_file(ahead: int, blobs: list[tuple[str, bytes, Version]]) -> None:
    files = FilesAhead([(url, version) for url, _, version in blobs], ahead)
    chance = np.random.default_rng(1)
    for url, content, _ in [*blobs, *blobs]:
        with files.open(url) as far:
            assert far.read() == content
            for _ in range(20):
                start, length = (int(number) for number in chance.integers(0, len(content) + 9, 2))
                far.seek(start)
                assert far.read(length) == content[start : start + length]
            assert far.seek(-min(3, len(content)), 2) == len(content) - min(3, len(content))
            assert far.read() == content[-3:]
    files.close()


def test_what_is_fetched_ahead_is_bounded_and_reaches_into_the_next_files(blobs: list[tuple[str, bytes, Version]]) -> None:
    files = FilesAhead([(url, version) for url, _, version in blobs], 4 * PIECE)
    for _ in range(2):
        for number, (url, content, _) in enumerate(blobs):
            with files.open(url) as far:
                assert b"".join(iter(lambda far=far: far.read(40), b"")) == content
                assert len(files._pieces) <= 4 + KEPT_PIECES
            assert files._pieces.keys() & {((number + 1) % 5, 0), ((number + 2) % 5, 0)}, "the next file with something in it"
    assert len(files._threads) == 5
    files.close()
    with pytest.raises(RaytuneError):
        files.open(blobs[2][0]).read()


@pytest.fixture
def data_sets(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A hub in reach of `datasets` and of fsspec too, which have read where it is when they were imported."""
    from datasets import config as of_datasets

    monkeypatch.setattr(of_datasets, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(of_datasets, "HF_HUB_OFFLINE", False)
    fsspec.get_filesystem_class("hf").clear_instance_cache()
    yield hub
    fsspec.get_filesystem_class("hf").clear_instance_cache()


def as_bytes(kind: str, texts: list[str], folder: Path) -> bytes:
    KINDS[f"a.{kind}"](folder / f"a.{kind}", texts)
    return (folder / f"a.{kind}").read_bytes()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_data_set_of_a_hub_is_streamed_at_the_commit_that_it_had(
    kind: str, data_sets: StandIn, tmp_path: Path, small_pieces: None
) -> None:
    shards = {f"data/train-{number}.{kind}": as_bytes(kind, TEXTS[number::3], tmp_path) for number in range(3)}
    files = {"README.md": b"---\nlicense: mit\n---\n", f"data/test-0.{kind}": as_bytes(kind, ["of the test"], tmp_path)}
    data_sets.add("datasets/owner/texts", shards | files)
    made = recipe("owner/texts", 20, packing="none", sources=source("owner/texts", format="text"))
    data_sets.add("datasets/owner/texts", {f"data/train-0.{kind}": as_bytes(kind, ["another"], tmp_path)})
    first, *windows = islice(windows_from(made, Position()), 10)
    decode = tiny_tokenizer().decode
    found = [decode(row, skip_special_tokens=True) for window in contents([first, *windows[:4]]) for row in window]
    assert Counter(found) == Counter(TEXTS)
    assert windows[4].after.counts[0]["passes"] == 1
    assert first.rows.origins(0)[0].startswith(f"owner/texts/data/train-0.{kind}:")
    again = list(islice(windows_from(made, Position.of(json.loads(json.dumps(windows[2].position.to_json())))), 4))
    assert contents(again) == contents(windows[2:6])
    assert not list((tmp_path / "cache").rglob("*train*")), "nothing of it is copied"
    made.close()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"data/test-0.jsonl": b'{"text": "a"}\n'}, r"owner/odd has no split 'train', only test"),
        ({"train.csv": b"text\n1\n"}, r"files of the kind csv, .*Name its files, such as hf://datasets/owner/odd@COMMIT/FILE"),
        (
            {
                "README.md": b"---\nconfigs:\n- config_name: default\n  data_files: a.json\n  field: rows\n---\n",
                "a.json": b'{"rows": [{"text": "a"}]}',
            },
            r"with options of its own \(field\)",
        ),
    ],
)
def test_a_data_set_that_would_be_read_otherwise_is_refused(files: dict[str, bytes], message: str, data_sets: StandIn) -> None:
    data_sets.add("datasets/owner/odd", files)
    with pytest.raises(DataError, match=message):
        recipe("owner/odd", 3)


def test_a_preview_reads_no_further_than_it_shows(far: str, tmp_path: Path) -> None:
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(write_chats(tmp_path / "whole.jsonl", 500).read_bytes())[:-100])
    put(cut, f"{far}/cut.jsonl.gz")
    data = {"train": f"{far}/cut.jsonl.gz", "streaming": {"window": 40}}
    config = config_from({"name": "a", "model": {"base": "demo"}, "data": data, "training": {"max_steps": 5}})
    shown = preview_data(config, rows=2).documents
    assert [document.origin for document in shown] == [f"{far}/cut.jsonl.gz:1", f"{far}/cut.jsonl.gz:2"]


def test_an_object_of_the_same_size_that_begins_alike_makes_another_run(far: str, tmp_path: Path) -> None:
    names = []
    for mark in ("row", "new"):
        path = tmp_path / "a.txt"
        path.write_text(write_texts(path, 50).read_text() + write_texts(path, 50, mark).read_text())
        put(path, f"{far}/a.txt")
        made = recipe(f"{far}/a.txt", 20)
        names.append(first_window(made).path)
        made.close()
    assert names[0] != names[1]


class WithoutMarks(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def test_a_server_that_does_not_tell_when_a_file_changes_is_refused() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), WithoutMarks)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    with pytest.raises(DataError, match=r"cannot be streamed: its storage does not say when it is written again\. .*@COMMIT"):
        recipe(f"http://127.0.0.1:{server.server_port}/a.txt", 3)
    server.shutdown()
    server.server_close()
