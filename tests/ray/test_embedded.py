"""The cluster inside this machine: nobody else can reach it, and no credential of the user's leaves the place where it lies."""

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from raytune.launch.cluster.gpu_drivers import may_have_gpus

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
CANARY = "CANARY0b7e1f0c2d9A8"
RUN = """
name: private
data: {train: {path: "demo:train", max_rows: 16}, validation: {path: "demo:validation", max_rows: 4}, max_length: 512}
training: {max_steps: 10, warmup_steps: 0, global_batch_size: 2}
cluster: {workers: 2, keep_warm: 1m}
"""


@dataclass(frozen=True)
class Seen:
    exit_code: int
    output: str
    listeners: set[tuple[str, str]]
    """Process and address of every port that was open at some time."""
    parents: dict[str, set[str]]
    """Command lines of the parents of every kind of process, by the process's name, as far as Linux always has it."""
    home: Path
    storage: Path
    session: Path


@pytest.fixture(scope="module")
def seen() -> Iterator[Seen]:
    """A run of two workers in a home full of credentials, watched while it goes on."""
    folder = Path(tempfile.mkdtemp(prefix="re", dir="/tmp"))
    home, work, storage, session = (folder / name for name in ("home", "work", "runs", "ray"))
    credentials = {
        ".ray/auth_token": CANARY * 2,
        ".cache/huggingface/token": f"hf_{CANARY}",
        ".aws/credentials": f"aws_secret_access_key = {CANARY}",
        ".netrc": f"machine api.wandb.ai login user password {CANARY}",
    }
    for file, text in credentials.items():
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        (home / file).write_text(text)
        (home / file).chmod(0o644)
    for path in (work, session):
        path.mkdir()
    (work / ".env").write_text(f"HF_TOKEN=hf_{CANARY}")
    (work / "run.yaml").write_text(RUN)
    secrets = dict.fromkeys(("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AZURE_STORAGE_KEY"), f"hf_{CANARY}")
    environment = os.environ | secrets | {"HOME": str(home), "RAY_TMPDIR": str(session), "PYTHONPATH": str(ROOT)}
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "HF_HOME", "XDG_CACHE_HOME"):
        environment.pop(name, None)
    command = [sys.executable, str(ROOT / "launch.py"), "train", "run.yaml", f"storage={storage}"]
    process = subprocess.Popen(
        command, cwd=work, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True
    )
    listeners: set[tuple[str, str]] = set()
    parents: dict[str, set[str]] = {}
    try:
        deadline = time.monotonic() + 500
        while process.poll() is None and time.monotonic() < deadline:
            running = processes_of(process.pid)
            listeners |= open_ports(running)
            note_parents(running, parents)
            time.sleep(0.4)  # one look at all processes and ports is 50 ms of work
        output, _ = process.communicate(timeout=30)
        yield Seen(process.returncode, output, listeners, parents, home, storage, session)
    finally:
        process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def open_ports(running: list[psutil.Process]) -> set[tuple[str, str]]:
    listening = [port for port in psutil.net_connections(kind="tcp") if port.status == psutil.CONN_LISTEN]
    found: set[tuple[str, str]] = set()
    for process in running:
        with suppress(psutil.Error):  # it has just ended
            found |= {(process.name(), port.laddr.ip) for port in listening if port.pid == process.pid}
    return found


def note_parents(running: list[psutil.Process], parents: dict[str, set[str]]) -> None:
    for process in running:
        with suppress(psutil.Error):
            parents.setdefault(process.name()[:15], set()).add(" ".join(psutil.Process(process.ppid()).cmdline()))


def processes_of(pid: int) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return [root := psutil.Process(pid), *root.children(recursive=True)]
    return []


@pytest.mark.skipif(may_have_gpus(), reason="what libraries ask a GPU's driver while they are loaded forbids it")
def test_workers_are_forked_from_one_process_that_goes_with_the_run(seen: Seen) -> None:
    assert seen.exit_code == 0, seen.output
    (server,) = seen.parents["ray::RayTrainWorker"[:15]]
    assert "raytune.launch.cluster.fork_server" in server
    assert any("raytune.launch.cluster.fork_server" in parent for parent in seen.parents["ray::Controller.run"[:15]])
    assert not list(seen.session.glob("raytune-*")), "its folder"


def test_that_nothing_of_a_cluster_inside_this_machine_stays_is_said(seen: Seen) -> None:
    assert "cluster.keep_warm has no effect: the cluster inside this machine ends with the command" in seen.output


def test_every_port_of_an_embedded_cluster_and_its_workers_is_on_loopback(seen: Seen) -> None:
    assert seen.exit_code == 0, seen.output
    assert {name for name, _ in seen.listeners} >= {"gcs_server", "raylet"}, "this is how they are found"
    assert any(name.startswith("ray::RayTrainWo") for name, _ in seen.listeners)
    assert [port for port in seen.listeners if port[1].removeprefix("::ffff:") not in ("127.0.0.1", "::1")] == []


def test_an_existing_token_is_closed_to_others(seen: Seen) -> None:
    assert stat.S_IMODE((seen.home / ".ray" / "auth_token").stat().st_mode) == 0o600


def test_no_credential_reaches_the_run_folder_the_session_of_ray_or_the_output(seen: Seen) -> None:
    assert CANARY not in seen.output
    files = [path for folder in (seen.storage, seen.session) for path in folder.rglob("*") if path.is_file()]
    assert any(path.name == "metrics.jsonl" for path in files)
    assert any("session_" in str(path) and path.suffix in (".log", ".out") for path in files)
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []


@pytest.mark.slow  # often by the README's command: examples/test_readme.py
def test_rows_are_scored_by_the_workers_of_a_cluster_of_their_own(seen: Seen) -> None:
    """Both commands of a user in one: the run was trained by two workers, and so are its rows scored."""
    environment = os.environ | {"RAY_TMPDIR": str(seen.session), "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    table = seen.storage / "scores.csv"
    command = ["score", f"{seen.storage}/private", "demo:test", "--max-rows", "5", "--output", str(table), "--json"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), *command],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=500,
    )
    facts = json.loads(done.stdout)
    assert (facts["num_rows"], facts["num_lost"], facts["weights"]) == (5, 0, "the final model")
    rows = table.read_text().splitlines()
    assert rows[0] == "file,row,targets,loss,perplexity"
    assert [row.split(",")[:2] for row in rows[1:]] == [["demo:test", str(number)] for number in range(1, 6)]
    assert not list((seen.storage / "private" / "scores").glob("*.unfinished")), "what workers leave goes again"
