"""The whole way on three hosts: render, `ray up` over ssh, `ray job submit`, train on both workers, results, `ray down`."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from raytune.launch.state.result import RunResult
from raytune.run_folder import RunFolder
from tests.cluster.hosts import Host, hosts, missing

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Cluster:
    hosts: list[Host]
    folder: Path
    file: Path
    environment: dict[str, str]

    def ray(self, *words: str) -> subprocess.CompletedProcess[str]:
        """One of Ray's own commands, from outside the cluster."""
        command = [sys.executable, "-m", "ray.scripts.scripts", *words]
        return subprocess.run(command, capture_output=True, text=True, env=self.environment, cwd=self.folder, check=False)

    def raytune(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "launch.py"), *words]
        return subprocess.run(command, capture_output=True, text=True, env=self.environment, cwd=self.folder, check=False)

    def ray_processes(self, host: Host) -> list[str]:
        lines = host.run("ps", "-eo", "args").stdout.splitlines()
        return [line for line in lines if "raylet/raylet" in line or "gcs_server" in line]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    reason = missing()
    if reason:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="rt", dir="/tmp"))
    token = folder / "auth_token"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "PYTHONPATH": str(ROOT)}
    with hosts(3, folder) as (machines, key):
        config = {
            "name": "three-hosts",
            "storage": str(folder / "shared" / "runs"),
            "cluster": {"instance": "dgx-h100", "nodes": 2},
            "provider": {
                "hosts": [host.address for host in machines],
                "ssh_user": "root",
                "ssh_key": str(key),
                "environment": sys.prefix,
                "mount_point": str(folder / "shared"),
                "token_file": str(token),
            },
        }
        (folder / "run.yaml").write_text(json.dumps(config))
        cluster = Cluster(machines, folder, folder / "cluster.yaml", environment)
        rendered = cluster.raytune("cluster", "render", str(folder / "run.yaml"), "--output", str(cluster.file))
        assert rendered.returncode == 0, rendered.stderr
        started = cluster.raytune("cluster", "up", str(cluster.file))
        assert started.returncode == 0, started.stdout + started.stderr
        yield cluster
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def address(cluster: Cluster) -> str:
    """The head's dashboard, when both workers have joined."""
    head = cluster.hosts[0]
    environment = [f"{name}={value}" for name, value in cluster.environment.items() if name.startswith("RAY_AUTH")]
    count = "import ray; ray.init('auto', logging_level='ERROR'); print(sum(node['Alive'] for node in ray.nodes()))"
    wait = f'for i in $(seq 60); do n=$({sys.executable} -c "{count}"); [ "$n" = 3 ] && exit 0; sleep 2; done; exit 1'
    done = head.run("env", *environment, f"HOME={Path.home()}", "bash", "-c", wait)
    assert done.returncode == 0, done.stderr + head.run("bash", "-c", "tail -50 /tmp/ray/session_latest/logs/monitor*").stdout
    return f"http://{head.address}:8265"


def test_the_cluster_has_a_head_without_work_and_every_worker_on_its_own_host(cluster: Cluster, address: str) -> None:
    listed = cluster.ray("list", "nodes", "--address", address, "--format", "json")
    assert listed.returncode == 0, listed.stderr
    nodes = {node["node_ip"]: node for node in json.loads(listed.stdout[listed.stdout.index("[") :])}
    assert set(nodes) == {host.address for host in cluster.hosts}
    head = nodes[cluster.hosts[0].address]
    assert head["is_head_node"]
    assert "CPU" not in head["resources_total"]


def test_a_caller_without_the_token_is_turned_away(cluster: Cluster, address: str) -> None:
    with pytest.raises(HTTPError) as refused:
        urlopen(f"{address}/api/jobs/", timeout=10)
    assert refused.value.code == 401
    listed = cluster.ray("job", "list", "--address", address)
    assert listed.returncode == 0, listed.stderr


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_submitted_job_trains_on_both_workers_and_leaves_its_model_on_shared_storage(
    cluster: Cluster, address: str, method: str, tmp_path: Path
) -> None:
    code = tmp_path / "code"
    code.mkdir()
    shutil.copytree(ROOT / "raytune", code / "raytune", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", code / "configs")
    shutil.copy(ROOT / "launch.py", code)
    storage = cluster.folder / "shared" / "runs"
    settings = [f"name={method}", f"storage={storage}", f"adapter.method={method}", "cluster.placement=strict_spread"]
    settings += [
        "training.max_steps=6",
        "training.warmup_steps=1",
        "evaluation.every_steps=6",
        "evaluation.generation.max_rows=4",
    ]
    submitted = ["job", "submit", "--address", address, "--working-dir", str(code), "--entrypoint-num-cpus", "0.5", "--"]
    job = cluster.ray(*submitted, "python", "launch.py", "train", "configs/recipes/quickstart.yaml", *settings)
    assert job.returncode == 0, job.stdout[-6000:] + job.stderr[-3000:]
    result = RunResult.read(RunFolder(str(storage), method))
    assert result.plan.engine.zero_stage == 3
    assert len(result.held_bytes) == 2
    assert (Path(result.model_path) / ("adapter_model.safetensors" if method == "lora" else "model.safetensors")).is_file()
    assert "step 6/6" in job.stdout, "the log of the job comes back"


def test_ray_down_ends_the_cluster(cluster: Cluster, address: str) -> None:
    assert all(cluster.ray_processes(host) for host in cluster.hosts)
    ended = cluster.raytune("cluster", "down", str(cluster.file))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert cluster.ray_processes(cluster.hosts[0]) == []
    # Ray ends the workers of such hosts by ending the head: they go when they have looked for it in vain.
    deadline = time.monotonic() + 180
    while any(cluster.ray_processes(host) for host in cluster.hosts) and time.monotonic() < deadline:
        time.sleep(2)
    assert [cluster.ray_processes(host) for host in cluster.hosts] == [[], [], []]
