"""What one worker's machine can do, asked of a worker process itself, because the driver may have no GPU or another one."""

from dataclasses import replace

import ray

from raytune.launch.cluster.host import NO_GPU, Accelerator, accelerator_here
from raytune.launch.cluster.waiting import wait_for


def probe_accelerator(num_gpus: int, start_timeout: float) -> Accelerator:
    """Look at a GPU of the cluster, by a task on it; a CPU cluster needs no look.

    Raises:
        ClusterError: if no GPU is free within `start_timeout` seconds.
    """
    if not num_gpus:
        return NO_GPU
    look = ray.remote(num_gpus=1, num_cpus=0)(accelerator_here).remote()
    return replace(wait_for(look, "a free GPU to look at", start_timeout), count=num_gpus)
