"""What the plan is told about the machines: a value, gathered by `launch`."""

from dataclasses import dataclass, replace
from typing import Self

from raytune.config.sections.model import Attention
from raytune.plan.costs.hardware import Gpu, Instance
from raytune.plan.costs.throughput import Speed

USABLE_SHARE = 0.9
"""Share of memory that a plan fills: the rest is for fragmentation and for what the arithmetic leaves out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A cluster, whose nodes are taken to be alike."""

    num_nodes: int
    num_cpus: int
    """Of all nodes."""
    host_memory_bytes: int
    """Of the node that has least; 0: not known."""
    num_gpus: int
    """Of all nodes."""
    gpu_name: str | None
    gpu_memory_bytes: int | None
    supports_bf16: bool
    attention: tuple[Attention, ...]
    """Kinds that work, the preferred one first."""
    packages: frozenset[str] | None = None
    """Of kernels, that workers have; None: nobody looked."""
    instance: Instance | None = None
    """What its nodes are, by the hardware catalogue; None: not known, and so are time and money."""
    speed: Speed | None = None

    @classmethod
    def rented(cls, instance: Instance, gpu: Gpu, num_nodes: int) -> Self:
        """A cluster that need not exist yet, as the catalogue describes it."""
        return cls(
            num_nodes=num_nodes,
            num_cpus=num_nodes * instance.num_cpus,
            host_memory_bytes=instance.host_memory_bytes,
            num_gpus=num_nodes * instance.num_gpus,
            gpu_name=gpu.name,
            gpu_memory_bytes=gpu.memory_bytes,
            supports_bf16=gpu.supports_bf16,
            # What PyTorch has without further packages (model.attention).
            attention=("varlen", "flex_attention", "sdpa", "eager"),
            instance=instance,
            speed=Speed.of(instance, gpu),
        )

    def workers_on_a_node(self, workers: int, *, per_gpu: bool) -> int:
        """The most workers that one node gets when they are packed."""
        slots = self.num_gpus if per_gpu else self.num_cpus
        return max(1, min(workers, -(-slots // self.num_nodes)))

    def known_as(self, instance: Instance, gpu: Gpu) -> Self:
        """A cluster that exists, with the rates and the price of what its nodes are said to be."""
        return replace(self, instance=instance, speed=Speed.of(instance, gpu))

    def with_nodes(self, num_nodes: int) -> Self:
        """The same with more or fewer of its nodes."""
        return replace(
            self,
            num_nodes=num_nodes,
            num_cpus=self.num_cpus // self.num_nodes * num_nodes,
            num_gpus=self.num_gpus // self.num_nodes * num_nodes,
        )
