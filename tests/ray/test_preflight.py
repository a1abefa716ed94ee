"""`raytune preflight` on real nodes, one of which is broken on purpose: a mount namespace gives it a storage and a package of its
own."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


def preflight(cluster: Cluster, *arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code, and findings by name."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), "preflight", f"cluster.address={cluster.address}", *arguments, "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout, done.stderr
    return done.returncode, {finding["name"]: finding for finding in json.loads(done.stdout)["checks"]}


def test_two_good_nodes_pass_and_nothing_is_left_behind(cluster: Cluster, tmp_path: Path) -> None:
    code, findings = preflight(cluster, f"storage={tmp_path}/runs")
    assert code == 0, findings
    assert [name for name, finding in findings.items() if finding["status"] == "fail"] == []
    assert findings["storage"]["seen"] == f"{tmp_path}/runs: written and read on 2 nodes, both ways"
    assert findings["versions"]["seen"].startswith("2 nodes: raytune")
    assert findings["clocks"]["status"] == "ok"
    assert "2 workers" in findings["all-reduce"]["seen"]
    assert "GB/s at 32 MiB" in findings["all-reduce"]["seen"]
    assert list(tmp_path.iterdir()) == []
    assert free_cpus(cluster) == 2.0


@pytest.mark.slow
def test_a_network_below_what_was_expected_fails_with_the_share(cluster: Cluster) -> None:
    code, findings = preflight(cluster, "--expect", "100TB")
    assert (code, findings["all-reduce"]["status"]) == (1, "fail")
    assert "of the expected 1e+05 GB/s" in findings["all-reduce"]["seen"]
    assert "NCCL_DEBUG=INFO" in findings["all-reduce"]["fix"]
    assert findings["storage"]["status"] == "warn", "without a config there is no storage to look at"


@pytest.mark.slow
def test_a_node_with_its_own_storage_and_another_version_is_named_and_what_was_there_stays(
    cluster: Cluster, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "mine.txt").write_text("mine")
    with broken_node(cluster, shared, tmp_path) as name:
        code, findings = preflight(cluster, f"storage={shared}", "cluster.workers=3", "cluster.placement=strict_spread")
        assert code == 1
        assert (findings["storage"]["status"], findings["storage"]["seen"]) == (
            "fail",
            f"{shared} on {name} is not the one that the other nodes have",
        )
        assert findings["versions"]["status"] == "fail"
        assert f"peft: 0.0.1 on {name}; " in findings["versions"]["seen"]
        assert name in findings["kernel build locks"]["seen"]
        assert "3 workers" in findings["all-reduce"]["seen"]
        assert "pairs of nodes reach" in findings["slow node"]["seen"] or name in findings["slow node"]["seen"]
    assert [path.name for path in shared.iterdir()] == ["mine.txt"]


@contextmanager
def broken_node(cluster: Cluster, storage: Path, folder: Path) -> Iterator[str]:
    """A node whose `storage` is a disk of its own, whose PEFT says it is another version, and where a kernel build was killed.

    Yields:
        Its name, as preflight calls it.
    """
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("a mount namespace needs root and unshare")
    metadata = Path(str(distribution("peft").locate_file("."))) / f"peft-{distribution('peft').version}.dist-info" / "METADATA"
    fake = folder / "METADATA"
    fake.write_text(metadata.read_text().replace(f"\nVersion: {distribution('peft').version}\n", "\nVersion: 0.0.1\n"))
    lock = folder / "extensions" / "py311_cpu" / "fused_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - 7200,) * 2)
    script = (
        'mount --make-rprivate / && mount -t tmpfs none "$1" && mount --bind "$2" "$3" && '
        'exec "$4" -m ray.scripts.scripts start --address="$5" --num-cpus=1 --block'
    )
    words = [str(storage), str(fake), str(metadata), sys.executable, cluster.address]
    before = set(alive(cluster))
    node = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", script, "sh", *words],
        env=os.environ | {"TORCH_EXTENSIONS_DIR": str(folder / "extensions")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 90
        while not (new := set(alive(cluster)) - before):
            if node.poll() is not None and node.stdout is not None:
                pytest.skip(f"no mount namespace here: {node.stdout.read()[-500:]}")
            assert time.monotonic() < deadline, "the third node did not join"
            time.sleep(1)
        (node_id,) = new
        yield f"{os.uname().nodename}/{node_id[:6]}"
    finally:
        node.terminate()
        node.wait(timeout=60)


def alive(cluster: Cluster) -> list[str]:
    return [node["NodeID"] for node in joined(cluster) if node["Alive"]]


def joined(cluster: Cluster) -> list[dict[str, Any]]:
    ray.init(address=cluster.address, ignore_reinit_error=True, log_to_driver=False)
    try:
        return ray.nodes()
    finally:
        ray.shutdown()


def free_cpus(cluster: Cluster) -> float:
    """CPUs that nobody holds, once the last process has ended."""
    ray.init(address=cluster.address, ignore_reinit_error=True, log_to_driver=False)
    try:
        deadline = time.monotonic() + 30
        while (free := ray.available_resources().get("CPU", 0.0)) < 2.0 and time.monotonic() < deadline:
            time.sleep(0.5)
        return free
    finally:
        ray.shutdown()
