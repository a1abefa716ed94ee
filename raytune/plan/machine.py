"""What the plan is told about the machines and the data: values, gathered by `launch`."""

from dataclasses import dataclass

from raytune.config.model import Attention
from raytune.plan.run_plan import StorePlan

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

    def workers_on_a_node(self, workers: int, *, per_gpu: bool) -> int:
        """The most workers that one node gets when they are packed."""
        slots = self.num_gpus if per_gpu else self.num_cpus
        return max(1, min(workers, -(-slots // self.num_nodes)))


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFacts:
    """The tokenised stores of a run, and what was learned in building them."""

    train: StorePlan
    validation: tuple[StorePlan, ...] = ()
    longest_document: int
    """Tokens of the longest training document."""
    template: str = ""
    """Text of the chat template that made them; empty for plain text."""
