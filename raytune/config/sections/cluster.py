"""`cluster`: which Ray cluster, how many workers, and what each of them gets."""

from typing import Annotated, Literal

from pydantic import Field

from raytune.config.sections.section import Auto, Duration, NonNegativeFloat, NonNegativeInt, PositiveInt, Section, Text


class ClusterSection(Section):
    address: Text | None = None
    """Ray cluster to join: `auto`, `host:port` or `ray://host:port`. Default: RAY_ADDRESS if it is set, else a cluster is
    started inside this machine for the time of the run."""
    instance: Annotated[Text, Field(examples=["p5.48xlarge"])] | None = None
    """Instance type of the nodes, by the hardware catalogue (configs/hardware/instances.yaml). With it `plan` needs no cluster,
    and knows seconds and dollars."""
    nodes: PositiveInt = 1
    """Nodes of that type that a plan counts on."""
    spot: bool = False
    """Whether they are spot (preemptible) nodes: cheaper, and taken away now and then."""
    workers: PositiveInt | Auto = "auto"
    """Training processes, one per GPU. `auto`: all GPUs of the cluster, or one worker without any."""
    gpus_per_worker: Literal[0, 1] | Auto = "auto"
    """GPUs of a worker. `auto`: 1 where the cluster has GPUs, else 0 (CPU training)."""
    cpus_per_worker: NonNegativeFloat = 1.0
    """CPUs that Ray sets aside for a worker."""
    threads_per_worker: PositiveInt | Auto = "auto"
    """Compute threads of a worker. `auto`: on CPUs its share of all cores, beside a GPU `cpus_per_worker`; at least one."""
    placement: Literal["pack", "spread", "strict_pack", "strict_spread"] = "pack"
    """How workers lie on nodes: close together (`pack`) or one per node (`strict_spread`)."""
    max_failures: NonNegativeInt = 3
    """How often a failed worker group is started again from the newest checkpoint."""
    keep_warm: Duration | None = None
    """Keep what workers load (torch, transformers, DeepSpeed) loaded on each node of a cluster that is joined, until no command
    has used it for so long, such as `15m`: the next command's workers start in a moment. It takes 0.5 GB of a node's memory.
    Workers on nodes with GPUs start as ever. Default: nothing stays."""
    start_timeout: Duration = 600.0
    """Longest wait for all workers to be placed and started."""
    collective_timeout: Duration = 600.0
    """Longest wait of one worker for the others in a collective operation."""
