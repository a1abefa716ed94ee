"""Cluster files of every cloud and GPU family, written as a user would, and what tests look up in them."""

from functools import cache
from itertools import product
from typing import Any

from raytune.clusters.kuberay import kuberay_yaml
from raytune.clusters.provider import KUBERAY, ClusterSpec, Target, cluster_spec
from raytune.clusters.ray_up import ray_up_text
from raytune.config.load import config_from
from raytune.plan.ahead import compare
from raytune.plan.costs.hardware import load_catalogue
from tests.variants import variants
from tests.yaml_text import read_all_yaml, read_yaml

DIGEST = "sha256:" + "0123456789abcdef" * 4
CLIENT = "203.0.113.7/32"

FACTS: dict[str, dict[str, Any]] = {
    "aws": {
        "region": "us-east-1",
        "zone": "us-east-1a",
        "network": "vpc-0a1b2c3d4e5f60718",
        "subnet": "subnet-0a1b2c3d4e5f60718",
        "security_group": "sg-0a1b2c3d4e5f60718",
        "machine_image": "ami-0a1b2c3d4e5f60718",
        "key_name": "my-key",
    },
    "gcp": {
        "region": "us-central1",
        "zone": "us-central1-a",
        "account": "my-project",
        "machine_image": "projects/my-project/global/images/raytune-1",
        "ssh_public_key": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJustAnExample me@laptop",
    },
    "azure": {
        "account": "00000000-0000-0000-0000-000000000000",
        "resource_group": "raytune",
        "machine_image": "microsoft-dsvm:ubuntu-hpc:2204:22.04.2025072101",
    },
    "on-prem": {"hosts": ["10.0.0.1", "10.0.0.2", "10.0.0.3"]},
}
"""What a user has to say about machines of each cloud."""

FAMILIES = {
    "aws": ["p4d.24xlarge", "p4de.24xlarge", "p5.48xlarge", "p5e.48xlarge", "p5en.48xlarge", "g5.12xlarge", "g6e.48xlarge"],
    "gcp": ["a2-highgpu-8g", "a2-ultragpu-8g", "a3-highgpu-8g", "a3-megagpu-8g"],
    "azure": ["Standard_ND96asr_v4", "Standard_ND96amsr_A100_v4", "Standard_ND96isr_H100_v5"],
    "on-prem": ["dgx-a100-80gb", "dgx-h100"],
}
INSTANCES = [name for names in FAMILIES.values() for name in names]
CLOUDS = {instance.name: instance.cloud for instance in load_catalogue().instances.values()}
MARKETS: dict[str, dict[str, Any]] = {
    "on-demand": {},
    "spot": {"cluster": {"spot": True}},
    "reserved": {"provider": {"reservation": "cr-0a1b2c3d4e5f60718"}},
}
OFFERS = [(name, market) for name in INSTANCES for market in MARKETS if market != "reserved" or CLOUDS[name] in ("aws", "gcp")]
"""What `ray up` files can ask for."""
SIZES = {
    "7b": "meta-llama/Llama-2-7b-hf",
    "13b": "meta-llama/Llama-2-13b-hf",
    "34b": "codellama/CodeLlama-34b-hf",
    "70b": "meta-llama/Llama-2-70b-hf",
}
A100S = ["p4de.24xlarge", "a2-ultragpu-8g", "Standard_ND96amsr_A100_v4", "dgx-a100-80gb"]
H100S = ["p5.48xlarge", "a3-megagpu-8g", "Standard_ND96isr_H100_v5", "dgx-h100"]
OFTEN = [*zip(A100S, SIZES, strict=True), *zip(H100S, reversed(SIZES), strict=True)]
"""Each instance with one size, and each size on both cards."""
PLANNED = variants(OFTEN, [case for case in product(A100S + H100S, SIZES) if case not in OFTEN])


@cache
def nodes_by_plan(size: str, instance: str) -> int:
    """The fewest nodes on which a full fine-tuning under ZeRO-3 fits, by `raytune plan --compare`."""
    run = {"model": {"base": SIZES[size]}, "adapter": {"method": "full"}, "training": {"zero": {"stage": 3}}}
    (candidate,) = compare(config_from(run), [load_catalogue().instance(instance)], num_tokens=10_000_000)
    assert candidate.plan is not None
    assert candidate.plan.cost is not None
    return candidate.plan.cost.num_nodes


def spec_of(instance: str, target: Target = "ray-up", *, name: str = "example", nodes: int = 2, **sections: Any) -> ClusterSpec:
    """The cluster that a complete user config describes; `sections` are laid over it."""
    user = {"client_cidr": CLIENT, "container": f"registry.example.com/raytune@{DIGEST}", "shared_export": "10.0.0.9:/runs"}
    kubernetes = {"storage_claim": "runs", "hub_secret": "hub-token"}
    config = {
        "name": name,
        "storage": "/shared/runs",
        "cluster": {"instance": instance, "nodes": nodes, **sections.pop("cluster", {})},
        "provider": {**user, **FACTS[CLOUDS[instance]], "kubernetes": kubernetes, **sections.pop("provider", {})},
        **sections,
    }
    return cluster_spec(config_from(config), load_catalogue(), target)


def text_of(instance: str, target: Target = "ray-up", **keys: Any) -> str:
    spec = spec_of(instance, target, **keys)
    return kuberay_yaml(spec, target) if target in KUBERAY else ray_up_text(spec, target)


def data_of(instance: str, target: Target = "ray-up", **keys: Any) -> Any:
    return read_yaml(text_of(instance, target, **keys))


def manifests_of(instance: str, target: Target, **keys: Any) -> list[Any]:
    return list(read_all_yaml(text_of(instance, target, **keys)))
