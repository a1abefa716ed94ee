"""What is lost under a run has a name: a rank that hangs, a node, the cluster's head, and NCCL where GPU workers lack it.
Real processes, ended by their pid."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import torch.distributed as dist
from ray.cluster_utils import Cluster

from raytune import train
from raytune.launch.attempts.attempts import NODE_LOST, WORKER_DIED, Failure
from raytune.launch.attempts.causes import first_failure
from raytune.launch.attempts.places import Place, write_places
from raytune.launch.cluster import cluster as launch_cluster
from raytune.launch.run import RunFailedError
from raytune.metrics.events import read_events
from raytune.metrics.history import History
from raytune.run_folder import RunFolder
from raytune.storage import write_json
from tests.ray.conftest import Kept, forking
from tests.ray.forking import forking_environment

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
SMALL = {
    "data": {"train": {"path": "demo:train", "max_rows": 100}, "max_length": 256},
    "training": {
        "max_steps": 5000,
        "global_batch_size": 2,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "logging_steps": 1,
        "zero": {"stage": 0},
    },
}


def config(cluster: Cluster, storage: Path, name: str, **of_cluster: Any) -> dict[str, Any]:
    return {"name": name, "storage": str(storage), **SMALL, "cluster": {"address": cluster.address, "workers": 2, **of_cluster}}


@pytest.fixture(scope="module")
def cluster(kept: Kept) -> Iterator[Cluster]:
    """That of other files, which come before this one: nodes of it are lost."""
    yield kept.of([1, 1])
    kept.end()


@pytest.fixture
def quick_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that does not answer is looked at after seconds instead of a minute, and the process group of the others has not to
    end in order."""
    monkeypatch.setattr(launch_cluster, "SILENCE_S", 3.0)
    monkeypatch.setattr(launch_cluster, "GROUP_END_S", 1.0)


def when_it_steps(metrics: Path, act: Callable[[], None]) -> threading.Thread:
    """Do something in a thread, as soon as a run has made some steps."""

    def wait() -> None:
        deadline = time.monotonic() + 200
        while History.read(metrics).last_step < 3 and time.monotonic() < deadline:
            time.sleep(0.1)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def causes(run: Path) -> list[str]:
    return [event["cause"] for event in read_events(run / "events.jsonl") if event["event"] == "attempt_failed"]


def places(run: Path) -> dict[str, dict[str, Any]]:
    return json.loads((run / "places" / "attempt-1.json").read_text())


def test_a_rank_that_hangs_is_named_with_the_step_in_which_the_others_wait_for_it(
    cluster: Cluster, tmp_path: Path, quick_silence: None
) -> None:
    run = tmp_path / "hung"
    when_it_steps(run / "metrics.jsonl", lambda: os.kill(places(run)["1"]["pid"], signal.SIGSTOP))
    with pytest.raises(RunFailedError, match=r"WorkerHung: rank 1 hung") as caught:
        train(config(cluster, tmp_path, "hung", max_failures=0), progress=False)
    assert caught.value.exit_code == 10
    last = str(caught.value).splitlines()[-1]
    assert re.search(r"rank 0 waits for the others (in|after) step \d+ \(", last)
    assert last.endswith(causes(run)[0])


def test_a_lost_node_is_named_with_its_rank_and_so_is_what_its_place_is_waited_for(
    cluster: Cluster, tmp_path: Path, quick_silence: None
) -> None:
    run = tmp_path / "node"
    other = next(node for node in cluster.list_all_nodes() if not node.head)

    def lose() -> None:
        os.kill(other.all_processes["raylet"][0].process.pid, signal.SIGKILL)

    when_it_steps(run / "metrics.jsonl", lose)
    with pytest.raises(RunFailedError) as caught:
        train(config(cluster, tmp_path, "node", placement="strict_spread", start_timeout="10s"), progress=False)
    assert caught.value.exit_code == 10
    rank = next(rank for rank, place in places(run).items() if place["node_id"] == other.node_id)
    lost, no_room = causes(run)
    assert lost.endswith(f"Ray node {other.node_id[:12]}) was lost, with rank {rank}")
    assert no_room.startswith("NoRoom: the workers found no place within cluster.start_timeout; free in the cluster:")
    last = str(caught.value).splitlines()[-1]
    assert no_room in last
    assert lost in last


@pytest.mark.slow
def test_a_survivor_that_tells_before_ray_does_is_not_taken_for_the_cause(cluster: Cluster, tmp_path: Path) -> None:
    """How an attempt looks whose rank was lost a moment ago: a broken connection, or a process group that Ray has taken away, and
    a rank that says nothing."""
    folder = RunFolder(str(tmp_path), "told")

    def told(kind: str, message: str) -> Failure:
        record = {"rank": 0, "node": "h", "kind": kind, "message": message, "traceback": message, "time": 0.0}
        write_json(folder.failure(1, 0), record)
        return first_failure(folder, 1, RuntimeError("training failed"))

    with pytest.raises(ValueError, match="process group") as taken_away:
        dist.all_reduce(torch.zeros(1))
    broken = "[pair.cc:537] Read error [192.0.2.9]:1: Connection reset by peer"
    here, other = cluster.head_node, cluster.add_node(num_cpus=1)
    assert here is not None
    places = enumerate((here, other))
    write_places(folder, 1, {rank: Place(host="h", address="192.0.2.9", node_id=at.node_id, pid=1) for rank, at in places})
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        processes_lost = [told("ValueError", str(taken_away.value)), told("RuntimeError", broken)]
        os.kill(other.all_processes["raylet"][0].process.pid, signal.SIGKILL)
        node_lost = told("RuntimeError", broken)
    finally:
        ray.shutdown()
    for process_lost in processes_lost:
        assert (process_lost.rank, process_lost.kind, process_lost.collateral) == (1, WORKER_DIED, (0,))
        assert process_lost.message == "rank 1 ended without a word"
    assert (node_lost.rank, node_lost.kind, node_lost.collateral) == (1, NODE_LOST, (0,))
    assert node_lost.message.endswith("was lost, with rank 1")


@pytest.mark.slow
def test_workers_whose_process_group_fails_leave_their_gpus_to_the_next_attempt(cluster: Cluster, tmp_path: Path) -> None:
    """These GPUs are counted and not there, so NCCL is not either."""
    with forking():
        cluster.add_node(num_cpus=2, num_gpus=2)
    settings = config(cluster, tmp_path, "nccl", gpus_per_worker=1, start_timeout="60s")
    settings["training"] = SMALL["training"] | {"precision": "fp32"}
    with pytest.raises(RunFailedError, match="NCCL") as caught:
        train(settings, progress=False)
    events = read_events(tmp_path / "nccl" / "events.jsonl")
    assert [event["event"] for event in events] == ["attempt_started", "attempt_failed"] * 2
    assert events[3]["time"] - events[2]["time"] < 50, "the second attempt waited for the GPUs of the first"
    assert "Tracebacks" not in str(caught.value), "no worker has left one"
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        deadline = time.monotonic() + 20
        while ray.available_resources().get("GPU") != 2.0 and time.monotonic() < deadline:
            time.sleep(0.5)
        assert ray.available_resources().get("GPU") == 2.0
    finally:
        ray.shutdown()


@pytest.fixture
def ray_tmp() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="rl", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "lost"),
    [
        ("gcs_server", "the head of the Ray cluster inside this machine was lost: its GCS has ended"),
        ("raylet/raylet", "was lost: its raylet has ended, and with it the driver"),
    ],
)
def test_a_driver_whose_cluster_is_lost_says_so_and_leaves_an_event(
    program: str, lost: str, tmp_path: Path, ray_tmp: str
) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"name": "lost", "storage": str(tmp_path), **SMALL, "cluster": {"workers": 2}}))
    environment = forking_environment(os.environ | {"RAY_TMPDIR": ray_tmp, "RAY_AUTH_MODE": "disabled"})
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "launch.py", "train", str(file)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        when_it_steps(tmp_path / "lost" / "metrics.jsonl", lambda: os.kill(pid_of(program, ray_tmp), signal.SIGKILL))
        _, messages = process.communicate(timeout=350)
    finally:
        process.kill()
    assert process.returncode == 10, messages
    last = messages.strip().splitlines()[-1]
    assert lost in last
    assert "ranks 0, 1 on node" in last or "with ranks 0, 1" in last
    assert causes(tmp_path / "lost")[-1] in last
    assert json.loads((tmp_path / "lost" / "run.json").read_text())["state"] == "failed"
    assert not (tmp_path / "lost" / "lease").exists(), "another machine need not wait"


def pid_of(program: str, ray_tmp: str) -> int:
    """Of the daemon of the cluster whose files lie in a folder."""
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().decode().split("\0") if entry.name.isdigit() else [""]
        except OSError:
            continue
        if words[0].endswith(program) and any(ray_tmp in word for word in words):
            return int(entry.name)
    raise AssertionError(f"no {program} runs in {ray_tmp}")
