"""What a run asks of an autoscaler, and what its reports mean: no cluster needed."""

import pytest
from ray.core.generated.autoscaler_pb2 import AutoscalingState

from raytune.config.sections.cluster import ClusterSection
from raytune.errors import UserError
from raytune.launch.cluster.scaling import Need, Scaling, need_of, read_scaling

HEAD = {"memory": 1e9}
P5 = {"CPU": 192.0, "GPU": 8.0}
ON_P5 = ClusterSection(instance="p5.48xlarge", nodes=2)


def test_a_run_on_named_machines_asks_for_whole_ones_until_all_are_there():
    need = need_of(ON_P5, [HEAD])
    assert need == Need("2 x 8 H100 (p5.48xlarge)", ({"GPU": 8.0}, {"GPU": 8.0}), "STRICT_SPREAD")
    assert need_of(ON_P5, [HEAD, P5]) == need, "one of two is too few"
    assert need_of(ON_P5, [HEAD, P5, P5]) is None
    with pytest.raises(UserError, match="not in the hardware catalogue"):
        need_of(ClusterSection(instance="p99.huge"), [HEAD])


def test_without_a_type_of_machine_a_run_asks_for_the_places_of_its_workers():
    two = ClusterSection(workers=2, gpus_per_worker=1)
    need = need_of(two, [HEAD, {"CPU": 4.0, "GPU": 1.0}])
    assert need is not None
    assert (need.words, need.bundles) == ("the places of 2 workers (1 CPU and 1 GPU each)", ({"CPU": 1.0, "GPU": 1.0},) * 2)
    assert need_of(two, [HEAD, {"CPU": 4.0, "GPU": 2.0}]) is None
    alone = need_of(ClusterSection(), [HEAD])
    assert alone is not None
    assert alone.bundles == ({"CPU": 1.0},)
    assert need_of(ClusterSection(), [{"CPU": 2.0}]) is None


def report(*refused: dict[str, float]) -> AutoscalingState:
    """As an autoscaler that can bring nothing for a group of these bundles."""
    state = AutoscalingState(autoscaler_state_version=3)
    if refused:
        gang = state.infeasible_gang_resource_requests.add()
        requests = gang.bundle_selectors.add().resource_requests
        for bundle in refused:
            # Ray marks the bundles of a group with a resource of its own.
            requests.add().resources_bundle.update({**bundle, "bundle_group_0123": 0.001})
    return state


def test_an_autoscaler_that_knows_no_such_machines_is_not_waited_for():
    need = need_of(ON_P5, [HEAD])
    assert need is not None
    assert read_scaling(report({"GPU": 8.0}, {"GPU": 8.0}), need) == Scaling(is_heard=True, cannot=True)
    assert not read_scaling(report({"GPU": 4.0}), need).cannot, "another run's"
    assert not read_scaling(report(), need).cannot
    assert not read_scaling(AutoscalingState(), need).is_heard


def test_what_starts_and_what_the_cloud_refused_is_told():
    need = need_of(ON_P5, [HEAD])
    assert need is not None
    state = report()
    state.pending_instance_requests.add(instance_type_name="p5.48xlarge", count=1)
    state.pending_instances.add(instance_type_name="p5.48xlarge")
    state.failed_instance_requests.add(ray_node_type_name="gpu", reason="InsufficientInstanceCapacity:\n no p5 left")
    state.failed_instance_requests.add(ray_node_type_name="gpu", reason="")
    scaling = read_scaling(state, need)
    assert (scaling.starting, scaling.failures) == (2, ("gpu: InsufficientInstanceCapacity: no p5 left",))
