"""Bases of a hub are downloaded whole, once, from where they stopped, without what could run, and refused in words."""

import errno
import hashlib
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from huggingface_hub import constants

from raytune.data.templates.tokenizers import load_tokenizer
from raytune.errors import EXIT_REFUSED, EXIT_RETRY_LATER, ClusterError, ModelError, RaytuneError
from raytune.hub import cache as hub_cache
from raytune.hub import snapshot as hub_snapshot
from raytune.hub.cache import ADOPT_AFTER_S, beginning_of, cached_snapshot, held, repository
from raytune.hub.client import Patience
from raytune.hub.snapshot import Progress, described, in_lines
from raytune.model.files.files import local_files
from raytune.model.files.hub import download_base
from raytune.model.files.pretrained import load_config
from raytune.plan.model.base_model import model_files, read_model_shape
from tests.hub_stand_in import Refusal, StandIn
from tests.tiny import save_tiny_model

NAME = "owner/tiny"
WEIGHTS = "model.safetensors"
HASTY = Patience(first_wait_s=0.01, longest_wait_s=0.02, total_s=0.5, unreachable_s=0.1)
NEVER_WANTED = {
    "pytorch_model.bin": b"\x80\x04 a pickle",
    "modeling_tiny.py": b"raise SystemExit",
    "consolidated.safetensors": b"the same weights once more",
    "original/params.json": b"{}",
    "README.md": b"# tiny",
    "model.gguf": b"GGUF",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def big(files: dict[str, bytes], size: int = 2_000_000) -> dict[str, bytes]:
    """A model that takes a while: its weights are noise."""
    return files | {WEIGHTS: os.urandom(size)}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_base_is_downloaded_whole_and_loads_and_nothing_else_is(hub: StandIn, tiny: Path) -> None:
    commit = hub.add_folder(NAME, tiny, NEVER_WANTED)
    folder = download_base(NAME, None)
    assert folder.name == commit
    assert contents(folder) == contents(tiny)
    assert model_files(NAME) == model_files(NAME, commit) == str(folder)
    assert local_files(NAME, commit) == folder
    assert load_tokenizer(NAME, commit).get_vocab() == load_tokenizer(str(tiny)).get_vocab()
    asked = len(hub.asked)
    assert download_base(NAME, None) == folder
    assert len(hub.asked) == asked, "what is here is used without a network"


def test_a_plan_needs_kilobytes(hub: StandIn, tiny: Path) -> None:
    commit = hub.add_folder(NAME, tiny, NEVER_WANTED)
    assert described(NAME, "main") == commit
    assert WEIGHTS not in hub.sent
    assert read_model_shape(NAME, commit) == read_model_shape(str(tiny))
    assert local_files(NAME, commit) is None
    assert cached_snapshot(NAME, None) == cached_snapshot(NAME, commit)


def test_what_other_tools_downloaded_is_used_as_it_is(hub: StandIn, tiny: Path) -> None:
    from huggingface_hub import snapshot_download

    commit = hub.add_folder(NAME, tiny)
    snapshot_download(NAME, cache_dir=os.environ["HF_HUB_CACHE"])
    hub.asked.clear()
    assert download_base(NAME, None).name == commit
    assert not hub.asked


def test_other_tools_find_what_was_downloaded(hub: StandIn, tiny: Path) -> None:
    from huggingface_hub import try_to_load_from_cache

    hub.add_folder(NAME, tiny)
    folder = download_base(NAME, None)
    found = try_to_load_from_cache(NAME, WEIGHTS, cache_dir=os.environ["HF_HUB_CACHE"])
    assert found == str(folder / WEIGHTS)
    assert Path(found).resolve().name == hashlib.sha256((tiny / WEIGHTS).read_bytes()).hexdigest()


def test_only_the_config_of_another_tool_is_completed(hub: StandIn, tiny: Path) -> None:
    commit = hub.add_folder(NAME, tiny)
    config = repository(NAME) / "snapshots" / commit / "config.json"
    config.parent.mkdir(parents=True)
    config.write_bytes((tiny / "config.json").read_bytes())
    assert described(NAME, commit) == commit
    assert (config.parent / "tokenizer.json").is_file()


def test_a_branch_stands_for_one_commit_until_the_cache_is_emptied(hub: StandIn, tiny: Path) -> None:
    first = hub.add_folder(NAME, tiny)
    described(NAME, None)
    second = hub.add_folder(NAME, tiny, {"README.md": b"a word more"})
    assert described(NAME, None) == first
    assert described(NAME, second) == second
    assert described(NAME, None) == first


def test_files_that_commits_share_are_downloaded_once(hub: StandIn, tiny: Path) -> None:
    first = hub.add_folder(NAME, tiny)
    download_base(NAME, first)
    second = hub.add_folder(NAME, tiny, {"generation_config.json": b'{"eos_token_id": 1}'})
    hub.sent.clear()
    assert contents(download_base(NAME, second)).keys() == contents(tiny).keys() | {"generation_config.json"}
    assert set(hub.sent) == {"generation_config.json"}


def test_sharded_weights_are_those_of_the_index(hub: StandIn, tiny: Path) -> None:
    files = contents(tiny)
    index = {"metadata": {}, "weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    shards = {"model-1-of-2.safetensors": os.urandom(900), "model-2-of-2.safetensors": os.urandom(800)}
    del files[WEIGHTS]
    hub.add(NAME, files | shards | NEVER_WANTED | {"model.safetensors.index.json": json.dumps(index).encode()})
    assert shards.items() <= contents(download_base(NAME, None)).items()
    assert "consolidated.safetensors" not in hub.sent


def test_equal_files_are_one_download(hub: StandIn, tiny: Path) -> None:
    odd = {f"notes_{number}.json": b"[1, 2]" for number in range(12)} | {"empty.txt": b""}
    hub.add_folder(NAME, tiny, odd)
    assert odd.items() <= contents(download_base(NAME, None)).items()
    assert sum(name.startswith("notes_") for name in hub.sent) == 1


def test_code_comes_only_where_it_was_allowed_for_a_commit(hub: StandIn, tiny: Path) -> None:
    files = contents(tiny)
    config = json.loads(files["config.json"]) | {"auto_map": {"AutoConfig": "modeling_tiny.TinyConfig"}}
    commit = hub.add(NAME, files | NEVER_WANTED | {"config.json": json.dumps(config).encode()})
    assert not list(download_base(NAME, commit).glob("*.py"))
    assert [path.name for path in download_base(NAME, commit, with_code=True).glob("*.py")] == ["modeling_tiny.py"]


def test_code_of_another_model_is_never_run(hub: StandIn, tiny: Path) -> None:
    files = contents(tiny)
    config = json.loads(files["config.json"]) | {"model_type": "odd", "auto_map": {"AutoConfig": "other/code--odd.OddConfig"}}
    commit = hub.add(NAME, files | {"config.json": json.dumps(config).encode()})
    described(NAME, commit, with_code=True)
    with pytest.raises(ModelError, match=r"takes its AutoConfig from another repository \(other/code--odd\.OddConfig"):
        load_config(NAME, commit, trust_remote_code=True)
    assert not [path for _, path, _ in hub.asked if "other/code" in path]


# --- Faults ------------------------------------------------------------------------------------------------------------------


def refusing(part: str, status: int, **headers: str) -> Callable[[StandIn], None]:
    def misbehave(hub: StandIn) -> None:
        hub.keeps_refusing = True
        hub.refusals[part] = [Refusal(status, {key.replace("_", "-"): value for key, value in headers.items()})]

    return misbehave


def without(name: str) -> Callable[[StandIn], None]:
    def misbehave(hub: StandIn) -> None:
        files = dict(next(iter(hub.commits[NAME].values())))
        del files[name]
        hub.add(NAME, files | {key: data for key, data in NEVER_WANTED.items() if not key.startswith("consolidated")})

    return misbehave


@pytest.mark.parametrize(
    ("misbehave", "code", "words"),
    [
        (refusing("config.json", 403, X_Error_Code="GatedRepo"), 2, r"is gated: .*accept its terms.*:\d+/owner/tiny.*no token"),
        (refusing("/api/", 401, X_Error_Code="RepoNotFound"), 2, r"does not show .*not exist, or is private.*HF_TOKEN.*no token"),
        (refusing("/api/", 401), 2, r"does not exist, or is private"),
        (refusing("/api/", 404, X_Error_Code="RepoNotFound"), 2, r"neither a folder on .* nor a model on http"),
        (refusing("/api/", 404, X_Error_Code="RevisionNotFound"), 2, r"no such branch, tag or commit.*model\.revision"),
        (refusing("config.json", 403, X_Error_Message="Access to this resource is disabled."), 2, r"HTTP 403: Access to this"),
        (refusing(WEIGHTS, 404, X_Error_Code="EntryNotFound"), 2, r"does not have"),
        (refusing("/api/", 429), 10, r"too many requests \(HTTP 429\), again and again.*the same command goes on.*logged in"),
        (refusing("/resolve/", 503), 10, r"fault of its own \(HTTP 503\).*What has arrived is kept"),
        (refusing("/api/", 200), 10, r"cannot be reached \(an answer that is no JSON .*login page"),
        (without("config.json"), 2, r"holds no config\.json on the hub"),
        (without(WEIGHTS), 2, r"tiny must hold weights .*model\.bin, which are pickles.*from_pretrained\('owner/tiny'"),
    ],
)  # fmt: skip
def test_a_refusal_says_what_and_what_to_do(
    misbehave: Callable[[StandIn], None], code: int, words: str, hub: StandIn, tiny: Path
) -> None:
    hub.add_folder(NAME, tiny)
    misbehave(hub)
    with pytest.raises(RaytuneError, match=f"(?s){words}") as raised:
        download_base(NAME, None, patience=HASTY)
    assert raised.value.exit_code == code
    assert "Traceback" not in str(raised.value)


def test_a_hub_that_is_not_there_is_told_in_time(monkeypatch: pytest.MonkeyPatch, hub: StandIn, tiny: Path) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ClusterError, match=r"127\.0\.0\.1:9 .*cannot be reached.*HF_ENDPOINT.*HF_HUB_OFFLINE=1") as raised:
        described(NAME, None, patience=HASTY)
    assert raised.value.exit_code == EXIT_RETRY_LATER


def test_offline_means_from_the_cache_or_a_word(monkeypatch: pytest.MonkeyPatch, hub: StandIn, tiny: Path) -> None:
    hub.add_folder(NAME, tiny)
    described(NAME, None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.asked.clear()
    assert described(NAME, None)
    for ask in (lambda: download_base(NAME, None), lambda: described("owner/other", "v1")):
        with pytest.raises(ModelError, match=r"HF_HUB_OFFLINE is set.*hf download owner/") as raised:
            ask()
        assert raised.value.exit_code == EXIT_REFUSED
    assert not hub.asked


def test_an_endpoint_that_is_no_address_is_named(monkeypatch: pytest.MonkeyPatch, hub: StandIn) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "hub.example.org")
    with pytest.raises(ModelError, match=r"HF_ENDPOINT is hub\.example\.org, which is no address"):
        described(NAME, None)


def test_a_name_that_no_hub_has_is_refused_without_asking(hub: StandIn) -> None:
    with pytest.raises(ModelError, match=r"'my model' is neither a folder on .* nor an id"):
        described("my model", None)
    assert not hub.asked


def test_the_login_is_sent_to_the_hub_and_to_nobody_else(monkeypatch: pytest.MonkeyPatch, hub: StandIn, tiny: Path) -> None:
    hub.add_folder(NAME, tiny)
    hub.needed_token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ModelError, match=r"refuses the token of .*HTTP 401: Invalid credentials") as raised:
        described(NAME, None, patience=HASTY)
    assert "hf_wrong" not in str(raised.value)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    download_base(NAME, None)
    assert any(part == "cdn" for part, _, _ in hub.asked)
    assert not hub.tokens_at_cdn
    stored = b"".join(path.read_bytes() for path in repository(NAME).rglob("*") if path.is_file())
    assert b"hf_secret" not in stored


def test_too_many_requests_are_waited_for_as_long_as_the_hub_says(
    hub: StandIn, tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.add_folder(NAME, tiny)
    hub.refusals["/revision/"] = [Refusal(429, {"Retry-After": "1"})]
    hub.refusals["/tree/"] = [Refusal(429, {"RateLimit": '"api";r=0;t=1'})]
    began = time.monotonic()
    download_base(NAME, None, patience=Patience(first_wait_s=0.01))
    assert 2.0 <= time.monotonic() - began < 8.0
    assert "too many requests (HTTP 429); trying again in 1" in caplog.text


def test_a_cut_connection_goes_on_where_it_was_cut(hub: StandIn, tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = big(contents(tiny))
    hub.add(NAME, files)
    hub.cut_after, hub.num_cuts = 1_000_000, 1
    folder = download_base(NAME, None, patience=HASTY)
    assert (folder / WEIGHTS).read_bytes() == files[WEIGHTS]
    assert hub.sent[WEIGHTS] == len(files[WEIGHTS])
    assert "trying again in" in caplog.text


def test_connections_that_are_always_cut_advance_to_the_end(hub: StandIn, tiny: Path) -> None:
    files = big(contents(tiny))
    hub.add(NAME, files)
    hub.cut_after, hub.num_cuts = 50_000, 1000
    folder = download_base(NAME, None, patience=Patience(first_wait_s=0.001, longest_wait_s=0.001, total_s=0.3))
    assert (folder / WEIGHTS).read_bytes() == files[WEIGHTS]


def test_a_host_that_sends_the_whole_file_again_is_obeyed(hub: StandIn, tiny: Path) -> None:
    files = big(contents(tiny))
    hub.add(NAME, files)
    hub.cut_after, hub.num_cuts, hub.ignores_ranges = 1_000_000, 1, True
    assert (download_base(NAME, None, patience=HASTY) / WEIGHTS).read_bytes() == files[WEIGHTS]


def test_a_damaged_file_is_downloaded_again_and_refused_the_second_time(hub: StandIn, tiny: Path) -> None:
    files = big(contents(tiny))
    hub.add(NAME, files)
    described(NAME, None)
    hub.damages = 1
    assert (download_base(NAME, None) / WEIGHTS).read_bytes() == files[WEIGHTS]
    other = hub.add(NAME, big(files))
    described(NAME, other)
    hub.damages = 2
    with pytest.raises(ClusterError, match=rf"{WEIGHTS} of .* arrived twice with another content"):
        download_base(NAME, other)
    assert not list((repository(NAME) / "snapshots" / other).glob(WEIGHTS))


def test_a_file_larger_than_one_answer_comes_in_pieces(monkeypatch: pytest.MonkeyPatch, hub: StandIn, tiny: Path) -> None:
    monkeypatch.setattr("raytune.hub.client.LARGEST_PIECE", 700_000)
    files = big(contents(tiny))
    hub.add(NAME, files)
    assert (download_base(NAME, None) / WEIGHTS).read_bytes() == files[WEIGHTS]
    assert [asked for part, _, asked in hub.asked if part == "cdn"] == [
        "bytes=0-699999",
        "bytes=700000-1399999",
        "bytes=1400000-1999999",
    ]


def test_no_room_is_said_before_a_byte_of_weights_is_asked_for(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, hub: StandIn, tiny: Path
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(small_disk / "cache"))
    monkeypatch.setattr(hub_snapshot, "SPARE_BYTES", 0)
    hub.add(NAME, big(contents(tiny), 20_000_000))
    with pytest.raises(ModelError, match=r"has 5\.\d+ MiB free, and .*needs 19\.1 MiB more there.*HF_HUB_CACHE"):
        download_base(NAME, None)
    assert WEIGHTS not in hub.sent


def test_a_disk_that_another_program_fills_is_named(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, hub: StandIn, tiny: Path
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(small_disk / "cache"))
    monkeypatch.setattr(hub_snapshot, "SPARE_BYTES", 0)
    hub.add(NAME, big(contents(tiny), 4_000_000))
    hub.bytes_per_s = 2e6

    def fill() -> None:
        while not hub.sent[WEIGHTS]:
            time.sleep(0.01)
        with suppress(OSError), (small_disk / "other").open("wb", buffering=0) as other:
            while True:
                other.write(bytes(1 << 16))

    threading.Thread(target=fill, daemon=True).start()
    with pytest.raises(ModelError, match=r"is full, and .* needs"):
        download_base(NAME, None)


def test_a_lock_that_the_file_system_has_not_leaves_no_file_open(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))

    own = tempfile.gettempdir() + "/raytune-"

    def without_locks(descriptor: int, how: int) -> None:
        if not os.readlink(f"/proc/self/fd/{descriptor}").startswith(own):
            raise OSError(errno.ENOLCK, "No locks available")

    def open_locks() -> list[str]:
        """Files of these places alone: threads of other tests open and close theirs meanwhile."""
        links = []
        for descriptor in os.listdir("/proc/self/fd"):
            with suppress(FileNotFoundError):
                links.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        return [link for link in links if link.startswith((str(tmp_path), own))]

    monkeypatch.setattr("fcntl.flock", without_locks)
    with held(NAME, lambda: None):
        assert len(open_locks()) == 1
    assert not open_locks()


def test_a_cache_that_cannot_be_made_is_named(monkeypatch: pytest.MonkeyPatch, hub: StandIn, tiny: Path, tmp_path: Path) -> None:
    hub.add_folder(NAME, tiny)
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match=r"cannot be put into the Hugging Face cache .*Set HF_HUB_CACHE"):
        described(NAME, None)


def test_names_of_files_cannot_leave_the_model(hub: StandIn, tiny: Path, tmp_path: Path) -> None:
    outside = dict.fromkeys(("../../../evil.json", "additional_chat_templates/../../x.jinja", "/etc/x.py", "a/../../x.py"), b"{}")
    commit = hub.add_folder(NAME, tiny, outside | {"\x1b[31m.json": b"{}", "code/inner.py": b""})
    folder = download_base(NAME, commit, with_code=True)
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {
        *contents(tiny),
        "code/inner.py",
    }
    config = json.loads((tiny / "config.json").read_text()) | {"transformers_weights": "../../../evil.safetensors"}
    other = hub.add_folder(NAME, tiny, {"config.json": json.dumps(config).encode(), "../../../evil.safetensors": b"x"})
    with pytest.raises(ModelError, match=r"must (hold weights|name a file beside it)"):
        download_base(NAME, other)
    assert not list(tmp_path.rglob("evil*"))


# --- Several at once, and again ----------------------------------------------------------------------------------------------


def _download(endpoint: str, started: float) -> str:
    constants.ENDPOINT, constants.HF_HUB_OFFLINE = endpoint, False
    time.sleep(max(0.0, started - time.time()))
    return str(download_base(NAME, None))


def test_processes_that_ask_at_once_share_one_download(hub: StandIn, tiny: Path) -> None:
    files = big(contents(tiny))
    hub.add(NAME, files)
    hub.bytes_per_s = 4e6
    with multiprocessing.get_context("fork").Pool(4) as pool:
        folders = set(pool.starmap(_download, [(hub.url, time.time() + 0.2)] * 4))
    assert len(folders) == 1
    assert (Path(folders.pop()) / WEIGHTS).read_bytes() == files[WEIGHTS]
    assert hub.sent[WEIGHTS] == len(files[WEIGHTS])


def _download_on_node(endpoint: str, node: str) -> str:
    """As on a node whose shared file system takes every lock for granted."""
    hub_cache._lock = lambda descriptor: True
    real = os.uname()
    os.uname = lambda: os.uname_result((real.sysname, node, *real[2:]))
    return _download(endpoint, 0.0)


def test_where_locks_do_nothing_nothing_is_damaged(hub: StandIn, tiny: Path) -> None:
    files = big(contents(tiny))
    hub.add(NAME, files)
    hub.bytes_per_s = 4e6
    with multiprocessing.get_context("fork").Pool(2) as pool:
        folders = set(pool.starmap(_download_on_node, [(hub.url, "node-a"), (hub.url, "node-b")]))
    assert (Path(folders.pop()) / WEIGHTS).read_bytes() == files[WEIGHTS]
    assert not folders
    assert not list(repository(NAME).rglob("*.raytune"))


def test_who_waits_says_so_and_a_dead_holder_is_none(hub: StandIn, tmp_path: Path) -> None:
    code = "import time; from raytune.hub.cache import held\n"
    code += "with held('owner/tiny', print):\n print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"
    waited: list[str] = []

    def waiting() -> None:
        waited.append("waited")
        holder.kill()

    with held(NAME, waiting):
        pass
    holder.wait()
    assert waited


def test_what_a_killed_download_left_is_not_asked_for_again(hub: StandIn, tiny: Path, tmp_path: Path) -> None:
    files = big(contents(tiny), 3_000_000)
    hub.add(NAME, files)
    hub.bytes_per_s = 1e6
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", f"from raytune.model.files.hub import download_base; download_base({NAME!r}, None)"]
    process = subprocess.Popen(command, env=environment)
    digest = hashlib.sha256(files[WEIGHTS]).hexdigest()
    beginning = beginning_of(NAME, digest)
    while not (beginning.exists() and beginning.stat().st_size > 1_000_000):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    kept = beginning.stat().st_size
    assert cached_snapshot(NAME, None)
    assert local_files(NAME, None) is None
    hub.asked.clear()
    hub.bytes_per_s = None
    assert (download_base(NAME, None) / WEIGHTS).read_bytes() == files[WEIGHTS]
    assert [(path, asked) for part, path, asked in hub.asked if part == "cdn"] == [(f"/{digest}", f"bytes={kept}-2999999")]
    assert [path.rpartition("/")[2] for part, path, _ in hub.asked if "/resolve/" in path] == [WEIGHTS]


def test_a_beginning_of_a_node_that_is_gone_is_taken_over(hub: StandIn, tiny: Path) -> None:
    files = big(contents(tiny))
    hub.add(NAME, files)
    described(NAME, None)
    digest = hashlib.sha256(files[WEIGHTS]).hexdigest()
    other = repository(NAME) / "blobs" / f"{digest}.pod-1.raytune"
    other.write_bytes(files[WEIGHTS][:500_000])
    assert not beginning_of(NAME, digest).exists(), "pod-1 may still be at it"
    os.utime(other, (0, time.time() - ADOPT_AFTER_S - 1))
    assert (download_base(NAME, None) / WEIGHTS).read_bytes() == files[WEIGHTS]
    assert hub.sent[WEIGHTS] == len(files[WEIGHTS]) - 500_000


def test_progress_says_size_rate_and_which_file(hub: StandIn, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_snapshot, "REPORT_EVERY_S", 0.05)
    hub.add(NAME, big(contents(tiny)))
    described(NAME, None)
    hub.bytes_per_s = 4e6
    told: list[Progress] = []
    download_base(NAME, None, report=told.append)
    assert len(told) > 3
    assert [one.done_bytes for one in told] == sorted(one.done_bytes for one in told)
    assert told[-1].done_bytes == told[-1].total_bytes == 2_000_000
    halfway = Progress(base=NAME, node="n", done_bytes=1 << 30, total_bytes=3 << 30, num_done=1, num_files=3, bytes_per_s=1 << 29)
    assert halfway.text == "owner/tiny: 1 GiB of 3 GiB, file 2 of 3, 512 MiB/s, 4.0s left"
    lines: list[str] = []
    report = in_lines(lines.append, every_s=0.05)
    for _ in range(10):
        report(halfway)
        time.sleep(0.02)
    assert 2 <= len(lines) <= 4


def test_a_hub_that_fails_is_no_matter_where_the_model_is_here(
    hub: StandIn, tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    commit = hub.add_folder(NAME, tiny)
    config = repository(NAME) / "snapshots" / commit / "config.json"
    config.parent.mkdir(parents=True)
    config.write_bytes((tiny / "config.json").read_bytes())
    refusing("/api/", 503)(hub)
    with caplog.at_level(logging.WARNING):
        assert described(NAME, commit, patience=HASTY) == commit
    assert f"using {NAME} as it is in the cache (commit {commit})" in caplog.text
