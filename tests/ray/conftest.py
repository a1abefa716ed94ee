"""Clusters on this machine, one at a time: raylets that are nodes to Ray."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes, each with room for one worker; `cluster.address` joins it."""
    with running_cluster(cpus_of_nodes=[1, 1]) as started:
        yield started


@pytest.fixture(scope="module")
def one_node() -> Iterator[Cluster]:
    """A node with room for two workers. Jobs need it: raylets of one machine unpack a job's files over each other."""
    with running_cluster(cpus_of_nodes=[2]) as started:
        yield started


@contextmanager
def running_cluster(cpus_of_nodes: list[int], gpus_of_head: int = 0) -> Iterator[Cluster]:
    """
    Args:
        gpus_of_head: that Ray counts; none need be there.
    """
    # Ray's sockets lie in this folder, and the path of a socket has at most 107 characters.
    folder = tempfile.mkdtemp(prefix="rt", dir="/tmp")
    before = dict(os.environ)
    os.environ["RAY_TMPDIR"] = folder
    os.environ["RAY_AUTH_MODE"] = "disabled"
    # A job's `python` is found on the PATH of the raylet that starts it.
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    head, *others = cpus_of_nodes
    # Free ports: the agent that starts jobs has a fixed one by default, and dies if another cluster on this machine holds it.
    ports = {"dashboard_port": 0, "dashboard_agent_listen_port": 0}
    started = Cluster(
        initialize_head=True,
        connect=False,
        head_node_args={"num_cpus": head, "num_gpus": gpus_of_head, "include_dashboard": True, **ports},
    )
    try:
        for num_cpus in others:
            started.add_node(num_cpus=num_cpus)
        started.wait_for_nodes()
        yield started
    finally:
        ray.shutdown()
        started.shutdown()
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(folder, ignore_errors=True)
