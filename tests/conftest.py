"""Settings of every test: no network, no GPU kernels to build, one thread, and slow tests only on demand."""

import atexit
import gc
import os
import sys
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DS_ACCELERATOR"] = os.environ.get("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Runs have as many threads as there are cores, and so have their neighbours. By default a thread that waits for another spins,
# which takes the core from the one that it waits for: a run of 5 CPU seconds took 115 beside six others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Three processes share the tests: with Ray's default of 15 the others would starve its workers.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  Ray's own spelling
# Tests start some hundred processes of raytune. Without bytecode each would compile all of it again: a fifth of its start.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

from tests.ray import forking

_status: list[int] = []
"""Exit status of the session, once it is over."""


def pytest_sessionfinish(session: pytest.Session, exitstatus: int | pytest.ExitCode) -> None:
    _status.append(int(exitstatus))


@atexit.register
def _leave() -> None:
    """End the process as the tests ended.

    CI saw an interpreter die of a segmentation fault (139) after its 3561 tests had passed, while it took down the libraries that
    they had used in one process: Ray, gRPC, Arrow, PyTorch. This runs last of all exit handlers, because it is registered before
    any of those is imported.
    """
    if _status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_status[-1])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes too")


settings.register_profile("often", max_examples=15, deadline=None)
settings.register_profile("at night", max_examples=300, deadline=None)
"""How many examples of anything that holds for all are tried. No deadline: a busy machine is no fault."""


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("at night" if config.getoption("--slow") else "often")
    forking.starts_as_ray_does = config.getoption("--slow")


WITH_RAY = ("tests/ray/", "tests/examples/")
"""Folders whose tests start clusters: one at a time, so all of them in one of the processes that share the tests."""


class FilesTogether(LoadScopeScheduling):
    """Gives a process whole files, so that what their tests share is made once, and one of them all that start clusters."""

    def _split_scope(self, nodeid: str) -> str:
        return "ray" if nodeid.startswith(WITH_RAY) else nodeid.partition("::")[0]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Take what is imported by now from the garbage collector: DeepSpeed and others call it all the time, and it would go through
    a million objects of libraries and tests each time."""
    gc.collect()
    gc.freeze()


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name bytes after their argument: what is compressed has in it the second in which it was, and a test has to have the same
    name in each of the processes."""
    return argname if isinstance(val, bytes) else None


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FilesTogether:
    return FilesTogether(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(WITH_RAY))  # the longest chain decides how long all of them take
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="takes minutes; run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)
