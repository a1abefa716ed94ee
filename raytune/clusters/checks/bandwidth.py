"""A real all-reduce between the places that workers get, and between pairs of nodes. One process per worker, ended afterwards."""

import os
import re
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raytune.clusters.checks.network import GLOO, LOG_SETTINGS, Network, network_of
from raytune.clusters.checks.nodes import Reduction
from raytune.errors import ClusterError
from raytune.launch.cluster.waiting import wait_for
from raytune.printable import first_line
from raytune.units import GIB, MIB, format_seconds

SIZES_ON_GPUS = (MIB, 64 * MIB, GIB)
SIZES_ON_CPUS = (MIB, 32 * MIB)
GROUP_TIMEOUT_S = 90.0
"""Longest wait for a process group, and for each all-reduce in it."""
_SECONDS_PER_SIZE = 1.0
_MOST_REPEATS = 20


class ReductionError(ClusterError):
    """Processes were there and did not reduce together: as far as is known, because they do not reach each other."""

    fix = (
        "Workers cannot talk: open all ports between the nodes (security group, firewall), and set NCCL_SOCKET_IFNAME and "
        "GLOO_SOCKET_IFNAME to the interface of the training network before `ray start`."
    )


class NoNcclError(ReductionError):
    """A worker has a GPU, and a PyTorch that knows no NCCL."""

    fix = (
        "No network is at fault. Install the build of PyTorch for CUDA on every node (`pip install torch --index-url` of "
        "pytorch.org, or the image of cluster/image/Dockerfile); `python -c 'import torch.distributed as d; "
        "print(d.is_nccl_available())'` says True then. Without a GPU to train on: cluster.gpus_per_worker=0."
    )


class NoDeviceError(ReductionError):
    """A worker was promised a GPU and PyTorch sees none."""

    fix = (
        "No network is at fault. Look at `nvidia-smi` there: the driver must be loaded, the container started with --gpus=all, "
        "and Ray's --num-gpus not be more than there are."
    )


class NcclError(ReductionError):
    """NCCL failed for a reason of its own."""

    fix = (
        "NCCL says why in the line above or, with NCCL_DEBUG=INFO before Ray starts, in the workers' logs. Usual are different "
        "versions of NCCL on the nodes, too little /dev/shm, or a GPU in trouble (`nvidia-smi -q`, `dmesg`). If it is a "
        "connection: open all ports between the nodes, and set NCCL_SOCKET_IFNAME to the interface of the training network."
    )


@ray.remote
class Rank:
    """A process in a worker's place."""

    def __init__(self) -> None:
        self._log: Path | None = None
        self._network: Network | None = GLOO

    def address(self) -> tuple[str, str]:
        """Node id, and the node's address as the cluster knows it."""
        context = ray.get_runtime_context()
        return context.get_node_id(), ray.util.get_node_ip_address()

    def free_port(self) -> int:
        with socket.socket() as probe:
            probe.bind(("", 0))
            return probe.getsockname()[1]

    def reduce(self, rank: int, num_ranks: int, master: str, sizes: Sequence[int], on_gpu: bool) -> list[float]:
        """Seconds of an all-reduce of each size, the median of several.

        Args:
            master: `host:port` of the store of rank 0.
        """
        import torch
        import torch.distributed as dist

        if on_gpu:
            _refuse_without_nccl(torch)
            self._log = self._log or _nccl_log()
        torch.set_num_threads(1)
        host, port = master.rsplit(":", 1)
        timeout = timedelta(seconds=GROUP_TIMEOUT_S)
        store = dist.TCPStore(host, int(port), num_ranks, is_master=rank == 0, timeout=timeout)
        dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=num_ranks, timeout=timeout)
        try:
            device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
            return [_median_seconds(num_bytes, rank, num_ranks, device) for num_bytes in sizes]
        except dist.DistBackendError as error:
            if not on_gpu:
                raise
            raise NcclError(f"{first_line(error)}{_last_warning(self._log)}") from error
        finally:
            dist.destroy_process_group()
            self._read_log()

    def _read_log(self) -> None:
        """Once: NCCL chooses when a process uses it first. The file is not left behind."""
        if self._log is not None and self._log.exists():
            self._network = network_of(self._log.read_text(errors="replace"))
            self._log.unlink()

    def network(self) -> Network | None:
        """What it reduced over; None if NCCL did not say."""
        return self._network


def _refuse_without_nccl(torch: Any) -> None:
    if not torch.distributed.is_nccl_available():
        raise NoNcclError(f"torch {torch.__version__} on {socket.gethostname()} is built without NCCL, and the worker has a GPU")
    if not torch.cuda.is_available():
        raise NoDeviceError(f"torch {torch.__version__} on {socket.gethostname()} sees no GPU, and Ray gave the worker one")


def _nccl_log() -> Path:
    """A file that NCCL will write to in this process; it asks its environment once."""
    descriptor, path = tempfile.mkstemp(prefix="raytune-nccl-")
    os.close(descriptor)
    os.environ.update(LOG_SETTINGS | {"NCCL_DEBUG_FILE": path})
    return Path(path)


def _last_warning(log: Path | None) -> str:
    """What NCCL warned of last, as the end of a sentence."""
    warnings = re.findall(r"NCCL WARN (.+)", log.read_text(errors="replace")) if log is not None and log.exists() else []
    return f"; NCCL: {warnings[-1].strip()}" if warnings else ""


def _median_seconds(num_bytes: int, rank: int, num_ranks: int, device: Any) -> float:
    import torch
    import torch.distributed as dist

    values = torch.full((num_bytes // 4,), float(rank + 1), device=device)
    dist.all_reduce(values)  # builds the connections
    if values[0].item() != num_ranks * (num_ranks + 1) / 2 or values[-1].item() != values[0].item():
        raise RuntimeError(f"{num_ranks} ranks reduced 1 + ... + {num_ranks} to {values[0].item()}")
    seconds: list[float] = []
    repeats = torch.tensor(_MOST_REPEATS, device=device)
    for index in range(_MOST_REPEATS):
        values.fill_(1.0)
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        dist.all_reduce(values)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        if index == 0:  # all ranks agree on how often
            repeats.fill_(max(3, min(_MOST_REPEATS, int(_SECONDS_PER_SIZE / max(seconds[0], 1e-6)))))
            dist.all_reduce(repeats, dist.ReduceOp.MIN)
        if len(seconds) >= repeats.item():
            break
    return statistics.median(seconds)


class Ranks:
    """Processes in the places of all workers.

    Args:
        handles: by rank.
    """

    def __init__(self, handles: Sequence[Any], places: Sequence[tuple[str, str]], on_gpus: bool) -> None:
        self._handles, self._places, self._on_gpus = handles, places, on_gpus

    @property
    def nodes(self) -> list[str]:
        """Ids of the nodes that hold a worker, in the order of ranks."""
        return list(dict.fromkeys(node for node, _ in self._places))

    @property
    def sizes(self) -> tuple[int, ...]:
        return SIZES_ON_GPUS if self._on_gpus else SIZES_ON_CPUS

    def reduce_all(self) -> list[Reduction]:
        """All-reduces over all workers, by size; none for one worker.

        Raises:
            ReductionError: if they do not come to an end.
        """
        if len(self._handles) < 2:
            return []
        return self._wait([self._start(range(len(self._handles)), self.sizes)])[0]

    def reduce_pairs(self, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Reduction]:
        """All-reduces between pairs of nodes, one worker of each, all at the same time.

        Raises:
            ReductionError: as `reduce_all` does.
        """
        rank_on = {node: rank for rank, (node, _) in reversed(list(enumerate(self._places)))}
        size = self.sizes[-1:]
        started = [self._start([rank_on[one], rank_on[other]], size) for one, other in pairs]
        return {pair: reductions[0] for pair, reductions in zip(pairs, self._wait(started))}

    def networks(self) -> dict[str, Network | None]:
        """What the workers reduced over, by node; of the first worker of each."""
        rank_on = {node: rank for rank, (node, _) in reversed(list(enumerate(self._places)))}
        asked = [self._handles[rank].network.remote() for rank in rank_on.values()]
        return dict(zip(rank_on, ray.get(asked, timeout=GROUP_TIMEOUT_S)))

    @property
    def workers_on_a_node(self) -> float:
        return len(self._places) / max(1, len(self.nodes))

    def _start(self, ranks: Sequence[int], sizes: Sequence[int]) -> tuple[Sequence[int], Sequence[int], list[Any]]:
        first = ranks[0]
        port = ray.get(self._handles[first].free_port.remote(), timeout=GROUP_TIMEOUT_S)
        master = f"{self._places[first][1]}:{port}"
        tasks = [
            self._handles[rank].reduce.remote(index, len(ranks), master, sizes, self._on_gpus)
            for index, rank in zip(count(), ranks)
        ]
        return ranks, sizes, tasks

    def _wait(self, started: Sequence[tuple[Sequence[int], Sequence[int], list[Any]]]) -> list[list[Reduction]]:
        limit = GROUP_TIMEOUT_S * 2
        tasks = [task for _, _, group in started for task in group]
        _, late = ray.wait(tasks, num_returns=len(tasks), timeout=limit)
        found = []
        for ranks, sizes, group in started:
            silent = [self._places[rank] for rank, task in zip(ranks, group) if task in late]
            if silent:
                raise ReductionError(
                    f"The all-reduce has not ended after {format_seconds(limit)} on "
                    + ", ".join(sorted({f"{address}" for _, address in silent}))
                )
            try:
                seconds = ray.get(group)
            except RayError as error:
                cause = getattr(error, "cause", None)
                kind = type(cause) if isinstance(cause, ReductionError) else ReductionError
                raise kind(str(cause) if kind is not ReductionError else _reason(error)) from error
            found.append(
                [
                    Reduction(num_bytes=num_bytes, seconds=max(times), num_ranks=len(ranks))
                    for num_bytes, times in zip(sizes, zip(*seconds))
                ]
            )
        return found


def _reason(error: RayError) -> str:
    """The line of an error that says what it is."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[-1] if lines else 'no message'}"


@contextmanager
def ranks_on_cluster(
    num_ranks: int,
    *,
    cpus: float,
    gpus: float,
    placement: str,
    start_timeout: float,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Ranks]:
    """Take the places of all workers for the duration of the block.

    Raises:
        ClusterError: if they are not free within `start_timeout` seconds.
    """
    group = placement_group([{"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}] * num_ranks, strategy=placement.upper())
    handles: list[Any] = []
    try:
        wait_for(group.ready(), f"the places of {num_ranks} workers", start_timeout)
        handles = [
            Rank.options(
                num_cpus=cpus,
                num_gpus=gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
                runtime_env={"env_vars": dict(environment or {})},
            ).remote()
            for index in range(num_ranks)
        ]
        places = [wait_for(handle.address.remote(), "the workers' processes", start_timeout) for handle in handles]
        yield Ranks(handles, places, on_gpus=gpus > 0)
    finally:
        for handle in handles:
            ray.kill(handle)
        remove_placement_group(group)
