"""AWS files against a stand-in for AWS (moto): the network file makes what the cluster file names, and Ray asks for what it says.

What counts is what the stand-in received: the text of the requests, recorded by itself.
"""

import base64
import copy
import json
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import parse_qsl

import boto3
import pytest
from moto.moto_api import recorder
from moto.server import ThreadedMotoServer
from ray.autoscaler._private.aws import node_provider
from ray.autoscaler._private.aws.utils import resource_cache
from ray.autoscaler._private.commands import _bootstrap_config
from ray.autoscaler._private.providers import _get_node_provider
from ray.autoscaler.tags import NODE_KIND_HEAD, NODE_KIND_WORKER, TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

from tests.cluster.cases import CLIENT, data_of, text_of

BLOCK = {"reservation": "cr-0a1b2c3d4e5f60718", "capacity_block": True}


@dataclass(frozen=True)
class StandIn:
    """AWS, with a subnet, a key pair and the network stack of the cluster `example`."""

    url: str
    user: dict[str, Any]
    """What of the `provider` section is true here."""

    def start_recording(self) -> None:
        for verb in ("reset-recording", "start-recording"):
            urllib.request.urlopen(urllib.request.Request(f"{self.url}/moto-api/recorder/{verb}", method="POST"))

    def requests(self, action: str) -> list[dict[str, str]]:
        """Parameters of the EC2 requests of a kind since the recording started, by AWS's own flat names."""
        with urllib.request.urlopen(f"{self.url}/moto-api/recorder/download-recording") as answer:
            recorded = [json.loads(line) for line in answer.read().decode().splitlines()]
        bodies = [base64.b64decode(one["body"]).decode() if one["body_encoded"] else one["body"] or "" for one in recorded]
        forms = [dict(parse_qsl(body)) for body in bodies]
        return [form for form in forms if form.get("Action") == action]


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    folder = tmp_path_factory.mktemp("aws")
    key = folder / "key.pem"
    key.write_text("not a real key; Ray only hashes it here")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "ACCESS_KEY_ID": "x",
            "SECRET_ACCESS_KEY": "x",
            "DEFAULT_REGION": "us-east-1",
            "ENDPOINT_URL": url,
        }.items():
            patch.setenv(f"AWS_{name}", value)
        # Its environment variable counts only before moto is imported; without either it records into the working directory.
        patch.setattr(recorder, "_location", str(folder / "recording"))
        # Ray asks for all types of machines for every file, which are a megabyte of XML and the same each time.
        patch.setattr(node_provider, "list_ec2_instances", cache(node_provider.list_ec2_instances))
        resource_cache.cache_clear()
        ec2, stacks = boto3.client("ec2"), boto3.client("cloudformation")
        vpc = ec2.create_vpc(CidrBlock="10.77.0.0/16")["Vpc"]["VpcId"]
        subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.77.0.0/24", AvailabilityZone="us-east-1a")["Subnet"]["SubnetId"]
        ec2.create_key_pair(KeyName="my-key")
        image = ec2.describe_images()["Images"][0]["ImageId"]
        user = {"network": vpc, "subnet": subnet, "machine_image": image, "ssh_key": str(key)}
        network = text_of("p5.48xlarge", "network", storage="s3://bucket/runs", provider=user)
        stacks.create_stack(StackName="raytune-example", TemplateBody=network, Capabilities=["CAPABILITY_NAMED_IAM"])
        (output,) = stacks.describe_stacks(StackName="raytune-example")["Stacks"][0]["Outputs"]
        yield StandIn(url, user | {"security_group": output["OutputValue"]})
        resource_cache.cache_clear()
    server.stop()


def prepared(stand_in: StandIn, instance: str, **sections: Any) -> dict[str, Any]:
    """A file as `ray up` prepares it: the schema, defaults, then subnets, roles and keys looked up or made."""
    provider = {**stand_in.user, **sections.pop("provider", {})}
    return _bootstrap_config(data_of(instance, provider=provider, **sections), no_config_cache=True)


def launched(stand_in: StandIn, config: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The requests by which Ray starts the head and a GPU node of a file that is prepared."""
    nodes = _get_node_provider(config["provider"], config["cluster_name"], use_cache=False)
    requests = {}
    for kind in ("head", "gpu"):
        tags = {TAG_RAY_NODE_KIND: NODE_KIND_HEAD if kind == "head" else NODE_KIND_WORKER, TAG_RAY_USER_NODE_TYPE: kind}
        stand_in.start_recording()
        nodes.create_node(copy.deepcopy(config["available_node_types"][kind]["node_config"]), tags, 1)
        (requests[kind],) = stand_in.requests("RunInstances")
    started = nodes.non_terminated_nodes({})
    assert len(started) == 2
    nodes.terminate_nodes(started)
    return requests


def named(request: dict[str, str], prefix: str) -> dict[str, str]:
    """Parameters below a name."""
    return {key.removeprefix(f"{prefix}."): value for key, value in request.items() if key.startswith(f"{prefix}.")}


def test_the_network_file_makes_a_group_that_lets_in_one_range_and_itself(stand_in: StandIn) -> None:
    (group,) = boto3.client("ec2").describe_security_groups(GroupIds=[stand_in.user["security_group"]])["SecurityGroups"]
    ssh, among = sorted(group["IpPermissions"], key=lambda rule: rule["IpProtocol"], reverse=True)
    assert (ssh["FromPort"], ssh["ToPort"], [entry["CidrIp"] for entry in ssh["IpRanges"]]) == (22, 22, [CLIENT])
    assert (among["IpProtocol"], among["IpRanges"]) == ("-1", [])
    assert [pair["GroupId"] for pair in among["UserIdGroupPairs"]] == [group["GroupId"]]


def test_the_network_file_makes_the_roles_that_the_cluster_file_names(stand_in: StandIn) -> None:
    iam = boto3.client("iam")
    for kind, policies in (("head", {"start-and-end-nodes", "runs"}), ("worker", {"runs"})):
        profile = iam.get_instance_profile(InstanceProfileName=f"raytune-example-{kind}")["InstanceProfile"]
        (role,) = profile["Roles"]
        assert set(iam.list_role_policies(RoleName=role["RoleName"])["PolicyNames"]) == policies
        assert iam.list_attached_role_policies(RoleName=role["RoleName"])["AttachedPolicies"] == []


@dataclass(frozen=True)
class Prepared:
    config: dict[str, Any]
    made: list[dict[str, str]]
    """Requests by which Ray made groups, roles and keys for it."""


@pytest.fixture(scope="module")
def p5(stand_in: StandIn) -> Prepared:
    stand_in.start_recording()
    config = prepared(stand_in, "p5.48xlarge", provider=BLOCK)
    kinds = ("CreateSecurityGroup", "AuthorizeSecurityGroupIngress", "CreateKeyPair", "CreateRole", "CreateInstanceProfile")
    return Prepared(config, [request for kind in kinds for request in stand_in.requests(kind)])


def test_ray_asks_for_p5_machines_with_efa_on_all_cards_as_written(stand_in: StandIn, p5: Prepared) -> None:
    gpu = launched(stand_in, p5.config)["gpu"]
    assert (gpu["InstanceType"], gpu["MinCount"], gpu["MaxCount"]) == ("p5.48xlarge", "1", "1")
    cards = [named(gpu, f"NetworkInterface.{number}") for number in range(1, 33)]
    assert [card["NetworkCardIndex"] for card in cards] == [str(number) for number in range(32)]
    assert {card["InterfaceType"] for card in cards} == {"efa", "efa-only"}
    assert {(card["SubnetId"], card["SecurityGroupId.1"]) for card in cards} == {
        (stand_in.user["subnet"], stand_in.user["security_group"])
    }
    assert "Placement.GroupName" not in gpu, "a capacity block lies where it was bought"
    assert gpu["InstanceMarketOptions.MarketType"] == "capacity-block"
    assert gpu["CapacityReservationSpecification.CapacityReservationTarget.CapacityReservationId"] == BLOCK["reservation"]


@pytest.mark.parametrize(
    "instance", ["p5en.48xlarge", *(pytest.param(name, marks=pytest.mark.slow) for name in ("p4d.24xlarge", "g5.12xlarge"))]
)
def test_head_and_workers_get_their_role_group_disk_and_imdsv2(stand_in: StandIn, instance: str) -> None:
    for kind, request in launched(stand_in, prepared(stand_in, instance)).items():
        assert request["IamInstanceProfile.Name"] == f"raytune-example-{'head' if kind == 'head' else 'worker'}"
        assert request["MetadataOptions.HttpTokens"] == "required"
        assert request["BlockDeviceMapping.1.Ebs.Encrypted"] == "true"
        assert request["BlockDeviceMapping.1.Ebs.VolumeType"] == "gp3"
        assert request["ImageId"] == stand_in.user["machine_image"]
        assert request["KeyName"] == "my-key"
        groups = {value for key, value in request.items() if ".SecurityGroupId." in f".{key}"}
        assert groups == {stand_in.user["security_group"]}
        assert "InstanceMarketOptions.MarketType" not in request
        assert request.get("Placement.GroupName") == ("raytune-example" if kind == "gpu" else None)


def test_spot_is_asked_for_by_workers_only(stand_in: StandIn) -> None:
    requests = launched(stand_in, prepared(stand_in, "p4de.24xlarge", cluster={"spot": True}))
    assert requests["gpu"]["InstanceMarketOptions.MarketType"] == "spot"
    assert "InstanceMarketOptions.MarketType" not in requests["head"]


def test_ray_makes_no_group_role_or_key_of_its_own(p5: Prepared) -> None:
    """Its own group would let everybody reach port 22, its own role could do anything with EC2 and S3."""
    assert p5.made == []


def test_rays_own_group_would_be_open_to_the_world(stand_in: StandIn) -> None:
    """Why the group is ours: `provider.security_group` adds rules to Ray's, and takes none away. Ray 2.60."""
    from ray.autoscaler._private.aws.config import _create_default_inbound_rules

    mine = [{"FromPort": 22, "ToPort": 22, "IpProtocol": "tcp", "IpRanges": [{"CidrIp": CLIENT}]}]
    ranges = [entry["CidrIp"] for rule in _create_default_inbound_rules(["sg-1"], mine) for entry in rule.get("IpRanges", [])]
    assert "0.0.0.0/0" in ranges
