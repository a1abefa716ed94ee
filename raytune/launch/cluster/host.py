"""What the machine under this process has, read without Ray, and without torch but where GPUs are asked for."""

import math
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from raytune.config.sections.cluster import ClusterSection
from raytune.config.sections.model import Attention
from raytune.launch.cluster.gpu_drivers import may_have_gpus
from raytune.plan.facts.machine import Machine


def memory_bytes_here() -> int:
    """Of the machine, or of the container if that has less."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return machine
    return min(machine, int(limit)) if limit.isdecimal() else machine


def embedded_cpus(section: ClusterSection) -> int:
    """Ray only counts CPUs, it does not give them: more workers than cores share them, slowly but correctly."""
    workers = 1 if section.workers == "auto" else section.workers
    return max(os.cpu_count() or 1, math.ceil(workers * section.cpus_per_worker))


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
    packages: frozenset[str] = frozenset()
    """Of kernels, that the worker's Python has."""


KERNEL_PACKAGES = {"liger-kernel": "liger_kernel"}
"""Packages of kernels that a plan asks for, and their modules."""
# What model.attention offers on every CPU (a test holds the two against each other).
NO_GPU = Accelerator(count=0, name=None, memory_bytes=None, supports_bf16=True, attention=("varlen", "sdpa", "eager"))


def kernel_packages() -> frozenset[str]:
    """Packages of kernels that the Python of this process has."""
    return frozenset(name for name, module in KERNEL_PACKAGES.items() if find_spec(module))


def accelerator_here() -> Accelerator:
    """The GPUs that this process sees."""
    if not may_have_gpus():
        return NO_GPU

    import torch

    if not torch.cuda.is_available():
        return NO_GPU

    from raytune.model.attention.attention import available_attention

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
        packages=kernel_packages(),
    )


def this_machine(section: ClusterSection) -> Machine:
    """What a cluster embedded in this machine would have, without starting one."""
    accelerator = accelerator_here()
    return Machine(
        num_nodes=1,
        num_cpus=embedded_cpus(section),
        host_memory_bytes=memory_bytes_here(),
        num_gpus=accelerator.count,
        gpu_name=accelerator.name,
        gpu_memory_bytes=accelerator.memory_bytes,
        supports_bf16=accelerator.supports_bf16,
        attention=accelerator.attention,
        packages=accelerator.packages,
    )
