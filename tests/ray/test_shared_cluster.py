"""A cluster that others use too: runs of one name, busy CPUs, and a connection that was there before the run."""

import _thread
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from raytune import train
from raytune.config.sections.cluster import ClusterSection
from raytune.errors import ClusterError, TakenOverError, UserError
from raytune.launch.attempts.lease import Lease, this_process
from raytune.launch.cluster.cluster import connect, map_on_cluster
from raytune.metrics.history import History
from raytune.run_folder import RunFolder
from raytune.storage import write_bytes, write_json

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]


def config(storage: Path, name: str, **sections: Any) -> dict[str, Any]:
    return {
        "name": name,
        "storage": str(storage),
        "data": {"train": {"path": "demo:train", "max_rows": 100}, "max_length": 256},
        "training": {"max_steps": 20, "global_batch_size": 2, "learning_rate": 1e-3},
        "cluster": {"workers": 2},
        **sections,
    }


@pytest.fixture
def connection(one_node: Cluster) -> Iterator[None]:
    """As a notebook has one."""
    ray.init(address=one_node.address, log_to_driver=False)
    yield
    ray.shutdown()


def child_of(pid: int) -> int:
    """The process in which a command works; the one that was started watches over it."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    deadline = time.monotonic() + 60
    while not (found := children.read_text().split()):
        assert time.monotonic() < deadline, "no child"
        time.sleep(0.01)
    return int(found[0])


@pytest.mark.slow  # often without Ray: unit/test_lease.py
def test_of_two_commands_on_one_run_one_trains_and_the_other_is_refused_with_its_name(one_node: Cluster, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(config(tmp_path, "twice", cluster={"workers": 1, "address": one_node.address})))
    command = [sys.executable, "launch.py", "train", str(file)]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    at_work = [child_of(process.pid) for process in both]
    messages = [process.communicate(timeout=300)[1] for process in both]
    winner, loser = (0, 1) if both[0].returncode == 0 else (1, 0)
    assert (both[winner].returncode, both[loser].returncode) == (0, 10), messages
    assert f"is held by process {at_work[winner]} on {os.uname().nodename}" in messages[loser]
    assert History.read(tmp_path / "twice/metrics.jsonl").last_step == 20
    assert json.loads((tmp_path / "twice/run.json").read_text())["attempts"] == 1
    assert not (tmp_path / "twice/lease").exists()


@pytest.mark.slow  # often without Ray: unit/test_warm_workers.py
def test_workers_that_are_kept_warm_are_forked_run_after_run_and_train_alike(one_node: Cluster, tmp_path: Path) -> None:
    def trained(name: str, **cluster: Any) -> list[tuple[int, float]]:
        asked = config(tmp_path, name, cluster={"workers": 2, "address": one_node.address, **cluster})
        train(asked | {"training": asked["training"] | {"max_steps": 3}})
        return History.read(tmp_path / name / "metrics.jsonl").series("train/loss")

    def watched(name: str) -> tuple[list[tuple[int, float]], set[int]]:
        """Losses of a run, and parents of its workers."""
        parents: set[int] = set()
        is_over = threading.Event()

        def watch() -> None:
            while not is_over.wait(0.1):
                workers = {
                    one.pid: one for one in psutil.process_iter(["name"]) if one.info["name"].startswith("ray::RayTrainWo")
                }
                for worker in workers.values():
                    with suppress(psutil.Error):
                        parents.add(worker.ppid())
                parents.difference_update(workers)  # a program that a worker is about to start has its name for a moment

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            return trained(name, keep_warm=600), parents
        finally:
            is_over.set()
            watcher.join()

    (first, parents), (second, same_parents) = watched("first"), watched("second")
    (server,) = parents
    try:
        assert same_parents == parents
        assert "raytune.launch.cluster.fork_server" in " ".join(psutil.Process(server).cmdline())
        assert first == second == trained("as-ever")
    finally:
        os.kill(server, signal.SIGKILL)


def double(number: int) -> int:
    return 2 * number


@pytest.mark.slow
def test_a_wait_for_cpus_that_others_hold_ends_with_what_is_free(connection: None) -> None:
    @ray.remote(num_cpus=2)
    class Other:
        def ready(self) -> bool:
            return True

    other = Other.remote()
    assert ray.get(other.ready.remote())
    with pytest.raises(ClusterError, match=r"for a free CPU .*free in the cluster: 0 of 2 CPUs"):
        list(map_on_cluster(double, [1, 2], start_timeout=2))
    ray.kill(other)
    assert sorted(map_on_cluster(double, [1, 2], start_timeout=60)) == [2, 4]


def test_a_connection_to_another_cluster_than_the_named_one_is_refused(one_node: Cluster, connection: None) -> None:
    with pytest.raises(UserError, match=rf"cluster\.address is 192\.0\.2\.1:6379.*cluster at {one_node.address}"):
        with connect(ClusterSection(address="192.0.2.1:6379")):
            pass
    for address in (one_node.address, "auto", None):
        with connect(ClusterSection(address=address)) as machine:
            assert machine.num_nodes == 1
    assert ray.is_initialized()


def test_ctrl_c_ends_the_run_and_leaves_a_connection_that_was_there_before(connection: None, tmp_path: Path) -> None:
    @ray.remote(num_cpus=0)
    class Other:
        def ready(self) -> bool:
            return True

    other = Other.remote()
    ray.get(other.ready.remote())
    before = ray._private.state.actors().keys()  # of other tests too, also those that have ended

    def interrupt() -> None:
        while History.read(tmp_path / "stopped/metrics.jsonl").last_step < 2:
            time.sleep(0.2)
        _thread.interrupt_main()

    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have what they run in the background ignore it
    threading.Thread(target=interrupt, daemon=True).start()
    endless = config(tmp_path, "stopped", training={"max_steps": 100_000, "global_batch_size": 2, "learning_rate": 1e-3})
    with pytest.raises(KeyboardInterrupt):
        train(endless, progress=False)
    assert json.loads((tmp_path / "stopped/run.json").read_text())["state"] == "interrupted"
    assert ray.get(other.ready.remote()), "other work on the same connection goes on"
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU") != 2 and time.monotonic() < deadline:
        time.sleep(0.5)
    assert ray.available_resources().get("CPU") == 2, "the workers are gone"
    begun = [actor for key, actor in ray._private.state.actors().items() if key not in before]
    ours = {actor["ActorClassName"].rpartition(".")[2] for actor in begun}
    assert ours == {"Controller", "RayTrainWorker"}, "each is a process that takes seconds to start"


def test_a_run_that_was_taken_over_ends_with_the_name_of_its_new_holder_and_leaves_its_files_alone(
    connection: None, tmp_path: Path
) -> None:
    folder = RunFolder(str(tmp_path), "lost")
    other = Lease(number=9, token="another", holder=replace(this_process(), pid=1234567, host="elsewhere"))

    def take_over() -> None:
        while History.read(folder.metrics).last_step < 2:
            time.sleep(0.2)
        write_bytes(f"{folder.leases}/9.json", other.encode())
        write_json(folder.run, json.loads(Path(folder.run).read_text()) | {"attempts": 9})

    threading.Thread(target=take_over, daemon=True).start()
    endless = config(tmp_path, "lost", training={"max_steps": 100_000, "global_batch_size": 2, "learning_rate": 1e-3})
    with pytest.raises(TakenOverError, match=r"Run 'lost' .* taken over by process 1234567 on elsewhere"):
        train(endless, progress=False)
    assert json.loads(Path(folder.run).read_text())["attempts"] == 9
    assert Path(folder.leases, "9.json").read_bytes() == other.encode()
