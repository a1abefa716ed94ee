"""What one worker's machine can do, asked of a worker process itself, because the driver may have no GPU or another one."""

from dataclasses import dataclass

import ray

from raytune.config.model import Attention


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """The device that a worker trains on. Memory and name are None on a CPU."""

    name: str | None
    memory_bytes: int | None
    supports_bf16: bool
    attention: tuple[Attention, ...]
    """Kinds that work, the preferred one first."""


def probe_accelerator(on_gpu: bool) -> Accelerator:
    """Look at a GPU of the cluster, or at nothing on a CPU cluster, where the answer needs no process."""
    if not on_gpu:
        return _CPU
    return ray.get(ray.remote(num_gpus=1, num_cpus=0)(_probe_gpu).remote())


# What model.attention offers on every CPU; a test holds the two against each other.
_CPU = Accelerator(name=None, memory_bytes=None, supports_bf16=True, attention=("varlen", "sdpa", "eager"))


def _probe_gpu() -> Accelerator:
    import torch

    from raytune.model.attention import available_attention

    device = torch.device("cuda")
    supports_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    options = available_attention(device, torch.bfloat16 if supports_bf16 else torch.float16)
    properties = torch.cuda.get_device_properties(device)
    return Accelerator(
        name=properties.name,
        memory_bytes=properties.total_memory,
        supports_bf16=supports_bf16,
        attention=tuple(option.name for option in options if option.available),
    )
