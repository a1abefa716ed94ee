"""Reaching a Ray cluster: join the one that was named, or start one inside this machine for the time of the run."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.exceptions import RaySystemError

from raytune.config.cluster import ClusterSection
from raytune.errors import ClusterError
from raytune.launch.probe import probe_accelerator
from raytune.plan.machine import Machine

PACKAGE = Path(__file__).parents[1]

# The controller asks its workers for news this often; a run ends at most this long after its last worker (FACTS: 5.0 s -> 0.9 s).
POLL_INTERVAL_S = 0.2


@dataclass(frozen=True, slots=True)
class Connection:
    """A cluster that this process drives."""

    address: str
    is_embedded: bool
    machine: Machine


@contextmanager
def connect(section: ClusterSection) -> Iterator[Connection]:
    """Join or start a cluster for the duration of the block.

    The address is `cluster.address`, else RAY_ADDRESS (which `ray job submit` sets), else a cluster is started here and ended afterwards.

    Raises:
        ClusterError: if the cluster does not answer or runs another Ray version.
    """
    address = section.address or os.environ.get("RAY_ADDRESS")
    joined_before = ray.is_initialized()
    environment = _worker_environment(section)
    os.environ.update(environment)
    try:
        if joined_before:
            context = ray.get_runtime_context()
            address = address or context.gcs_address
        elif address:
            _join(address, environment)
        else:
            _start(section)
        yield Connection(address or "local", is_embedded=address is None, machine=_machine())
    finally:
        if not joined_before:
            ray.shutdown()


def _join(address: str, environment: dict[str, str]) -> None:
    # Inside a job the working directory already carries this package; from outside, the cluster gets the very code that plans the run.
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    runtime_env: dict = {"env_vars": environment} if in_job else {"env_vars": environment, "py_modules": [str(PACKAGE)]}
    try:
        ray.init(address=address, runtime_env=runtime_env, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RaySystemError, RuntimeError, TimeoutError) as error:
        raise ClusterError(
            f"No Ray cluster answers at {address} ({type(error).__name__}: {error}). Check cluster.address or RAY_ADDRESS, that the "
            f"cluster runs Ray {ray.__version__}, and that RAY_AUTH_TOKEN is set if it asks for a token; unset both addresses to run "
            f"on this machine."
        ) from error


def _start(section: ClusterSection) -> None:
    workers = 1 if section.workers == "auto" else section.workers
    # Ray only counts CPUs, it does not give them: more workers than cores share them, slowly but correctly.
    num_cpus = max(os.cpu_count() or 1, int(workers * section.cpus_per_worker + 0.999))
    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,  # its processes cost seconds, and nothing can leak from a cluster that ends with the run
        log_to_driver=False,
        logging_level=logging.WARNING,
    )


def _worker_environment(section: ClusterSection) -> dict[str, str]:
    """Environment of controller and workers: what Ray, DeepSpeed and the tokenizers read from nowhere else."""
    return {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(POLL_INTERVAL_S),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(section.start_timeout),
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": str(section.collective_timeout),
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # prints would appear twice
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def _machine() -> Machine:
    resources = ray.cluster_resources()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    num_gpus = int(resources.get("GPU", 0))
    accelerator = probe_accelerator(on_gpu=num_gpus > 0)
    return Machine(
        num_nodes=len(nodes),
        num_cpus=int(resources.get("CPU", 0)),
        host_memory_bytes=int(min(node["Resources"].get("memory", 0) for node in nodes)),
        num_gpus=num_gpus,
        gpu_name=accelerator.name,
        gpu_memory_bytes=accelerator.memory_bytes,
        supports_bf16=accelerator.supports_bf16,
        attention=accelerator.attention,
    )
