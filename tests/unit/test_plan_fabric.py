"""A plan says where a rendered file would give its nodes another network than the plan counts on."""

import pytest

from raytune.config.sections.provider import KubernetesSection, ProviderSection
from raytune.plan.costs.fabric import fabric_notes
from raytune.plan.costs.hardware import load_catalogue

NOBODY_KNOWS = ProviderSection()


def notes(instance: str, num_nodes: int = 2, provider: ProviderSection = NOBODY_KNOWS) -> str:
    return " ".join(fabric_notes(load_catalogue().instance(instance), num_nodes, provider))


def test_azure_has_no_infiniband_between_machines_that_ray_starts():
    said = notes("Standard_ND96isr_H100_v5")
    assert "counts on InfiniBand, 400 GB/s per node" in said
    assert "a `ray up` file (Ray starts single machines" in said
    assert "a KubeRay manifest without provider.kubernetes.rdma_resource" in said
    assert "over TCP (10 GB/s at most), about 40 times as long" in said
    with_rdma = ProviderSection(kubernetes=KubernetesSection(rdma_resource="rdma/ib"))
    assert "KubeRay" not in notes("Standard_ND96isr_H100_v5", provider=with_rdma)
    assert "`ray up`" in notes("Standard_ND96isr_H100_v5", provider=with_rdma)


def test_gke_talks_over_tcp():
    said = notes("a3-megagpu-8g")
    assert "counts on GPUDirect-TCPXO, 200 GB/s" in said
    assert "a KubeRay manifest (GKE's networks" in said
    assert "`ray up` file" not in said


@pytest.mark.parametrize("instance", ["p5.48xlarge", "p4d.24xlarge", "g5.12xlarge", "a2-ultragpu-8g"])
def test_nothing_is_said_where_the_files_give_what_the_plan_counts_on(instance: str):
    assert notes(instance) == ""


def test_one_node_and_machines_that_run_already_have_nothing_to_be_noted():
    assert notes("Standard_ND96isr_H100_v5", num_nodes=1) == ""
    assert notes("Standard_ND96isr_H100_v5", provider=ProviderSection(hosts=["10.0.0.4", "10.0.0.5"])) == ""
    assert fabric_notes(None, 8, NOBODY_KNOWS) == []
