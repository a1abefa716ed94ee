"""Local folders, an in-memory object store, a store that fails on purpose, and S3 (moto) where it is installed."""

import errno
import hashlib
import os
import pickle
import subprocess
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from raytune import object_store, storage
from raytune.errors import ClusterError, RaytuneError, StorageFullError, UserError
from raytune.object_store import retry
from raytune.storage import Digest


class HttpResponseError(Exception):
    """As azure-core raises it, and adlfs passes it on: what Azurite 3.35 had answered to adlfs 2026.8 on 2026-11-30."""

    def __init__(self, fault: str) -> None:
        super().__init__(f"The answer was {fault}")
        self.status_code = int(fault[-3:])


class ClientAuthenticationError(Exception):
    """As azure-identity raises it, where nobody was asked."""

    status_code = None


class FaultyFileSystem(MemoryFileSystem):
    """An object store that misbehaves as real ones were seen to do. Its files are those of `memory://`."""

    protocol = "faulty"
    cachable = False
    faults: list[str] = []

    def _fault(self) -> str:
        return self.faults.pop(0) if self.faults else ""

    def _raise_fault(self) -> str:
        match fault := self._fault():
            case "500":
                raise OSError(errno.EIO, "Internal Error")
            case "403":
                raise PermissionError(errno.EACCES, "Forbidden")
            case "timeout":
                raise TimeoutError("read timed out")
            case "azure 403" | "azure 404":
                raise HttpResponseError(fault)
            case "azure 404 in an upload":
                raise RuntimeError("Failed to upload block") from HttpResponseError(fault[:9])
            case "no credentials":
                raise ClientAuthenticationError("DefaultAzureCredential failed to retrieve a token")
            case "google 403":
                raise OSError("Forbidden: runs\nThe account has no right to do this.")
        return fault

    def pipe_file(self, path, value, mode="overwrite", **kwargs):  # type: ignore[override]
        fault = self._raise_fault()
        if fault != "lost":  # reported as done, and nothing is stored
            super().pipe_file(path, value[: len(value) // 2] if fault == "half" else value, mode, **kwargs)

    def cat_file(self, path, start=None, end=None, **kwargs):  # type: ignore[override]
        self._raise_fault()
        return super().cat_file(path, start, end, **kwargs)

    def open(self, path, mode="rb", **kwargs):  # type: ignore[override]
        fault = self._raise_fault()
        if mode == "wb" and fault in ("lost", "half"):  # reported as done, and nothing is stored
            path = f"{path}.elsewhere"
        file = super().open(path, mode, **kwargs)
        if mode == "wb" and fault == "flip":
            original = file.write
            file.write = lambda data: original(bytes([data[0] ^ 1]) + bytes(data[1:]))  # type: ignore[method-assign]
        return file

    def info(self, path, **kwargs):  # type: ignore[override]
        self._raise_fault()
        return super().info(path, **kwargs)


fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Retries do not wait; the list collects what they would have waited."""
    waited: list[float] = []
    monkeypatch.setitem(retry.__kwdefaults__, "sleep", waited.append)
    monkeypatch.setitem(retry.__kwdefaults__, "clock", lambda: sum(waited))
    FaultyFileSystem.faults = []
    return waited


@pytest.fixture(params=["local", "memory", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder that does not exist yet, on each kind of storage."""
    if request.param == "local":
        return str(tmp_path / "storage")
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/storage"
    return f"{request.getfixturevalue('s3')}/{uuid.uuid4().hex}"


def test_what_was_written_is_read(root: str) -> None:
    storage.write_bytes(f"{root}/a/b.bin", b"\x00\xff")
    storage.write_bytes(f"{root}/a/b.bin", b"newer")
    storage.write_json(f"{root}/a/c.json", {"name": "Zürich", "value": 1e-4})
    assert storage.read_bytes(f"{root}/a/b.bin") == b"newer"
    assert storage.read_json(f"{root}/a/c.json") == {"name": "Zürich", "value": 1e-4}
    assert storage.list_folder(f"{root}/a") == ["b.bin", "c.json"]
    assert storage.list_folder(root) == ["a"]
    assert storage.file_sizes(root) == {"a/b.bin": 5, "a/c.json": len(storage.read_bytes(f"{root}/a/c.json"))}
    assert storage.file_digest(f"{root}/a/b.bin") == Digest(5, hashlib.sha256(b"newer").hexdigest())


def test_a_file_is_created_once(root: str) -> None:
    assert storage.create_bytes(f"{root}/deep/file", b"first")
    assert not storage.create_bytes(f"{root}/deep/file", b"second")
    assert storage.read_bytes(f"{root}/deep/file") == b"first"


def test_of_many_that_create_a_local_file_at_once_one_succeeds(tmp_path: Path) -> None:
    for number in range(20):
        path = tmp_path / f"folder-{number}" / "file"
        with ThreadPoolExecutor(8) as pool:
            created = list(pool.map(partial(storage.create_bytes, path), [b"%d" % i for i in range(8)]))
        assert storage.read_bytes(path) == b"%d" % created.index(True)
        assert created.count(True) == 1


@pytest.mark.parametrize("fault", ["500", "lost", "half"])
def test_a_file_is_created_although_the_first_try_goes_wrong(fault: str, no_waiting: list[float]) -> None:
    path = f"faulty://{uuid.uuid4().hex}/file"
    FaultyFileSystem.faults = [fault]
    assert storage.create_bytes(path, b"content") == (fault != "half"), "half a file is somebody's, as far as one can tell"


def test_only_an_empty_folder_is_removed_as_one(tmp_path: Path) -> None:
    storage.write_bytes(tmp_path / "full" / "file", b"")
    (tmp_path / "empty").mkdir()
    for name in ("full", "empty", "missing"):
        storage.remove_empty_folder(tmp_path / name)
    assert storage.list_folder(tmp_path) == ["full"]


def test_what_is_not_there_is_missing_and_nothing_else(root: str) -> None:
    storage.write_bytes(f"{root}/there", b"x")
    assert storage.exists(f"{root}/there")
    assert storage.exists(root)
    assert not storage.exists(f"{root}/missing")
    assert storage.list_folder(f"{root}/missing") == []
    assert storage.file_sizes(f"{root}/missing") == {}
    for verb in (storage.read_bytes, storage.read_json, storage.file_digest):
        with pytest.raises(FileNotFoundError):
            verb(f"{root}/missing")


def test_strict_json_only(root: str) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        storage.write_json(f"{root}/x.json", {"loss": float("nan")})


def test_folders_travel_both_ways_with_their_hashes(root: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    content = {"a.bin": os.urandom(3_000_000), "deep/er/b.bin": b"", "deep/c": b"c"}
    for name, data in content.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    expected = {name: Digest(len(data), hashlib.sha256(data).hexdigest()) for name, data in content.items()}
    assert storage.upload_folder(source, f"{root}/up") == expected
    assert storage.download_folder(f"{root}/up", tmp_path / "down") == expected
    assert {name: (tmp_path / "down" / name).read_bytes() for name in content} == content


def test_removed_is_gone_and_the_rest_stays(root: str) -> None:
    for name in ("run/a/1", "run/a/2", "run/ab/3"):
        storage.write_bytes(f"{root}/{name}", b"x")
    storage.remove_folder(f"{root}/run/a", root)
    storage.remove_folder(f"{root}/run/never-there", root)
    assert storage.file_sizes(root) == {"run/ab/3": 1}
    storage.remove_folder(f"{root}/run/ab/3", root)
    assert storage.file_sizes(root) == {}


@pytest.mark.parametrize("name", ["", "/", "/.", "/..", "/../other", "/run/../..", "/run/../../other"])
def test_nothing_outside_the_root_is_removed(root: str, name: str) -> None:
    storage.write_bytes(f"{root}/run/file", b"x")
    storage.write_bytes(f"{root}/../other", b"x") if storage.is_local(root) else None
    with pytest.raises(UserError, match="Refusing to delete"):
        storage.remove_folder(f"{root}/run{name}", f"{root}/run")
    assert storage.exists(f"{root}/run/file")


def test_a_sibling_with_the_same_beginning_is_outside() -> None:
    with pytest.raises(UserError, match="Refusing to delete"):
        storage.remove_folder("memory://bucket/run-2", "memory://bucket/run")
    with pytest.raises(UserError, match="Refusing to delete"):
        storage.remove_folder("/tmp/run-2", "/tmp/run")
    with pytest.raises(UserError, match="Refusing to delete"):
        storage.remove_folder("/tmp/run", "memory://tmp")


def test_links_are_removed_and_never_followed(tmp_path: Path) -> None:
    precious, run = tmp_path / "precious", tmp_path / "run"
    precious.mkdir()
    (precious / "data").write_text("keep me")
    (run / "checkpoint").mkdir(parents=True)
    (run / "checkpoint" / "link").symlink_to(precious)
    (run / "checkpoint" / "file-link").symlink_to(precious / "data")
    (run / "whole-link").symlink_to(precious)
    storage.remove_folder(run / "checkpoint", run)
    storage.remove_folder(run / "whole-link", run)
    assert list(run.iterdir()) == []
    assert (precious / "data").read_text() == "keep me"


def test_a_link_out_of_the_root_does_not_lead_a_removal_out(tmp_path: Path) -> None:
    (tmp_path / "precious" / "step").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="Refusing to delete"):
        storage.remove_folder(tmp_path / "run" / "checkpoints" / "step", tmp_path / "run")
    assert (tmp_path / "precious" / "step").exists()


def test_paths_are_local_or_not() -> None:
    assert storage.is_local("runs/a")
    assert storage.is_local("file:///runs/a")
    assert not storage.is_local("s3://bucket/a")
    assert storage.absolute("file:///runs/a") == "/runs/a"
    assert storage.absolute("runs") == os.path.join(os.getcwd(), "runs")
    assert storage.absolute("~/x") == os.path.expanduser("~/x")
    assert storage.absolute("s3://bucket/a/") == "s3://bucket/a"


# --- Faults ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["lost", "half", "500", "timeout", "403"])
def test_an_upload_that_the_store_did_not_take_is_sent_again(fault: str, no_waiting: list[float], tmp_path: Path) -> None:
    root = f"faulty://{uuid.uuid4().hex}"
    FaultyFileSystem.faults = [fault]
    storage.write_bytes(f"{root}/small", b"0123456789")
    (tmp_path / "large").write_bytes(b"0123456789")
    FaultyFileSystem.faults = [fault]
    storage.upload_file(tmp_path / "large", f"{root}/large")
    FaultyFileSystem.faults = []
    assert storage.read_bytes(f"{root}/small") == storage.read_bytes(f"{root}/large") == b"0123456789"
    assert len(no_waiting) == 2


def test_an_upload_with_a_flipped_bit_is_sent_again(no_waiting: list[float], tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"0123456789")
    url = f"faulty://{uuid.uuid4().hex}/large"
    FaultyFileSystem.faults = ["flip"]
    storage.upload_file(tmp_path / "large", url)
    assert storage.read_bytes(url) == b"0123456789"
    assert len(no_waiting) == 1


def test_a_store_that_is_down_is_not_an_empty_store(no_waiting: list[float]) -> None:
    url = f"faulty://{uuid.uuid4().hex}/run.json"
    FaultyFileSystem.faults = ["500"] * 100
    with pytest.raises(ClusterError, match=r"look for faulty://.* in 10 attempts over 184 s"):
        storage.exists(url)
    assert sum(no_waiting) > 180


def test_a_store_that_comes_back_is_used(no_waiting: list[float]) -> None:
    url = f"faulty://{uuid.uuid4().hex}/x"
    storage.write_bytes(url, b"x")
    FaultyFileSystem.faults = ["500"] * 8
    assert storage.read_bytes(url) == b"x"
    assert len(no_waiting) == 8


@pytest.mark.parametrize("fault", ["403", "azure 403", "google 403"])
def test_a_refusal_is_the_users_matter_after_a_few_seconds(fault: str, no_waiting: list[float]) -> None:
    FaultyFileSystem.faults = [fault] * 100
    with pytest.raises(UserError, match="refuses access"):
        storage.read_bytes(f"faulty://{uuid.uuid4().hex}/x")
    assert sum(no_waiting) < 10


def test_missing_credentials_are_the_users_matter_at_once(no_waiting: list[float]) -> None:
    FaultyFileSystem.faults = ["no credentials"]
    with pytest.raises(UserError, match="no credentials for this storage on"):
        storage.read_bytes(f"faulty://{uuid.uuid4().hex}/x")
    assert no_waiting == []


@pytest.mark.parametrize("fault", ["azure 404", "azure 404 in an upload"])
def test_a_missing_container_is_the_users_matter_too(fault: str, no_waiting: list[float]) -> None:
    FaultyFileSystem.faults = [fault]
    with pytest.raises(UserError, match="Does the bucket exist"):
        storage.write_bytes(f"faulty://{uuid.uuid4().hex}/x", b"x")
    assert no_waiting == []


def test_a_missing_file_is_not_asked_for_again(no_waiting: list[float]) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"faulty://{uuid.uuid4().hex}/x")
    assert no_waiting == []


@pytest.mark.skipif("__import__('importlib').util.find_spec('adlfs') is not None", reason="adlfs is installed")
def test_a_missing_backend_is_named_with_its_command() -> None:
    with pytest.raises(UserError, match=r"pip install .*\[azure\]"):
        storage.read_bytes("abfs://container/x")


def test_an_unknown_kind_of_url_is_refused() -> None:
    with pytest.raises(UserError, match="s3://"):
        storage.exists("s4://bucket/x")


def test_a_missing_bucket_is_the_users_matter(s3: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(UserError, match="Does the bucket exist"):
        storage.write_bytes("s3://never-made/x", b"x")
    with pytest.raises(UserError, match="Does the bucket exist"):
        storage.upload_file(tmp_path / "file", "s3://never-made/x")


def test_an_object_store_that_nobody_answers_for_is_down(
    s3: str, monkeypatch: pytest.MonkeyPatch, no_waiting: list[float]
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(object_store, "TRIES_OF_CLIENT", 1)
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(ClusterError, match="run the same command again"):
        storage.exists(f"{s3}/x")
    fsspec.filesystem("s3").clear_instance_cache()


def test_errors_cross_process_borders() -> None:
    error = pickle.loads(pickle.dumps(StorageFullError("full")))
    assert isinstance(error, StorageFullError)
    assert str(error) == "full"


def test_a_full_disk_leaves_the_old_content_and_no_draft(small_disk: Path) -> None:
    storage.write_bytes(small_disk / "x", b"old")
    with pytest.raises(StorageFullError, match="disk is full"):
        storage.write_bytes(small_disk / "x", bytes(8 << 20))
    assert storage.file_sizes(small_disk) == {"x": 3}
    assert storage.read_bytes(small_disk / "x") == b"old"


def test_a_disk_that_fills_up_during_a_download_says_so(small_disk: Path) -> None:
    url = f"memory://{uuid.uuid4().hex}/large"
    storage.write_bytes(url, bytes(8 << 20))
    with pytest.raises(StorageFullError):
        storage.download_file(url, small_disk / "large")
    assert storage.file_sizes(small_disk) == {}


def test_free_bytes_of_a_folder_that_is_not_there_yet(small_disk: Path) -> None:
    assert storage.free_bytes(small_disk / "not" / "yet") == 6 << 20
    assert storage.free_bytes("memory://x") is None


def test_a_file_in_the_way_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RaytuneError, match="Cannot use"):
        storage.write_bytes(tmp_path / "file" / "x", b"")


def test_a_read_only_storage_is_explained(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match=r"Read-only.*Choose a storage folder"):
        storage.write_bytes(small_disk / "x", b"")
