"""Calls to an object store that is not well: limits on every call, words with every retry, and exit code 10 in the end."""

import gc
import os
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import fsspec
import pytest

from raytune import object_store, storage
from raytune.errors import EXIT_REFUSED, EXIT_RETRY_LATER, ClusterError, UserError
from raytune.launch.state.record import read_plan
from raytune.metrics.history import History
from raytune.object_store import in_time, moved, once, retry
from raytune.run_folder import RunFolder
from tests.bad_store import SIZE, BadStore, Fault, bad_store

URL = "s3://runs/folder/file"
VERBS = [
    *("exists", "list_folder", "file_sizes", "read_bytes", "read_from", "write_bytes", "create_bytes", "file_digest"),
    *("remove_folder", "upload_file", "upload_folder", "download_file", "download_folder"),
]
pytestmark = pytest.mark.timeout(60)


def hurry(monkeypatch: pytest.MonkeyPatch, *, limit_s: float, patience_s: float) -> None:
    """Set limits of what else takes minutes. Waits between attempts take no time: only they count as patience."""
    waited: list[float] = []
    monkeypatch.setattr(object_store, "READ_LIMIT_S", limit_s / 2)
    monkeypatch.setattr(object_store, "CALL_LIMIT_S", limit_s)
    monkeypatch.setattr(object_store, "SLOWEST_BYTES_PER_S", 1e9)
    monkeypatch.setattr(object_store, "TRIES_OF_CLIENT", 1)
    changes = {"limit_s": limit_s, "patience_s": patience_s, "sleep": waited.append, "clock": lambda: sum(waited)}
    for name, value in changes.items():
        monkeypatch.setitem(cast("dict[str, Any]", retry.__kwdefaults__), name, value)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two attempts, a fifth of a second each."""
    hurry(monkeypatch, limit_s=0.2, patience_s=0.6)


def use(store: BadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    use_address(store.url, monkeypatch)


def use_address(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    settings = {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    for name, value in {**settings, "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()


def verbs(folder: Path) -> dict[str, Callable[[], Any]]:
    """Everything that storage does, on one file."""
    local = folder / "local"
    local.write_bytes(os.urandom(SIZE))
    return {
        "exists": lambda: storage.exists(URL),
        "list_folder": lambda: storage.list_folder(URL),
        "file_sizes": lambda: storage.file_sizes(URL),
        "read_bytes": lambda: storage.read_bytes(URL),
        "read_from": lambda: storage.read_from(URL, 10),
        "write_bytes": lambda: storage.write_bytes(URL, b"x"),
        "create_bytes": lambda: storage.create_bytes(URL, b"x"),
        "file_digest": lambda: storage.file_digest(URL),
        "remove_folder": lambda: storage.remove_folder(URL, "s3://runs/folder"),
        "upload_file": lambda: storage.upload_file(local, URL),
        "upload_folder": lambda: storage.upload_folder(folder, "s3://runs/folder"),
        "download_file": lambda: storage.download_file(URL, folder / "down"),
        "download_folder": lambda: storage.download_folder("s3://runs/folder", folder / "down"),
    }


@pytest.mark.parametrize("verb", VERBS)
def test_a_store_that_accepts_and_never_answers_ends_every_call(
    verb: str, hurried: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with bad_store("mute") as store:
        use(store, monkeypatch)
        with pytest.raises(
            ClusterError, match=r"Could not .* s3://runs/folder.* in \d+ attempts .*run the same command"
        ) as error:
            verbs(tmp_path)[verb]()
        while [thread for thread in threading.enumerate() if thread.name == "storage call"]:
            time.sleep(0.05)  # no call waits on behind the back of the one who made it: it could overwrite what comes later
    assert error.value.exit_code == EXIT_RETRY_LATER
    assert "Attempt 1 of at most 10 failed; next in 0.5 s" in caplog.text


@pytest.mark.parametrize(
    ("fault", "verb"),
    [
        *product(["stall", "drip", "cut"], ["read_bytes", "upload_file", "download_file"]),
        *product(["500", "slow down"], ["exists", "upload_file"]),
    ],
)
def test_a_store_that_breaks_off_or_is_unwell_ends_every_call(
    fault: Fault, verb: str, hurried: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with bad_store(fault) as store:
        use(store, monkeypatch)
        with pytest.raises(ClusterError) as error:
            verbs(tmp_path)[verb]()
    assert len(str(error.value)) < 800, "responses are not quoted whole"
    assert "\0" not in str(error.value)
    assert not (tmp_path / "down").exists()


def test_a_store_that_refuses_connections_ends_the_call(hurried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with bad_store("mute") as store:
        use(store, monkeypatch)
    with pytest.raises(ClusterError, match="run the same command again"):
        storage.read_bytes(URL)


def test_a_store_that_forbids_is_the_users_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch, limit_s=10.0, patience_s=60.0)
    with bad_store("403") as store:
        use(store, monkeypatch)
        with pytest.raises(UserError, match="refuses access") as error:
            storage.read_bytes(URL)
    assert error.value.exit_code == EXIT_REFUSED


@pytest.mark.parametrize("fault", ["mute", "cut", "500", "slow down"])
def test_a_store_that_recovers_is_used(
    fault: Fault, s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hurry(monkeypatch, limit_s=2.0, patience_s=60.0)
    good = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    content = os.urandom(3 * SIZE)
    (tmp_path / "file").write_bytes(content)
    with bad_store(fault, "pass on", upstream=(str(good.hostname), int(good.port or 0))) as store:
        use(store, monkeypatch)
        digest = storage.upload_file(tmp_path / "file", f"{s3}/{fault}/file")
        store.faults = [fault, "pass on"]
        fsspec.filesystem("s3").clear_instance_cache()
        assert storage.download_file(f"{s3}/{fault}/file", tmp_path / "down") == digest
    assert (tmp_path / "down").read_bytes() == content
    # What was cut before an answer, the client sends again by itself.
    assert fault == "cut" or "failed; next in 0.5 s" in caplog.text


def test_what_follows_a_large_file_is_all_that_is_read(s3: str) -> None:
    storage.write_bytes(f"{s3}/lines", b"one\ntwo\n")
    assert storage.read_from(f"{s3}/lines", 4) == b"two\n"
    assert storage.read_from(f"{s3}/lines", 8) == storage.read_from(f"{s3}/lines", 80) == b""
    with pytest.raises(FileNotFoundError):
        storage.read_from(f"{s3}/no-lines", 0)


def test_no_message_shows_credentials(hurried: None, caplog: pytest.LogCaptureFixture) -> None:
    def fail(files: Any, name: str) -> None:
        raise OSError("GET https://key:SECRET@host/x failed")

    with pytest.raises(ClusterError) as error:
        retry(fail, "read", "memory://key:SECRET@host/x?sig=SECRET", patience_s=0.6)
    assert "SECRET" not in str(error.value) + caplog.text
    assert "read memory://host/x" in str(error.value)


# --- Limits, without a store -------------------------------------------------------------------------------------------------


def test_a_call_that_moves_on_may_take_longer_than_its_limit() -> None:
    def slow_but_sure() -> str:
        for _ in range(15):
            time.sleep(0.1)
            moved()
        return "done"

    assert in_time(slow_but_sure, 1.0) == "done"
    with pytest.raises(TimeoutError, match="no answer"):
        in_time(lambda: time.sleep(5), 0.2)


def test_a_call_that_was_given_up_stops_at_its_next_move() -> None:
    seen: list[str] = []

    def late() -> None:
        time.sleep(0.3)
        try:
            moved()
        except TimeoutError:
            seen.append("stopped")
            raise
        seen.append("went on")

    with pytest.raises(TimeoutError):
        in_time(late, 0.1)
    while not seen:
        time.sleep(0.05)
    assert seen == ["stopped"]


def test_a_caller_that_comes_again_anyway_is_not_kept_waiting() -> None:
    attempts, waited = [], []

    def fail(files: Any, name: str) -> None:
        attempts.append(name)
        raise OSError("internal error")

    with once(), pytest.raises(ClusterError, match="in 1 attempt over"):
        retry(fail, "read", "memory://x", sleep=waited.append)
    assert (len(attempts), waited) == (1, [])
    with pytest.raises(ClusterError, match="in 10 attempts"):
        retry(fail, "read", "memory://x", sleep=waited.append, clock=lambda: 0.0)
    assert waited == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]


def test_patience_begins_anew_with_progress() -> None:
    """A transfer of half an hour that breaks off once is not given up because it took half an hour."""
    now, attempts = [0.0], []

    def transfer(files: Any, name: str) -> str:
        attempts.append(now[0])
        now[0] += 1000
        moved()
        if len(attempts) < 3:
            raise OSError("connection reset")
        return "done"

    def sleep(seconds: float) -> None:
        now[0] += seconds

    assert retry(transfer, "upload", "memory://x", sleep=sleep, clock=lambda: now[0]) == "done"
    assert len(attempts) == 3


def test_an_upload_that_is_given_up_leaves_nothing(tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of fsspec that is merely closed, or collected, stores what it has got so far."""
    (tmp_path / "file").write_bytes(bytes(6 << 20))
    monkeypatch.setattr(storage, "CHUNK_BYTES", 5 << 20)
    with once(), pytest.raises(TimeoutError):
        in_time(lambda: storage.upload_file(tmp_path / "file", f"{s3}/broken"), 0.0)
    for thread in threading.enumerate():
        if thread.name == "storage call":  # it was left behind, and stops at its next move
            thread.join(timeout=30)
            assert not thread.is_alive()
    gc.collect()
    assert not storage.exists(f"{s3}/broken")


class WebServer(BaseHTTPRequestHandler):
    """Answers whatever is asked with its page."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(PAGE)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(PAGE)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


PAGE = b"\n<!DOCTYPE html><html><head><title>Welcome to the\n guest network</title></head><body>Log in</body></html>"


@pytest.mark.parametrize(
    "read", [lambda: read_plan(RunFolder("s3://runs", "a")), lambda: History.read("s3://runs/a/metrics.jsonl")]
)
def test_a_web_page_in_the_place_of_a_store_is_called_that(read: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), WebServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    use_address(f"http://127.0.0.1:{server.server_port}", monkeypatch)
    with pytest.raises(UserError, match=r'a web page called "Welcome to the guest network" and no .*AWS_ENDPOINT_URL'):
        read()
    server.shutdown()
