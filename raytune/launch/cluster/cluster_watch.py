"""Watches, while a run goes on, whether the cluster's head and this node's raylet are there: Ray ends the process without a word
where they are not."""

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray
from ray._private import worker as ray_worker
from ray.util.client import ray as client

from raytune.errors import EXIT_RETRY_LATER

LOOK_EVERY_S = 2.0
ANSWER_TIMEOUT_S = 5.0

_log = logging.getLogger(__name__)


@contextmanager
def watched_cluster(tell: Callable[..., None]) -> Iterator[None]:
    """Tell what the cluster is called, and what of it is lost, for the duration of the block; a cluster inside this machine that
    loses one of its processes is left at once, since it does not come back.

    Args:
        tell: a parent that goes on where this process ends. Takes facts by the names of `lost.Driver`.
    """
    if client.is_connected():  # by ray://: this process is on no node, and Ray raises where the cluster is lost
        yield
        return
    context = ray.get_runtime_context()
    node = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    raylet = (node["NodeManagerAddress"], int(node["NodeManagerPort"]))
    tell(head=context.gcs_address, node=context.get_node_id(), address=raylet[0])
    host, _, port = context.gcs_address.rpartition(":")
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=((host, int(port)), raylet, tell, over), name="cluster", daemon=True)
    watch.start()
    try:
        yield
    finally:
        over.set()


def _watch(head: tuple[str, int], raylet: tuple[str, int], tell: Callable[..., None], over: threading.Event) -> None:
    embedded = ray_worker._global_node is not None and ray_worker._global_node.head
    told: str | None = None
    while not over.wait(LOOK_EVERY_S):
        if not _listens(raylet):
            lost = "raylet"
        elif not _listens(head):
            lost = "gcs_server"
        else:
            if told:
                _log.warning("The Ray cluster is back.")
                tell(lost=None)
            told = None
            continue
        if over.is_set():
            return
        if lost != told:
            tell(lost=lost)
            told = lost
            if lost == "gcs_server" and not embedded:
                _log.warning("The head of the Ray cluster (GCS at %s:%d) does not answer. Ray waits a minute for it.", *head)
        if embedded:
            os._exit(EXIT_RETRY_LATER)


def _listens(address: tuple[str, int]) -> bool:
    """Whether somebody takes connections there. A network that is slow to answer says nothing about that."""
    try:
        socket.create_connection(address, timeout=ANSWER_TIMEOUT_S).close()
    except ConnectionRefusedError:
        return False
    except OSError:
        return True
    return True
