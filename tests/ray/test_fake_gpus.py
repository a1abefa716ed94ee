"""Nodes that promise GPUs which are none, as tests can have them. In a file of its own: two Ray clusters on one machine get in
each other's way."""

import pytest
import torch.distributed

from tests.ray.conftest import forking, running_cluster
from tests.ray.test_preflight import preflight

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


@pytest.mark.slow
@pytest.mark.skipif(torch.distributed.is_nccl_available(), reason="this PyTorch has NCCL")
def test_a_pytorch_without_nccl_is_called_that_and_no_firewall_is_blamed() -> None:
    with running_cluster(cpus_of_nodes=[0]) as cluster:
        with forking():
            cluster.add_node(num_cpus=2, num_gpus=2)
        code, findings = preflight(cluster)
        assert (code, findings["all-reduce"]["status"]) == (1, "fail")
        assert "is built without NCCL, and the worker has a GPU" in findings["all-reduce"]["seen"]
        assert "build of PyTorch for CUDA" in findings["all-reduce"]["fix"]
        assert "firewall" not in findings["all-reduce"]["fix"]
