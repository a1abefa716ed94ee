"""KubeRay manifests fit the operator's own schemas (v1.7.0) and its rules beyond them."""

import copy
import gzip
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from raytune.clusters.kuberay import CPUS_FOR_OTHERS
from raytune.clusters.provider import KUBERAY, Target
from raytune.config.load import config_from
from raytune.errors import UserError
from tests.cluster.cases import INSTANCES, MARKETS, PLANNED, manifests_of, nodes_by_plan, spec_of, text_of
from tests.variants import chequered
from tests.yaml_text import read_yaml

CRDS = Path(__file__).parent / "crds"
QUEUED = {"provider": {"kubernetes": {"queue": "gpus", "storage_claim": "runs"}}}


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON Schema that refuses unknown keys, as the API server does on request, from a schema of a custom resource."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    dropped = ("description", "format", "default")
    plain = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes") and key not in dropped}
    if "properties" in schema:
        plain["properties"] = {key: strict(value) for key, value in schema["properties"].items()}
        # The API server fills in defaults before it looks for what is missing.
        plain["required"] = [key for key in schema.get("required", []) if "default" not in schema["properties"].get(key, {})]
        if not schema.get("x-kubernetes-preserve-unknown-fields") and "additionalProperties" not in schema:
            plain["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            plain[key] = strict(schema[key])
    return plain


@cache
def validator(kind: str) -> Draft202012Validator:
    definition = yaml.load(gzip.decompress((CRDS / f"ray.io_{kind}.yaml.gz").read_bytes()), Loader=yaml.CSafeLoader)
    (version,) = [version for version in definition["spec"]["versions"] if version["name"] == "v1"]
    return Draft202012Validator(strict(version["schema"]["openAPIV3Schema"]))


def problems(manifest: dict[str, Any]) -> list[str]:
    kind = {"RayJob": "rayjobs", "RayCluster": "rayclusters"}[manifest["kind"]]
    assert manifest["apiVersion"] == "ray.io/v1"
    # `metadata` of custom resources is the API server's own affair.
    bare = manifest | {"metadata": {}}
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in validator(kind).iter_errors(bare)]


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"].get("rayClusterSpec", manifest["spec"])


def test_the_schemas_refuse_what_the_operator_would() -> None:
    manifest = manifests_of("p5.48xlarge", "kuberay")[-1]
    for break_it in (
        lambda spec: spec.update(submissionMode=5),
        lambda spec: spec.update(backofLimit=0),
        lambda spec: spec["rayClusterSpec"]["authOptions"].update(mode="tok"),
        lambda spec: spec["rayClusterSpec"]["workerGroupSpecs"][0].pop("groupName"),
        lambda spec: spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0].update(volumeMount=[]),
    ):
        broken = copy.deepcopy(manifest)
        break_it(broken["spec"])
        assert problems(broken)


@pytest.mark.parametrize(("instance", "market", "target"), chequered([*INSTANCES], [*MARKETS], KUBERAY))
def test_every_manifest_fits_the_schema(instance: str, market: str, target: Target) -> None:
    sections = copy.deepcopy(MARKETS[market])
    assert problems(manifests_of(instance, target, **sections)[-1]) == []


@pytest.mark.parametrize("target", KUBERAY)
@pytest.mark.parametrize(("instance", "size"), PLANNED)
def test_manifests_for_7b_to_70b_ask_for_all_gpus_of_their_nodes(instance: str, size: str, target: Target) -> None:
    nodes = nodes_by_plan(size, instance)
    manifest = manifests_of(instance, target, name=f"llama-{size}", nodes=nodes)[-1]
    assert problems(manifest) == []
    (group,) = cluster_of(manifest)["workerGroupSpecs"]
    assert [group[key] for key in ("minReplicas", "maxReplicas")] == [0, nodes], "idle GPUs are released"
    assert group["replicas"] == (nodes if target == "kuberay" else 0), "a job starts with all of its nodes"
    (container,) = group["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert container["resources"]["limits"] == container["resources"]["requests"]


def test_a_job_does_not_wait_unseen_is_not_repeated_blindly_and_leaves_nothing_behind() -> None:
    spec = manifests_of("p5.48xlarge", "kuberay")[-1]["spec"]
    assert spec["submissionMode"] == "SidecarMode"
    assert spec["backoffLimit"] == 0
    assert spec["preRunningDeadlineSeconds"] > 0
    assert spec["shutdownAfterJobFinishes"]
    assert spec["entrypointNumCpus"] > 0, "the driver must not land on the head"
    assert spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_the_job_trains_the_run_that_was_rendered() -> None:
    config_map, job = manifests_of("p5.48xlarge", "kuberay", name="my.run", training={"max_steps": 7})
    run = config_from(read_yaml(config_map["data"]["run.yaml"]))
    assert (run.name, run.training.max_steps) == ("my.run", 7)
    folder, _, name = job["spec"]["entrypoint"].rpartition(" ")[2].rpartition("/")
    assert name in config_map["data"]
    for group in (cluster_of(job)["headGroupSpec"], *cluster_of(job)["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        (mount,) = [mount for mount in container["volumeMounts"] if mount["mountPath"] == folder]
        (volume,) = [volume for volume in group["template"]["spec"]["volumes"] if volume["name"] == mount["name"]]
        assert volume["configMap"]["name"] == config_map["metadata"]["name"]


@pytest.mark.parametrize("target", KUBERAY)
def test_a_queue_starts_all_pods_or_none_and_without_one_the_autoscaler_replaces_nodes(target: Target) -> None:
    queued = manifests_of("p5.48xlarge", target, **copy.deepcopy(QUEUED))[-1]
    assert problems(queued) == []
    assert queued["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "gpus"}
    assert queued["spec"]["suspend"] is True
    assert "enableInTreeAutoscaling" not in cluster_of(queued), "Kueue admits no job whose size may change"
    (group,) = cluster_of(queued)["workerGroupSpecs"]
    assert [group[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [2, 2, 2]
    alone = manifests_of("p5.48xlarge", target)[-1]
    assert "suspend" not in alone["spec"]
    assert cluster_of(alone)["autoscalerOptions"]["version"] == "v2"


@pytest.mark.parametrize("instance", INSTANCES)
def test_shared_memory_is_a_large_volume_inside_the_memory_that_the_pod_asks_for(instance: str) -> None:
    spec = spec_of(instance, "kuberay")
    (group,) = cluster_of(manifests_of(instance, "kuberay")[-1])["workerGroupSpecs"]
    pod = group["template"]["spec"]
    (memory,) = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shared-memory"]
    asked = pod["containers"][0]["resources"]["limits"]
    assert memory["medium"] == "Memory"
    assert int(memory["sizeLimit"].removesuffix("Gi")) < int(asked["memory"].removesuffix("Gi")) / 2
    assert int(asked["memory"].removesuffix("Gi")) * 2**30 < spec.instance.host_memory_bytes
    assert int(asked["cpu"]) == spec.instance.num_cpus - CPUS_FOR_OTHERS
    assert {"name": "shared-memory", "mountPath": "/dev/shm"} in pod["containers"][0]["volumeMounts"]


@pytest.mark.parametrize(("instance", "efa"), [("p4d.24xlarge", 4), ("p5.48xlarge", 32), ("p5en.48xlarge", 16)])
def test_pods_on_aws_ask_for_all_efa_cards(instance: str, efa: int) -> None:
    (group,) = cluster_of(manifests_of(instance, "kuberay")[-1])["workerGroupSpecs"]
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["vpc.amazonaws.com/efa"] == efa


def test_infiniband_is_asked_for_under_the_name_that_the_cluster_gives_it_and_missed_aloud_without() -> None:
    named = {"provider": {"kubernetes": {"rdma_resource": "rdma/ib", "storage_claim": "runs"}}}
    (group,) = cluster_of(manifests_of("Standard_ND96isr_H100_v5", "kuberay", **named)[-1])["workerGroupSpecs"]
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["rdma/ib"] == 8
    assert "ATTENTION: set provider.kubernetes.rdma_resource" in text_of("Standard_ND96isr_H100_v5", "kuberay")
    assert "ATTENTION: GPUDirect on GKE" in text_of("a3-megagpu-8g", "kuberay")
    assert "talk over TCP, 25 GB/s at most instead of the 200 GB/s" in text_of("a3-megagpu-8g", "kuberay").replace("\n# ", " ")


@pytest.mark.parametrize("name", ["x" * 63, "7b.lora"])
def test_names_keep_to_the_operators_limits(name: str) -> None:
    for target in KUBERAY:
        given = manifests_of("p5.48xlarge", target, name=name)[-1]["metadata"]["name"]
        assert len(given) <= 47  # utils.MaxRayJobNameLength
        assert given[0].isalpha()
        assert given.replace("-", "").isalnum()


RELATIVE: dict[str, dict[str, Any]] = {
    "data.train": {"data": {"train": "./tickets.jsonl"}},
    "data.template": {"data": {"train": "/data/tickets.jsonl", "template": "./own.jinja"}},
    "model.base": {"model": {"base": "./my-model"}},
    "strategy.objective": {"strategy": {"objective": "./my_losses.py:focal"}},
    "callbacks": {"callbacks": ["./my_callbacks.py:note"]},
}


@pytest.mark.parametrize("key", RELATIVE)
def test_what_lies_in_this_folder_only_is_refused_since_no_pod_has_it(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.jinja").write_text("{{ messages }}")
    with pytest.raises(UserError, match=rf"{key}: \./.* is relative to this folder"):
        text_of("p5.48xlarge", "kuberay", **RELATIVE[key])


def test_a_job_does_not_train_in_another_cluster_than_its_own() -> None:
    with pytest.raises(UserError, match=r"cluster\.address: 10.0.0.1:6379 is another cluster than the RayJob starts"):
        text_of("p5.48xlarge", "kuberay", cluster={"address": "10.0.0.1:6379"})
    assert text_of("p5.48xlarge", "kuberay", cluster={"address": "auto"})


def test_code_that_the_container_has_is_no_reason_to_refuse_a_job() -> None:
    named: dict[str, Any] = {
        "strategy": {"objective": "/opt/code/my_losses.py:focal"},
        "callbacks": ["my_package.callbacks:note"],
    }
    assert "/opt/code/my_losses.py:focal" in text_of("p5.48xlarge", "kuberay", **named)


def test_a_job_for_a_sweep_is_refused_because_it_would_train_one_run() -> None:
    sections = {"sweep": {"space": {"adapter.rank": [4, 8]}}, "data": {"validation": "demo:validation"}}
    with pytest.raises(UserError, match="This is a sweep"):
        text_of("p5.48xlarge", "kuberay", **sections)
