"""Nothing of a cluster is open to the world, every call carries a token, and no secret stands in a file."""

import json
import os
import re
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raytune.clusters.provider import KUBERAY, Target
from raytune.config.problems import ConfigError
from raytune.token_file import make_token
from tests.cluster.cases import CLIENT, CLOUDS, FAMILIES, INSTANCES, data_of, manifests_of, spec_of, text_of
from tests.yaml_text import read_yaml

IN_CLOUDS = [instance for instance in INSTANCES if CLOUDS[instance] != "on-prem"]
ROOT = Path(__file__).parents[2]
THE_WORLD = ("0.0.0.0/0", "::/0")


def leaves(data: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(data, dict):
        for key, value in data.items():
            yield from leaves(value, (*path, str(key)))
    elif isinstance(data, list):
        for value in data:
            yield from leaves(value, path)
    else:
        yield path, data


@pytest.mark.parametrize("instance", INSTANCES)
def test_every_ray_command_carries_token_mode_and_the_token_comes_as_a_file(instance: str) -> None:
    config = data_of(instance)
    for command in config["head_start_ray_commands"] + config["worker_start_ray_commands"]:
        assert "export RAY_AUTH_MODE=token" in command.split("ray st")[0]
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "RAY_AUTH_TOKEN" not in text_of(instance).replace("RAY_AUTH_TOKEN_PATH", "")


@pytest.mark.parametrize("instance", INSTANCES)
def test_no_file_for_ray_names_the_world_or_opens_a_port(instance: str) -> None:
    assert not [value for _, value in leaves(data_of(instance)) if isinstance(value, str) and any(w in value for w in THE_WORLD)]
    # Ray adds port 22 from everywhere to a group that it makes, whatever provider.security_group says; so it makes none.
    assert "security_group" not in data_of(instance)["provider"]


@pytest.mark.parametrize("instance", FAMILIES["aws"])
def test_aws_machines_have_our_group_imdsv2_encrypted_disks_and_a_role_of_their_own(instance: str) -> None:
    for kind, node in data_of(instance)["available_node_types"].items():
        config = node["node_config"]
        groups = {group for interface in config.get("NetworkInterfaces", []) for group in interface["Groups"]}
        assert groups | set(config.get("SecurityGroupIds", [])) == {"sg-0a1b2c3d4e5f60718"}
        assert config["MetadataOptions"]["HttpTokens"] == "required"
        assert config["MetadataOptions"]["HttpPutResponseHopLimit"] == 1
        assert all(disk["Ebs"]["Encrypted"] for disk in config["BlockDeviceMappings"])
        assert config["IamInstanceProfile"] == {"Name": f"raytune-example-{'head' if kind == 'head' else 'worker'}"}
        assert config["ImageId"].startswith("ami-"), "Ray's own default is an image of 2018"


@pytest.mark.parametrize("instance", IN_CLOUDS)
def test_no_cloud_machine_has_a_public_address(instance: str) -> None:
    assert data_of(instance)["provider"]["use_internal_ips"] is True
    assert not [path for path, _ in leaves(data_of(instance)) if {"accessConfigs", "AssociatePublicIpAddress"} & set(path)]


def test_a_machine_of_ones_own_offers_its_dashboard_on_the_address_that_was_named() -> None:
    assert "--dashboard-host=10.0.0.1" in data_of("dgx-h100")["head_start_ray_commands"][-1]


@pytest.mark.parametrize("storage", ["s3://bucket/runs", "/shared/runs"])
def test_the_aws_network_lets_in_port_22_from_one_range_and_the_nodes_themselves(storage: str) -> None:
    resources = data_of("p5.48xlarge", "network", storage=storage)["Resources"]
    inbound = resources["SecurityGroup"]["Properties"]["SecurityGroupIngress"]
    assert [(rule["FromPort"], rule["ToPort"], rule["CidrIp"]) for rule in inbound] == [(22, 22, CLIENT)]
    itself = {"Fn::GetAtt": ["SecurityGroup", "GroupId"]}
    more = [resource["Properties"] for resource in resources.values() if resource["Type"] == "AWS::EC2::SecurityGroupIngress"]
    assert [(rule["SourceSecurityGroupId"], rule["IpProtocol"]) for rule in more] == [(itself, "-1")]
    out = [resource["Properties"] for resource in resources.values() if resource["Type"] == "AWS::EC2::SecurityGroupEgress"]
    assert [(rule["DestinationSecurityGroupId"], rule["IpProtocol"]) for rule in out] == [(itself, "-1")]


@pytest.mark.parametrize("storage", ["s3://bucket/runs", "/shared/runs"])
def test_aws_roles_can_do_what_head_and_workers_need_and_no_more(storage: str) -> None:
    resources = data_of("p5.48xlarge", "network", storage=storage)["Resources"]

    def statements(role: str) -> list[dict[str, Any]]:
        policies = resources[role]["Properties"].get("Policies", [])
        return [statement for policy in policies for statement in policy["PolicyDocument"]["Statement"]]

    everything = [*statements("HeadRole"), *statements("WorkerRole")]
    actions = [action for statement in everything for action in as_list(statement["Action"])]
    assert not [action for action in actions if "*" in action]
    assert {action for action in actions if action.startswith("iam:")} == {"iam:PassRole"}
    for statement in everything:
        if statement["Resource"] == "*":
            assert all(action.startswith("ec2:Describe") for action in statement["Action"])
    (ending,) = [statement for statement in everything if "ec2:TerminateInstances" in statement["Action"]]
    assert ending["Condition"] == {"StringEquals": {"aws:ResourceTag/ray-cluster-name": "example"}}
    in_buckets = {statement["Resource"] for statement in statements("WorkerRole")}
    assert in_buckets == ({"arn:aws:s3:::bucket", "arn:aws:s3:::bucket/*"} if storage.startswith("s3") else set())


def as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def recorded_gcloud(script: str, tmp_path: Path) -> list[list[str]]:
    """Run a network script with a gcloud that only writes down what it is asked."""
    log = tmp_path / "calls"
    stub = tmp_path / "gcloud"
    stub.write_text(f'#!/bin/bash\nprintf "%s\\0" "$@" >> {log}; printf "\\n" >> {log}\n')
    stub.chmod(0o755)
    subprocess.run(["bash", "-c", script], env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}, check=True)
    return [line.split("\0")[:-1] for line in log.read_text().splitlines()]


@pytest.mark.parametrize(("instance", "networks"), [("a2-ultragpu-8g", 1), ("a3-highgpu-8g", 5), ("a3-megagpu-8g", 9)])
def test_the_gcp_networks_let_in_port_22_from_one_range_and_the_nodes_themselves(
    instance: str, networks: int, tmp_path: Path
) -> None:
    calls = recorded_gcloud(text_of(instance, "network", storage="gs://bucket/runs"), tmp_path)
    made = {call[3] for call in calls if call[:3] == ["compute", "networks", "create"]}
    assert len(made) == networks
    rules = [
        dict(option.partition("=")[::2] for option in call[4:])
        for call in calls
        if call[:3] == ["compute", "firewall-rules", "create"]
    ]
    ssh = [rule for rule in rules if rule["--allow"] == "tcp:22"]
    assert [rule["--source-ranges"] for rule in ssh] == [CLIENT]
    others = [rule for rule in rules if rule not in ssh]
    assert {rule["--network"] for rule in others} == made
    assert all(re.fullmatch(r"10\.1[23]\d\.0\.0/20", rule["--source-ranges"]) for rule in others)
    subnets = {call[4] for call in calls if call[:4] == ["compute", "networks", "subnets", "create"]}
    used = {
        interface["subnetwork"].rpartition("/")[2]
        for node in data_of(instance)["available_node_types"].values()
        for interface in node["node_config"]["networkInterfaces"]
    }
    assert used == subnets, "the cluster file uses the networks that this script makes"


def test_the_azure_network_lets_in_port_22_from_one_range_and_the_nodes_themselves() -> None:
    group, network = json.loads(text_of("Standard_ND96isr_H100_v5", "network"))["resources"]
    rules = [
        rule["properties"] for rule in sorted(group["properties"]["securityRules"], key=lambda r: r["properties"]["priority"])
    ]
    allowed = [(rule["sourceAddressPrefix"], rule["destinationPortRange"]) for rule in rules if rule["access"] == "Allow"]
    assert allowed == [(CLIENT, "22"), ("10.77.0.0/16", "*")]
    assert rules[-1]["access"] == "Deny"
    assert rules[-1]["sourceAddressPrefix"] == "*"
    (subnet,) = network["properties"]["subnets"]
    assert "raytune-example" in subnet["properties"]["networkSecurityGroup"]["id"]
    # Ray looks for a virtual network with its unique_id in the name, and keeps the properties of its first subnet.
    provider = data_of("Standard_ND96isr_H100_v5")["provider"]
    assert network["name"] == f"ray-example-{provider['unique_id']}-vnet"
    assert subnet["name"] == f"ray-example-{provider['unique_id']}-subnet"
    assert network["properties"]["addressSpace"]["addressPrefixes"] == [provider["subnet_mask"]]


@pytest.mark.parametrize("range_of_clients", ["0.0.0.0/0", "128.0.0.0/1", "10.0.0.0/7", "::/0", "my-laptop"])
def test_a_range_that_is_the_world_or_none_is_refused(range_of_clients: str) -> None:
    with pytest.raises(ConfigError, match="client_cidr"):
        spec_of("p5.48xlarge", "network", provider={"client_cidr": range_of_clients})


@pytest.mark.parametrize("key", ["key_name", "subnet", "machine_image", "token_file", "ssh_user", "jump_host", "shared_export"])
@pytest.mark.parametrize("evil", ["$(reboot)", "a; reboot", "a\nprovider: {}", "`reboot`", "a'b", 'a"b', "a b"])
def test_text_that_a_shell_or_yaml_would_act_on_is_refused(key: str, evil: str) -> None:
    with pytest.raises(ConfigError):
        spec_of("p5.48xlarge", provider={key: evil})


@pytest.mark.parametrize("image", ["rayproject/ray:latest", "registry.example.com/raytune:1.0", "raytune@sha256:abc"])
def test_an_image_without_its_digest_is_refused(image: str) -> None:
    with pytest.raises(ConfigError, match="digest"):
        spec_of("p5.48xlarge", provider={"container": image})


@pytest.mark.parametrize("target", KUBERAY)
@pytest.mark.parametrize("instance", INSTANCES)
def test_pods_run_as_nobody_in_particular_with_secrets_as_files_and_a_token(instance: str, target: Target) -> None:
    cluster = manifests_of(instance, target)[-1]["spec"]
    cluster = cluster.get("rayClusterSpec", cluster)
    assert cluster["authOptions"] == {"mode": "token", "secretName": "raytune-token"}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] > 0
        (container,) = pod["containers"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
        assert not container["securityContext"].get("privileged")
        assert not pod.get("hostNetwork")
        assert not [
            entry for entry in container["env"] if "valueFrom" in entry or entry["name"] in ("HF_TOKEN", "RAY_AUTH_TOKEN")
        ]
        (secret,) = [volume for volume in pod["volumes"] if "secret" in volume]
        assert secret["secret"] == {"secretName": "hub-token", "defaultMode": 0o440}
    assert all(group["template"]["spec"]["automountServiceAccountToken"] is False for group in cluster["workerGroupSpecs"])


def test_the_config_that_kubernetes_gets_leaves_out_what_is_known_about_the_users_network() -> None:
    config_map, _ = manifests_of("p5.48xlarge", "kuberay")
    assert CLIENT not in config_map["data"]["run.yaml"]


def test_shipped_templates_hold_no_secret_and_no_address_of_ours() -> None:
    for path in [*(ROOT / "cluster").rglob("*"), *(ROOT / "configs").rglob("*.yaml")]:
        if path.is_file():
            text = path.read_text()
            assert not re.search(r"hf_[A-Za-z]{8}|AKIA[A-Z0-9]{8}|BEGIN [A-Z ]*PRIVATE KEY", text), path


def test_a_token_is_made_once_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "ray" / "auth_token"
    before = os.umask(0)
    try:
        assert make_token(path)
    finally:
        os.umask(before)
    token = path.read_text()
    assert re.fullmatch(r"[0-9a-f]{64}", token)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)  # as Ray writes it
    assert not make_token(path)
    assert path.read_text() == token
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_yaml_of_every_target_is_read_the_same_by_a_yaml_1_1_reader() -> None:
    """kubectl, Ray and AWS read YAML 1.1, where `on`, `yes` and 0440 are not what they look like."""
    for instance in INSTANCES:
        assert all(isinstance(key, str) for path, _ in leaves(read_yaml(text_of(instance))) for key in path)


TO_BE_TEXT = ["2024-01-05", "1234", "017", "5e1", "true", "null"]
"""Names that clouds and Kubernetes allow, and that YAML takes for something else than text."""
KUBERNETES = ("namespace", "queue", "storage_claim", "token_secret", "hub_secret")
NAMED: dict[tuple[str, Target], tuple[str, ...]] = {
    ("p5.48xlarge", "ray-up"): ("key_name", "subnet", "security_group", "reservation", "machine_image"),
    ("p5.48xlarge", "network"): ("network",),
    ("a3-megagpu-8g", "ray-up"): ("account", "reservation", "machine_image"),
    ("Standard_ND96isr_H100_v5", "ray-up"): ("account",),
}


@pytest.mark.parametrize("text", TO_BE_TEXT)
def test_names_that_look_like_numbers_dates_or_truths_stay_text(text: str) -> None:
    name = text if text.isalpha() else "example"
    for (instance, target), keys in NAMED.items():
        plain = data_of(instance, target, name=name, provider=dict.fromkeys(keys, "plain"))
        assert data_of(instance, target, name=name, provider=dict.fromkeys(keys, text)) == renamed(plain, text)
    assert data_of("Standard_ND96isr_H100_v5", provider={"resource_group": text})["provider"]["resource_group"] == text
    assert data_of("p5.48xlarge", name=name)["cluster_name"] == name
    for target in KUBERAY:
        plain, odd = (
            manifests_of("p5.48xlarge", target, name=name, provider={"kubernetes": dict.fromkeys(KUBERNETES, value)})
            for value in ("plain", text)
        )
        assert odd == renamed(plain, text)
        assert odd[-1]["metadata"]["name"] == name


def renamed(data: Any, text: str) -> Any:
    return json.loads(json.dumps(data).replace("plain", text))


def test_roles_in_other_partitions_of_aws_name_what_lies_there() -> None:
    for region, start in {"us-gov-west-1": "arn:aws-us-gov:", "cn-north-1": "arn:aws-cn:", "us-west-2": "arn:aws:"}.items():
        network = data_of("p5.48xlarge", "network", storage="s3://bucket/runs", provider={"region": region})
        names = [value for _, value in leaves(network) if isinstance(value, str) and value.startswith("arn:")]
        assert names
        assert all(name.startswith(start) for name in names)
