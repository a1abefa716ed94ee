"""Clusters on this machine, one at a time: raylets that are nodes to Ray."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.ray.forking import forking_python


class Kept:
    """The one cluster that is up: it stays for the files that follow, as long as they ask for the same nodes."""

    def __init__(self) -> None:
        self._cpus: list[int] = []
        self._stack = ExitStack()
        self._cluster: Cluster | None = None

    def of(self, cpus_of_nodes: list[int]) -> Cluster:
        if self._cluster is None or self._cpus != cpus_of_nodes:
            self.end()
            self._cluster, self._cpus = self._stack.enter_context(running_cluster(cpus_of_nodes)), cpus_of_nodes
        return self._cluster

    def end(self) -> None:
        self._cluster = None
        self._stack.close()


@pytest.fixture(scope="session")
def kept() -> Iterator[Kept]:
    cluster = Kept()
    yield cluster
    cluster.end()


@pytest.fixture(scope="module")
def cluster(kept: Kept) -> Cluster:
    """Two nodes, each with room for one worker; `cluster.address` joins it."""
    return kept.of([1, 1])


@pytest.fixture(scope="module")
def one_node(kept: Kept) -> Cluster:
    """A node with room for two workers. Jobs need it: raylets of one machine unpack a job's files over each other."""
    return kept.of([2])


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that share a cluster one after the other, behind those that have one of their own: two on one machine get in each
    other's way. Last the one that loses it."""
    kinds: dict[str, int] = {}
    for item in items:
        asked = getattr(item, "fixturenames", ())
        loses_it = hasattr(getattr(item, "module", None), "cluster")
        kind = 3 if loses_it else 2 if "cluster" in asked else 1 if "one_node" in asked else 0
        file = item.nodeid.partition("::")[0]
        kinds[file] = max(kinds.get(file, 0), kind)
    in_ray = [index for index, item in enumerate(items) if item.nodeid.startswith("tests/ray/")]
    ordered = sorted((items[index] for index in in_ray), key=lambda item: kinds[item.nodeid.partition("::")[0]])
    for index, item in zip(in_ray, ordered):
        items[index] = item


@contextmanager
def forking() -> Iterator[None]:
    """Context in which a node is started whose workers start in a moment."""
    with mock.patch.object(sys, "executable", forking_python()):
        yield


@contextmanager
def running_cluster(cpus_of_nodes: list[int]) -> Iterator[Cluster]:
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
    with forking():
        started = Cluster(
            initialize_head=True, connect=False, head_node_args={"num_cpus": head, "include_dashboard": True, **ports}
        )
    try:
        with forking():
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
