"""KubeRay manifests of a cluster: a RayJob that runs one run and goes, or a RayCluster that stays."""

from raytune.clusters.provider import ClusterSpec, Target, render
from raytune.units import GIB

SPOT_LABELS = {
    "aws": ("eks.amazonaws.com/capacityType", "SPOT"),
    "gcp": ("cloud.google.com/gke-spot", "true"),
    "azure": ("kubernetes.azure.com/scalesetpriority", "spot"),
}
"""How EKS, GKE and AKS mark spot nodes."""

CPUS_FOR_OTHERS = 4
"""Of a GPU node, what kubelet and daemons are left."""
SHARE_OF_MEMORY = 0.85
"""Of a GPU node, what its worker pod asks for; shared memory counts into it."""


def kuberay_yaml(spec: ClusterSpec, target: Target) -> str:
    """The manifest, with a ConfigMap of the run in front of a RayJob."""
    instance = spec.instance
    facts = {
        "with_run": target == "kuberay",
        "fabric": instance.fabric,
        "spot_label": SPOT_LABELS.get(instance.cloud),
        "worker_cpus": max(1, instance.num_cpus - CPUS_FOR_OTHERS),
        "worker_memory_gib": int(instance.host_memory_bytes * SHARE_OF_MEMORY) // GIB,
        "devices": network_devices(spec),
    }
    return render(spec, target, facts)


def network_devices(spec: ClusterSpec) -> dict[str, int]:
    """Resources that give a pod the fast network cards of its node, by name."""
    if spec.instance.fabric == "efa":
        return {"vpc.amazonaws.com/efa": spec.instance.num_interfaces}
    rdma = spec.user.kubernetes.rdma_resource
    return {rdma: spec.instance.num_interfaces} if rdma and spec.instance.fabric == "infiniband" else {}
