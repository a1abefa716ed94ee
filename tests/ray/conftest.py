"""Two raylets on this machine, each with room for one worker, as two nodes of a cluster."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster


@pytest.fixture(scope="session")
def short_tmp() -> Iterator[Path]:
    """A folder with a short name: Ray's sockets lie in it, and a socket's path has at most 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="rt", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def cluster(short_tmp: Path) -> Iterator[Cluster]:
    """A running cluster of two one-CPU nodes with a dashboard; its address is `cluster.address`."""
    os.environ["RAY_TMPDIR"] = str(short_tmp)
    os.environ["RAY_AUTH_MODE"] = "disabled"
    started = Cluster(
        initialize_head=True,
        connect=False,
        head_node_args={"num_cpus": 1, "include_dashboard": True, "dashboard_port": 0},
    )
    started.add_node(num_cpus=1)
    started.wait_for_nodes()
    yield started
    ray.shutdown()
    started.shutdown()
