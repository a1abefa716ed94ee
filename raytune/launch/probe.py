"""What one worker's machine can do, asked of a worker process itself, because the driver may have no GPU or another one."""

from dataclasses import dataclass, replace

import ray

from raytune.config.model import Attention
from raytune.launch.waiting import wait_for


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """The device that a worker trains on. Memory and name are None on a CPU."""

    count: int
    """Devices that were looked at or for."""
    name: str | None
    memory_bytes: int | None
    supports_bf16: bool
    attention: tuple[Attention, ...]
    """Kinds that work, the preferred one first."""


def probe_accelerator(num_gpus: int, start_timeout: float) -> Accelerator:
    """Look at a GPU of the cluster, by a task on it; a CPU cluster needs no look.

    Raises:
        ClusterError: if no GPU is free within `start_timeout` seconds.
    """
    if not num_gpus:
        return _CPU
    look = ray.remote(num_gpus=1, num_cpus=0)(accelerator_here).remote()
    return replace(wait_for(look, "a free GPU to look at", start_timeout), count=num_gpus)


# What model.attention offers on every CPU (a test holds the two against each other).
_CPU = Accelerator(count=0, name=None, memory_bytes=None, supports_bf16=True, attention=("varlen", "sdpa", "eager"))


def accelerator_here() -> Accelerator:
    """The GPUs that this process sees."""
    import torch

    if not torch.cuda.is_available():
        return _CPU

    from raytune.model.attention import available_attention

    device = torch.device("cuda")
    supports_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    options = available_attention(device, torch.bfloat16 if supports_bf16 else torch.float16)
    properties = torch.cuda.get_device_properties(device)
    return Accelerator(
        count=torch.cuda.device_count(),
        name=properties.name,
        memory_bytes=properties.total_memory,
        supports_bf16=supports_bf16,
        attention=tuple(option.name for option in options if option.available),
    )
