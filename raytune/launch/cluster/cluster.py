"""Reaching a Ray cluster: join the one that was named, or start one inside this machine for the time of the run."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import ray
from ray._common.utils import get_default_system_temp_dir
from ray._private import utils as ray_utils
from ray._private.ray_constants import RAY_WORKER_NICENESS
from ray._private.services import canonicalize_bootstrap_address
from ray.exceptions import RaySystemError, RayTaskError

from raytune.config.sections.cluster import ClusterSection
from raytune.errors import ClusterError, UserError
from raytune.launch.cluster.address import named_address
from raytune.launch.cluster.forking import python_of_workers
from raytune.launch.cluster.host import embedded_cpus
from raytune.launch.cluster.loopback import LOOPBACK, loopback_kept
from raytune.launch.cluster.probe import probe_accelerator
from raytune.launch.cluster.processes import needed_alone, started_by
from raytune.launch.cluster.reach import ready_for
from raytune.launch.cluster.scaling import bring_machines
from raytune.launch.cluster.signals import unwind_at
from raytune.launch.cluster.waiting import wait_for
from raytune.launch.cluster.warm import python_kept_warm, say_that_nothing_stays
from raytune.plan.facts.machine import Machine
from raytune.printable import first_line
from raytune.token_file import prepare_token

Task = TypeVar("Task")
Result = TypeVar("Result")

LONGEST_SOCKET_PATH = 107
PACKAGE = Path(__file__).parents[2]

# The controller asks its workers for news this often; a run ends at most this long after its last worker (docs/facts.md).
POLL_INTERVAL_S = 0.2
# A worker that has not answered for so long is looked at (`worker_group`). A rank that hangs is found within two minutes: this,
# the look, and the end of the others' process group.
SILENCE_S = 60.0
GROUP_END_S = 10.0


@contextmanager
def connect(section: ClusterSection, *, scales: bool = True) -> Iterator[Machine]:
    """Join or start a cluster for the duration of the block, and say what it has.

    Args:
        scales: whether the cluster's autoscaler is to bring what is missing, which is paid for.

    Raises:
        ClusterError: as `joined` does, or if the cluster has no room for a worker on any node.
        UserError: as `joined` does.
    """
    with joined(section):
        if scales:
            bring_machines(section)
        machine = _machine(section)
        if machine.num_gpus:
            say_that_nothing_stays(section, "workers beside GPUs start as Ray starts them")
        yield machine


@contextmanager
def joined(section: ClusterSection) -> Iterator[None]:
    """Join or start a cluster for the duration of the block.

    The address is `cluster.address`, else RAY_ADDRESS (which `ray job submit` sets), else a cluster is started here and ended
    afterwards.

    Raises:
        ClusterError: if the cluster does not answer, or runs another Ray version.
        UserError: if this process is connected to another cluster than the one that `cluster.address` names.
    """
    address = named_address(section)
    joined_before = ray.is_initialized()
    environment = _worker_environment(section)
    os.environ.update(environment)
    own_cluster = ExitStack()
    try:
        if joined_before:  # a notebook's own connection, or a trial of a sweep
            _refuse_another_cluster(section.address)
            say_that_nothing_stays(section, "workers start as the connection says that this process had before")
        else:
            with _own_signals():
                if address:
                    _join(address, environment, section)
                else:
                    say_that_nothing_stays(section, "the cluster inside this machine ends with the command")
                    _start(section, own_cluster)
        yield
    finally:
        try:
            if not joined_before:
                ray.shutdown()
        finally:
            own_cluster.close()


@contextmanager
def _own_signals() -> Iterator[None]:
    """Let a SIGTERM end in order what has been started, while Ray starts too: its own handler ends the process anyhow."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    unwind_at(signal.SIGTERM)
    rays, ray_utils.set_sigterm_handler = ray_utils.set_sigterm_handler, lambda handler: None
    try:
        yield
    finally:
        ray_utils.set_sigterm_handler = rays
        unwind_at(signal.SIGTERM)  # Ray's C++ has just set one that prints its stack


def _join(address: str, environment: dict[str, str], section: ClusterSection) -> None:
    ready_for(address)
    # Inside a job the working directory carries this package already; from outside, the cluster gets the code that plans the run.
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    runtime_env: dict = {"env_vars": environment} | python_kept_warm(section) | ({} if in_job else {"py_modules": [str(PACKAGE)]})
    try:
        ray.init(address=address, runtime_env=runtime_env, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RaySystemError, RuntimeError, TimeoutError) as error:
        raise ClusterError(
            f"No Ray cluster answers at {address} ({type(error).__name__}: {error}). Check cluster.address or RAY_ADDRESS, and "
            f"that the cluster runs Ray {ray.__version__}. To run on this machine, unset both addresses."
        ) from error


def _refuse_another_cluster(address: str | None) -> None:
    """Only `host:port` can be held against a connection: `auto` is whatever is there, and ray:// names a door of the cluster."""
    if address is None or address == "auto" or "://" in address:
        return
    connected, named = ray.get_runtime_context().gcs_address, canonicalize_bootstrap_address(address)
    if named != connected:
        raise UserError(
            f"cluster.address is {address}, but this process is connected to the Ray cluster at {connected}. Call ray.shutdown() "
            f"first to go to the named cluster, or leave cluster.address out to use this one."
        )


def _start(section: ClusterSection, own_cluster: ExitStack) -> None:
    """Start a cluster in this machine. `own_cluster` is closed when it has ended."""
    folder = get_default_system_temp_dir()
    refuse_long_folder(folder)
    prepare_token()
    # That a cluster asks for a token which only this command knows is nothing that a person has to do anything about.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    try:
        python = own_cluster.enter_context(python_of_workers(folder, section.cpus_per_worker))
        with loopback_kept(), needed_alone(), started_by(python):
            ray.init(
                address="local",
                num_cpus=embedded_cpus(section),
                include_dashboard=False,  # it costs seconds, and nothing can leak from a cluster that ends with the run
                log_to_driver=False,
                logging_level=logging.WARNING,
                _system_config={
                    # A Python process per CPU would start at once, and none is of use: a run's have an environment of their own.
                    "prestart_worker_first_driver": False,
                    # By default 15: beside any other work of the machine ranks would have a thirtieth of a processor.
                    "worker_niceness": int(os.environ.get(RAY_WORKER_NICENESS, "0")),
                },
                _node_ip_address=LOOPBACK,
            )
    except Exception as error:  # Ray raises plain ones here
        first = first_line(error)
        logs = f"{folder}/ray/session_latest/logs"
        raise ClusterError(
            f"Ray could not start on this machine: {first} A machine that is too busy is one reason, a full disk another."
            + (f" Its logs: {logs}" if os.path.isdir(logs) else "")
        ) from error


def refuse_long_folder(folder: str) -> None:
    """Refuse a folder for Ray's files in which the paths of its sockets would be longer than a system takes.

    Raises:
        UserError: naming it, and the most that it may have.
    """
    longest = f"/ray/session_2026-01-31_23-59-59_999999_{os.getpid()}/sockets/plasma_store"
    most = LONGEST_SOCKET_PATH - len(longest)
    if len(os.fsencode(os.path.abspath(folder))) > most:
        raise UserError(
            f"Ray would keep its files in {folder}, where the paths of its sockets get longer than the {LONGEST_SOCKET_PATH} "
            f"bytes that a socket's path may have. Set RAY_TMPDIR to a folder with at most {most} characters, such as /tmp. "
            f"Nothing was started."
        )
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"Ray cannot keep its files in {folder} ({error.strerror}). Set RAY_TMPDIR to a folder of yours."
        ) from error


def _worker_environment(section: ClusterSection) -> dict[str, str]:
    """Environment of controller and workers: what Ray, DeepSpeed and the tokenizers read from nowhere else."""
    return {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(POLL_INTERVAL_S),
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(SILENCE_S),
        "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": str(int(GROUP_END_S)),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(section.start_timeout),
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": str(section.collective_timeout),
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process that nothing listens to yet
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # prints would appear twice
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def _machine(section: ClusterSection) -> Machine:
    nodes = nodes_for_workers([node["Resources"] for node in ray.nodes() if node["Alive"]], section)
    num_gpus = int(sum(node.get("GPU", 0) for node in nodes))
    accelerator = probe_accelerator(num_gpus, section.start_timeout)
    return Machine(
        num_nodes=len(nodes),
        num_cpus=int(sum(node.get("CPU", 0) for node in nodes)),
        host_memory_bytes=int(min(node.get("memory", 0) for node in nodes)),
        num_gpus=num_gpus,
        gpu_name=accelerator.name,
        gpu_memory_bytes=accelerator.memory_bytes,
        supports_bf16=accelerator.supports_bf16,
        attention=accelerator.attention,
        packages=accelerator.packages,
    )


def nodes_for_workers(nodes: Sequence[Mapping[str, float]], section: ClusterSection) -> list[Mapping[str, float]]:
    """Those of a cluster's nodes that can hold a worker: a head without CPUs is none of them, nor one without a GPU beside GPUs.

    Args:
        nodes: what each has, by Ray's names of resources.

    Raises:
        ClusterError: if there is none.
    """
    on_gpus = section.gpus_per_worker != 0 and any(node.get("GPU", 0) >= 1 for node in nodes)
    least_cpus = section.cpus_per_worker
    fitting = [
        node
        for node in nodes
        if node.get("CPU", 0) >= least_cpus and (node.get("GPU", 0) >= 1 if on_gpus else node.get("CPU", 0) > 0)
    ]
    if not fitting:
        have = "; ".join(f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes)
        gpu = " and a GPU" if on_gpus else ""
        raise ClusterError(
            f"No node of the cluster can hold a worker, which takes {least_cpus:g} CPUs (cluster.cpus_per_worker){gpu}. "
            f"Its nodes have: {have}. Lower cluster.cpus_per_worker, or try again when larger nodes have joined."
        )
    return fitting


def map_on_cluster(function: Callable[[Task], Result], tasks: Sequence[Task], *, start_timeout: float) -> Iterator[Result]:
    """Each result when it is there. One task is done here, where the tokenizer is loaded; several by the cluster's CPUs.

    Raises:
        ClusterError: if no CPU of the cluster is free within `start_timeout` seconds.
    """
    if len(tasks) <= 1:
        yield from map(function, tasks)
        return
    # How long a task takes is the data's business, so only the way to the first CPU has a limit.
    wait_for(ray.remote(num_cpus=1)(_nothing).remote(), "a free CPU to tokenise data on", start_timeout)
    remote = ray.remote(num_cpus=1)(function)
    awaited = [remote.remote(task) for task in tasks]
    try:
        while awaited:
            (ready, *_), awaited = ray.wait(awaited)
            yield ray.get(ready)
    except RayTaskError as error:
        raise error.cause from None  # what the task raised, without Ray's traceback around it
    finally:
        for task in awaited:  # of no use to anybody any more
            ray.cancel(task)


def _nothing() -> None:
    """A task that tells that tasks can run."""
