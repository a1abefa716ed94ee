"""Where a plan counts on a faster network between nodes than a file of `cluster render` sets up: said, not hidden. Pure."""

from raytune.config.sections.provider import ProviderSection
from raytune.plan.costs.hardware import Fabric, Instance
from raytune.units import format_rate

NAMES: dict[Fabric, str] = {
    "efa": "EFA",
    "infiniband": "InfiniBand",
    "tcpx": "GPUDirect-TCPX",
    "tcpxo": "GPUDirect-TCPXO",
    "tcp": "TCP",
}


def fabric_notes(instance: Instance | None, num_nodes: int, provider: ProviderSection) -> list[str]:
    """What to be noted about the network that seconds and dollars of a plan count on; nothing for one node.

    Args:
        instance: type of the nodes; None: not known, and neither is the time.
        provider: what the user says of the machines, which decides what `cluster render` can set up.
    """
    if instance is None or num_nodes < 2:
        return []
    lacking = [file for file, is_lacking in _files_without(instance, provider).items() if is_lacking]
    if not lacking:
        return []
    slower = "over TCP"
    if instance.tcp_bytes_per_s:
        times = instance.inter_bytes_per_s / instance.tcp_bytes_per_s
        slower += f" ({format_rate(instance.tcp_bytes_per_s)} at most), about {times:.0f} times as long"
    return [
        f"Time between nodes counts on {NAMES[instance.fabric]}, {format_rate(instance.inter_bytes_per_s)} per node of "
        f"{instance.name}. In {' and in '.join(lacking)}, they talk {slower}: `raytune preflight` measures it."
    ]


def _files_without(instance: Instance, provider: ProviderSection) -> dict[str, bool]:
    """Files of `cluster render`, and whether their nodes do without the instance's fast network."""
    if provider.hosts:  # machines that run already: their network is what it is
        return {}
    infiniband, cloud = instance.fabric == "infiniband", instance.cloud
    return {
        "a `ray up` file (Ray starts single machines, and Azure connects InfiniBand within a scale set only, whose addresses "
        "provider.hosts can list)": infiniband and cloud == "azure",
        "a KubeRay manifest without provider.kubernetes.rdma_resource": infiniband and provider.kubernetes.rdma_resource is None,
        "a KubeRay manifest (GKE's networks and receive daemon for GPUDirect are not written by raytune)": instance.fabric
        in ("tcpx", "tcpxo"),
    }
