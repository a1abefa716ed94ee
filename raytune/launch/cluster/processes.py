"""Which processes `ray.init` starts in this machine, and with which program."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ray._private.node import Node

IDLE = ("start_monitor", "start_log_monitor", "start_api_server")
"""What starts processes of Ray 2.60, a CPU second each, with nothing to do in a cluster of one machine: an autoscaler, which
can bring no machines; what copies logs of workers to drivers that want them (`log_to_driver`); and what is left of a dashboard
that is not wanted, which counts how Ray is used (RAY_USAGE_STATS_ENABLED)."""


@contextmanager
def needed_alone() -> Iterator[None]:
    """Have `ray.init` start no process that nothing needs."""
    methods = {name: getattr(Node, name) for name in IDLE}
    for name in IDLE:
        setattr(Node, name, _not_started)
    try:
        yield
    finally:
        for name, method in methods.items():
            setattr(Node, name, method)


def _not_started(node: Node, **arguments: object) -> None:
    pass


@contextmanager
def started_by(python: str) -> Iterator[None]:
    """Have `ray.init` start processes by another program than this process's Python."""
    own, sys.executable = sys.executable, python
    try:
        yield
    finally:
        sys.executable = own
