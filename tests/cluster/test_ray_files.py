"""Every `ray up` file passes Ray's own validation and the cloud's, and says nothing that Ray would silently ignore."""

import copy
import json
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from ray.autoscaler._private.util import prepare_config, validate_config

from raytune.cli import cli
from raytune.clusters.provider import KUBERAY, Target, cluster_name, cluster_spec
from raytune.config.load import config_from
from raytune.config.problems import ConfigError
from raytune.errors import UserError
from raytune.plan.costs.hardware import load_catalogue
from tests.cluster.cases import (
    CLOUDS,
    FACTS,
    FAMILIES,
    INSTANCES,
    MARKETS,
    OFFERS,
    PLANNED,
    data_of,
    nodes_by_plan,
    spec_of,
    text_of,
)
from tests.variants import chequered
from tests.yaml_text import read_yaml

AWS, GCP, AZURE = FAMILIES["aws"], FAMILIES["gcp"], FAMILIES["azure"]
ROOT = Path(__file__).parents[2]


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """What Ray makes of a file before it calls a cloud."""
    config = prepare_config(copy.deepcopy(config))
    validate_config(config)
    return config


@pytest.mark.parametrize(
    ("instance", "provider", "refusal"),
    [
        ("Standard_ND96isr_H100_v5", {"reservation": "r-1"}, "reservation: only AWS and GCP"),
        ("dgx-h100", {"reservation": "r-1"}, "reservation: only AWS and GCP"),
        ("a3-megagpu-8g", {"reservation": "r-1", "capacity_block": True}, "capacity_block: only AWS"),
        ("p5.48xlarge", {"resource_group": "rt"}, "resource_group: only Azure files name one; drop it"),
        ("p5.48xlarge", {"account": "my-project"}, "account: only GCP and Azure files name one"),
        ("a3-megagpu-8g", {"subnet": "subnet-0a1b2c3d"}, "subnet: only AWS files name one"),
        ("dgx-h100", {"key_name": "my-key"}, "key_name: only AWS files name one"),
        ("Standard_ND96isr_H100_v5", {"nccl_profile": "/x/y"}, "nccl_profile: only GCP files name one"),
    ],
)
def test_reservations_that_a_file_would_not_ask_for_are_refused(instance: str, provider: dict[str, Any], refusal: str) -> None:
    with pytest.raises(UserError, match=f"provider.{refusal}"):
        text_of(instance, provider=provider)


@pytest.mark.parametrize("storage", ["file:///home/me/runs", "/shared/../home/me/runs", "/home/me/runs", "runs"])
@pytest.mark.parametrize("target", ["ray-up", "kuberay", "kuberay-cluster"])
def test_storage_of_one_machine_is_refused_however_it_is_written(target: Target, storage: str) -> None:
    with pytest.raises(UserError, match=f"storage: {re.escape(storage)} is on one machine"):
        text_of("p5.48xlarge", target, storage=storage)
    assert "--volume=/shared:/shared" in text_of("p5.48xlarge", storage="file:///shared/runs")


@pytest.mark.parametrize("mount_point", ["~", "~/runs", "/"])
def test_shared_storage_lies_at_one_place_for_every_user(mount_point: str) -> None:
    with pytest.raises(ConfigError, match=r"provider\.mount_point"):
        spec_of("p5.48xlarge", provider={"mount_point": mount_point})


def test_more_workers_than_the_cluster_has_gpus_are_refused() -> None:
    with pytest.raises(UserError, match=r"cluster\.workers: 17, but 2 x p5.48xlarge have 16 GPUs; set it to 16 or less"):
        text_of("p5.48xlarge", cluster={"workers": 17})
    assert text_of("p5.48xlarge", cluster={"workers": 16})


def test_long_names_that_begin_alike_are_two_clusters() -> None:
    """The second one's file would start, change or end the first one's machines otherwise."""
    names = [f"llama-3.1-70b-instruct-customer-support-{version}" for version in ("v1", "v2")]
    specs = [spec_of("a3-megagpu-8g", name=name) for name in names]
    assert len({spec.name for spec in specs}) == 2
    assert cluster_name("llama-3.1-8b") == "llama-3-1-8b"
    accounts = {data_of("a3-megagpu-8g", name=name)["available_node_types"]["gpu"]["node_config"]["serviceAccounts"][0]["email"]
                for name in names}  # fmt: skip
    assert len(accounts) == 2
    for spec in specs:  # https://cloud.google.com/compute/docs/naming-resources
        assert len(f"raytune-{spec.name}-gpu-7-among-nodes") <= 63


def test_a_file_is_written_into_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    overrides = ["cluster.instance=p5.48xlarge", "storage=/shared/runs", "provider.client_cidr=203.0.113.0/24"]
    overrides.append("provider.network=vpc-0a1b2c3d")
    target = tmp_path / "new" / "network.yaml"
    done = CliRunner().invoke(cli, ["cluster", "render", *overrides, "--target", "network", "--output", str(target)])
    assert done.exit_code == 0, done.output
    assert "203.0.113.0/24" in target.read_text()


@pytest.mark.parametrize(("instance", "market"), OFFERS)
def test_ray_accepts_every_file(instance: str, market: str) -> None:
    config = prepared(data_of(instance, **copy.deepcopy(MARKETS[market])))
    workers = [node for name, node in config["available_node_types"].items() if name != "head"]
    # Where Ray starts machines it ends idle ones, down to `min_workers`; those of one's own just run.
    assert [(node["min_workers"], node["max_workers"]) for node in workers] == [(2 if CLOUDS[instance] == "on-prem" else 0, 2)]
    assert CLOUDS[instance] == "on-prem" or config["idle_timeout_minutes"] == 15
    assert config["max_workers"] == 2


@pytest.mark.parametrize(("instance", "size"), PLANNED)
def test_files_for_7b_to_70b_on_a100_and_h100_start_their_nodes_and_a_head_that_does_no_work(instance: str, size: str) -> None:
    nodes = nodes_by_plan(size, instance)
    assert nodes == {"7b": 1, "13b": 1, "34b": 2, "70b": 4}[size]
    hosts = {"provider": {"hosts": [f"10.0.0.{number}" for number in range(1, nodes + 2)]}} if instance.startswith("dgx") else {}
    config = prepared(data_of(instance, name=f"llama-{size}", nodes=nodes, **hosts))
    assert config["cluster_name"] == f"llama-{size}"
    if hosts:
        assert len(config["provider"]["worker_ips"]) == nodes
    else:
        assert config["available_node_types"]["gpu"]["max_workers"] == nodes
        assert config["available_node_types"]["gpu"]["resources"]["GPU"] == 8
        assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}
    assert "--num-cpus=0" in config["head_start_ray_commands"][-1]


KEYS = {
    "aws": {"type", "region", "availability_zone", "use_internal_ips", "cache_stopped_nodes"},
    "gcp": {"type", "project_id", "region", "availability_zone", "use_internal_ips", "cache_stopped_nodes"},
    "azure": {"type", "location", "subscription_id", "resource_group", "unique_id", "subnet_mask", "use_internal_ips"}
    | {"cache_stopped_nodes", "availability_zone"},
    "on-prem": {"type", "head_ip", "worker_ips"},
}
"""Of `provider`, what Ray's code for each cloud reads (Ray accepts any other key and ignores it)."""


@pytest.mark.parametrize("instance", INSTANCES)
def test_a_file_has_no_key_that_ray_would_silently_ignore(instance: str) -> None:
    config = data_of(instance)
    assert set(config["provider"]) <= KEYS[CLOUDS[instance]]
    assert set(config["auth"]) <= {"ssh_user", "ssh_private_key", "ssh_public_key", "ssh_proxy_command"}
    # Of the top level Ray's schema is strict, but it lets `min_workers` pass, which only the local provider reads.
    assert "min_workers" not in config or config["provider"]["type"] == "local"


@cache
def shape_of_ec2s_parameters() -> Any:
    """As boto3 knows it: megabytes of JSON."""
    import botocore.session

    return botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


@pytest.mark.parametrize(("market", "instance"), chequered([*MARKETS, "capacity-block"], AWS))
def test_aws_accepts_the_parameters_of_head_and_workers(instance: str, market: str) -> None:
    from botocore.validate import ParamValidator

    block = {"provider": {"reservation": "cr-0a1b2c3d4e5f60718", "capacity_block": True}}
    config = data_of(instance, **copy.deepcopy(MARKETS.get(market, block)))
    for node in config["available_node_types"].values():
        parameters = {key: value for key, value in node["node_config"].items() if key != "SubnetIds"}  # Ray's own key
        report = ParamValidator().validate(parameters | {"MinCount": 1, "MaxCount": 1}, shape_of_ec2s_parameters())
        assert not report.has_errors(), report.generate_report()
    wanted = {"spot": "spot", "capacity-block": "capacity-block"}.get(market)
    options = config["available_node_types"]["gpu"]["node_config"].get("InstanceMarketOptions", {})
    assert options.get("MarketType") == wanted
    reserved = "CapacityReservationSpecification" in config["available_node_types"]["gpu"]["node_config"]
    assert reserved == (market in ("reserved", "capacity-block"))


@pytest.mark.parametrize(
    ("instance", "cards", "with_ip"), [("p4d", 4, 4), ("p4de", 4, 4), ("p5", 32, 8), ("p5e", 32, 8), ("p5en", 16, 1)]
)
def test_every_network_card_of_a_p_instance_carries_efa(instance: str, cards: int, with_ip: int) -> None:
    (name,) = [known for known in AWS if known.startswith(f"{instance}.")]
    interfaces = data_of(name)["available_node_types"]["gpu"]["node_config"]["NetworkInterfaces"]
    assert [interface["NetworkCardIndex"] for interface in interfaces] == list(range(cards))
    assert [interface["DeviceIndex"] for interface in interfaces] == [0] + [1] * (cards - 1)
    assert [interface["InterfaceType"] for interface in interfaces].count("efa") == with_ip
    assert interfaces[0]["InterfaceType"] == "efa", "the first card cannot do without IP"
    assert {(interface["SubnetId"], *interface["Groups"]) for interface in interfaces} == {
        (FACTS["aws"]["subnet"], FACTS["aws"]["security_group"])
    }


@pytest.mark.parametrize("instance", AZURE)
def test_azure_parameters_are_those_of_rays_machine_template(instance: str) -> None:
    template = json.loads((resources.files("ray.autoscaler._private._azure") / "azure-vm-template.json").read_text())
    for node in data_of(instance, cluster={"spot": True})["available_node_types"].values():
        (parameters,) = node["node_config"].values()
        assert set(parameters) <= set(template["parameters"])
        types = {int: "int", str: "string", bool: "bool", dict: "object"}
        assert all(template["parameters"][key]["type"] == types[type(value)] for key, value in parameters.items())


# https://cloud.google.com/compute/docs/reference/rest/v1/instances: what a machine can be made of.
GCP_KEYS = {"machineType", "disks", "networkInterfaces", "serviceAccounts", "metadata", "shieldedInstanceConfig"} | {
    "resourcePolicies",
    "scheduling",
    "reservationAffinity",
}


@pytest.mark.parametrize("market", MARKETS)
@pytest.mark.parametrize(
    ("instance", "networks"), [("a2-highgpu-8g", 1), ("a2-ultragpu-8g", 1), ("a3-highgpu-8g", 5), ("a3-megagpu-8g", 9)]
)
def test_gcp_machines_have_a_card_for_every_gpu_network_and_no_public_address(instance: str, networks: int, market: str) -> None:
    head, gpu = data_of(instance, **copy.deepcopy(MARKETS[market]))["available_node_types"].values()
    assert set(head["node_config"]) | set(gpu["node_config"]) <= GCP_KEYS
    interfaces = gpu["node_config"]["networkInterfaces"]
    assert len({interface["subnetwork"] for interface in interfaces}) == networks
    assert all("accessConfigs" not in interface for interface in interfaces + head["node_config"]["networkInterfaces"])
    assert (gpu["node_config"]["scheduling"].get("provisioningModel") == "SPOT") == (market == "spot")
    assert ("reservationAffinity" in gpu["node_config"]) == (market == "reserved")


NO_NETWORK = "ip() { echo $4 via 192.168.7.1 dev fabric0 src 192.168.7.5 uid 0; }"
"""A shell whose `ip route get` says that every address lies behind one interface."""


@pytest.mark.parametrize("instance", ["a2-ultragpu-8g", "dgx-h100", "p5.48xlarge"])
def test_nodes_talk_over_the_interface_that_leads_to_the_others(instance: str) -> None:
    """Gloo goes by the host's name otherwise, which is the loopback on many machines: two nodes never find each other."""
    start = data_of(instance)["worker_start_ray_commands"][-1].replace("exit 1", ":")
    stub = f"{NO_NETWORK}; ray() {{ echo $GLOO_SOCKET_IFNAME $NCCL_SOCKET_IFNAME; }}; RAY_HEAD_IP=10.0.0.1; ({start})"
    done = subprocess.run(["bash", "-c", stub], capture_output=True, text=True, check=False)
    gloo, nccl = done.stdout.split()
    assert gloo == "fabric0"
    assert nccl == ("^docker,lo,veth" if instance.startswith("p5") else "fabric0")
    assert "SOCKET_IFNAME" not in text_of("dgx-h100", nodes=1, provider={"hosts": ["10.0.0.1"]})


@pytest.mark.parametrize("market", ["reserved", "capacity-block"])
@pytest.mark.parametrize("instance", AWS)
def test_reserved_capacity_in_aws_is_not_forced_into_a_placement_group(instance: str, market: str) -> None:
    reserved = {"provider": {"reservation": "cr-0a1b2c3d4e5f60718", "capacity_block": market == "capacity-block"}}
    assert "Placement" not in data_of(instance, **copy.deepcopy(reserved))["available_node_types"]["gpu"]["node_config"]
    assert "PlacementGroup" not in data_of(instance, "network", **copy.deepcopy(reserved))["Resources"]
    assert data_of(instance)["available_node_types"]["gpu"]["node_config"]["Placement"]["GroupName"] == "raytune-example"
    assert "PlacementGroup" in data_of(instance, "network")["Resources"]


def system_networks(folder: Path, cards: dict[str, str]) -> Path:
    """/sys/class/net of a machine with a bridge, a loopback and these cards, by the address on the PCI bus."""
    for name in ("lo", "docker0"):
        (folder / "net" / name).mkdir(parents=True)
    for name, address in cards.items():
        (folder / "devices" / address).mkdir(parents=True)
        (folder / "net" / name).mkdir()
        (folder / "net" / name / "device").symlink_to(folder / "devices" / address)
    return folder / "net"


def started(instance: str, profile: Path, networks: Path) -> subprocess.CompletedProcess[str]:
    """Run the start command of a GPU node whose way to the others is `fabric0`; it prints the environment of `ray`."""
    start = data_of(instance, provider={"nccl_profile": str(profile)})["worker_start_ray_commands"][-1]
    start = start.replace("/sys/class/net", str(networks))
    stub = f"{NO_NETWORK}; ray() {{ env; }}; RAY_HEAD_IP=10.0.0.1; ({start})"
    return subprocess.run(["bash", "-c", stub], capture_output=True, text=True, check=False)


CARDS = {"fabric0": "0000:00:0c.0", "zz0": "0000:06:00.0", "b": "0000:86:00.0", "a": "0000:0d:00.0", "c": "0000:8d:00.0"}
MORE_CARDS = {"d": "0000:07:00.0", "e": "0000:0e:00.0", "f": "0000:87:00.0", "g": "0000:8e:00.0"}
TCPXO = {
    "NCCL_FASTRAK_CTRL_DEV": "fabric0",
    "NCCL_FASTRAK_IFNAME": "zz0,d,a,e,b,f,c,g",
    "NCCL_FASTRAK_LLCM_DEVICE_DIRECTORY": "/dev/aperture_devices",
    "NCCL_TUNER_PLUGIN": "libnccl-tuner.so",
}
TCPX = {
    "NCCL_GPUDIRECTTCPX_CTRL_DEV": "fabric0",
    "NCCL_GPUDIRECTTCPX_SOCKET_IFNAME": "zz0,a,b,c",
    "NCCL_GPUDIRECTTCPX_UNIX_CLIENT_PREFIX": "/run/tcpx",
}


@pytest.mark.parametrize(
    ("instance", "cards", "wanted"), [("a3-highgpu-8g", CARDS, TCPX), ("a3-megagpu-8g", CARDS | MORE_CARDS, TCPXO)]
)
def test_gpudirect_has_the_profile_of_the_node_the_cards_by_name_and_the_plugins_folder(
    instance: str, cards: dict[str, str], wanted: dict[str, str], tmp_path: Path
) -> None:
    profile = tmp_path / "lib64" / "nccl-env-profile.sh"
    networks = system_networks(tmp_path, cards)
    refused = started(instance, profile, networks)
    assert (refused.returncode, f"GPUDirect is not installed: no {profile}" in refused.stderr) == (1, True)
    profile.parent.mkdir()
    # Google's stops where NCCL_LIB_DIR is not set, and names the cards as they are called in Google's own images.
    profile.write_text(
        ': "${NCCL_LIB_DIR:?Must set NCCL_LIB_DIR}"\nexport NCCL_TEST=of-$NCCL_LIB_DIR NCCL_SOCKET_IFNAME=eth0\n'
        "export NCCL_FASTRAK_IFNAME=eth1,eth2 NCCL_TUNER_CONFIG_PATH=its-own\n"
    )
    done = started(instance, profile, networks)
    environment = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    assert environment["NCCL_TEST"] == f"of-{profile.parent}", done.stderr
    assert environment["NCCL_SOCKET_IFNAME"] == environment["GLOO_SOCKET_IFNAME"] == "fabric0"
    assert {name: environment.get(name) for name in wanted} == wanted
    assert environment["LD_LIBRARY_PATH"].startswith(f"{profile.parent}:")
    assert instance.startswith("a3-high") or environment["NCCL_TUNER_CONFIG_PATH"] == "its-own"


def test_a_node_that_lacks_network_cards_for_gpudirect_is_refused_with_those_it_has(tmp_path: Path) -> None:
    profile = tmp_path / "lib64" / "nccl-env-profile.sh"
    profile.parent.mkdir()
    profile.write_text("")
    refused = started("a3-megagpu-8g", profile, system_networks(tmp_path, CARDS))
    assert refused.returncode == 1
    assert "GPUDirect needs 8 network cards beside fabric0, found: zz0,a,b,c" in refused.stderr


def test_the_container_of_an_a3_node_has_what_gpudirect_talks_through() -> None:
    mega = data_of("a3-megagpu-8g")["docker"]["worker_run_options"]
    assert {"--volume=/var/lib/tcpxo:/var/lib/tcpxo", "--volume=/dev/aperture_devices:/dev/aperture_devices"} <= set(mega)
    assert "--volume=/run/tcpx:/run/tcpx" in data_of("a3-highgpu-8g")["docker"]["worker_run_options"]


def test_logins_find_ray_and_carry_the_token_however_often_the_file_is_used(tmp_path: Path) -> None:
    """Or `ray down` would end nothing: it types `ray stop` in a login, and takes no notice when there is no `ray`."""
    login, _ = data_of("dgx-h100", provider={"container": None, "environment": "/opt/raytune"})["setup_commands"]
    (tmp_path / ".bashrc").write_text("alias ll='ls -l'\n")
    for _ in range(2):
        subprocess.run(["bash", "-c", f"({login})"], env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}, check=True)
    assert (tmp_path / ".bashrc").read_text().splitlines() == [
        "alias ll='ls -l'",
        "export RAY_AUTH_MODE=token PATH=/opt/raytune/bin:$PATH  # by raytune",
    ]


def with_efa(root: Path, *, lacks: bool) -> Path:
    """A folder like AWS's, with a plug-in that links to two libraries; `lacks`: one of them is gone, or of another version."""
    plugins, libraries = root / "ofi-nccl" / "lib", root / "efa" / "lib"
    plugins.mkdir(parents=True)
    libraries.mkdir(parents=True)
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    shared = [compiler, "-shared", "-nostdlib", "-x", "c", "/dev/null"]
    subprocess.run([*shared, "-o", str(libraries / "libfabric.so.1"), "-Wl,-soname,libfabric.so.1"], check=True)
    linked = [f"-L{libraries}", "-Wl,--no-as-needed", "-l:libfabric.so.1"]
    subprocess.run([*shared, "-o", str(plugins / "libnccl-net-ofi.so"), *linked], check=True)
    if lacks:
        (libraries / "libfabric.so.1").unlink()
    return plugins / "libnccl-net-ofi.so"


def started_with_efa(image: Path, node: Path) -> subprocess.CompletedProcess[str]:
    start = data_of("p5.48xlarge")["worker_start_ray_commands"][-1]
    start = start.replace("/opt/amazon-of-node", str(node)).replace("/opt/amazon", str(image))
    report = "echo $FI_PROVIDER $NCCL_NET_PLUGIN $LD_LIBRARY_PATH"
    stub = f"{NO_NETWORK}; ray() {{ {report}; }}; RAY_HEAD_IP=10.0.0.1; ({start})"
    return subprocess.run(["bash", "-c", stub], capture_output=True, text=True, check=False)


def test_efa_is_the_images_own_or_else_the_nodes_and_named_to_nccl_by_its_path(tmp_path: Path) -> None:
    """NCCL looks for libnccl-net.so; AWS's installer calls it libnccl-net-ofi.so, which nobody would open."""
    image, node = tmp_path / "image", tmp_path / "node"
    of_node = with_efa(node, lacks=False)
    done = started_with_efa(image, node)
    assert done.stdout.startswith(f"efa {of_node} {of_node.parent}:{node}/efa/lib:"), done.stderr
    of_image = with_efa(image, lacks=False)
    assert started_with_efa(image, node).stdout.startswith(f"efa {of_image} ")
    assert "--volume=/opt/amazon:/opt/amazon-of-node:ro" in data_of("p5.48xlarge")["docker"]["worker_run_options"]


def test_a_node_without_efa_or_with_one_that_lacks_a_library_is_refused_by_name(tmp_path: Path) -> None:
    image, node = tmp_path / "image", tmp_path / "node"
    refused = started_with_efa(image, node)
    assert (refused.returncode, "EFA is not installed" in refused.stderr) == (1, True)
    with_efa(node, lacks=True)
    broken = started_with_efa(image, node)
    assert broken.returncode == 1
    assert "EFA cannot be loaded, build the image with EFA_INSTALLER" in broken.stderr
    assert "libfabric.so.1 => not found" in broken.stderr
    with_efa(image, lacks=False)
    assert started_with_efa(image, node).returncode == 0


def test_one_node_needs_no_network_and_is_not_refused_for_lack_of_one() -> None:
    assert "EFA" not in data_of("p5.48xlarge", nodes=1)["worker_start_ray_commands"][-1]
    assert "GPUDirect" not in data_of("a3-megagpu-8g", nodes=1)["worker_start_ray_commands"][-1]


def test_nodes_of_azure_without_a_scale_set_say_that_they_lack_infiniband() -> None:
    text = text_of("Standard_ND96isr_H100_v5", nodes=2)
    assert "ATTENTION" in text
    assert "10 GB/s at most instead of 400 GB/s" in text
    assert "NCCL_IB_DISABLE=1" in data_of("Standard_ND96isr_H100_v5", nodes=2)["worker_start_ray_commands"][-1]
    assert "ATTENTION" not in text_of("Standard_ND96isr_H100_v5", nodes=1)
    scale_set = {"hosts": ["10.0.0.4", "10.0.0.5", "10.0.0.6"]}
    assert data_of("Standard_ND96isr_H100_v5", nodes=2, provider=scale_set)["provider"]["type"] == "local"
    assert "NCCL_IB_DISABLE" not in text_of("Standard_ND96isr_H100_v5", nodes=2, provider=scale_set)


def test_the_head_trains_too_where_there_is_no_other_machine_for_it() -> None:
    alone = data_of("dgx-h100", provider={"hosts": ["10.0.0.1", "10.0.0.2"]})
    assert "--num-cpus=0" not in alone["head_start_ray_commands"][-1]
    assert "--gpus=all" in alone["docker"]["head_run_options"]
    apart = data_of("dgx-h100")
    assert "--num-cpus=0" in apart["head_start_ray_commands"][-1]
    assert "--gpus=all" not in apart["docker"]["head_run_options"]


@pytest.mark.parametrize("instance", INSTANCES)
def test_shell_commands_parse(instance: str) -> None:
    config = data_of(instance)
    lists = [value for key, value in config.items() if key.endswith("_commands")]
    lists += [node.get("initialization_commands", []) for node in config.get("available_node_types", {}).values()]
    for command in [command for commands in lists for command in commands]:
        # As Ray wraps it: one quoted argument of `bash -c` over ssh.
        subprocess.run(["bash", "-n", "-c", f"true && ({command})"], check=True)


def test_a_node_with_another_ray_is_refused() -> None:
    _, check = data_of("dgx-h100", provider={"container": None, "environment": sys.prefix})["setup_commands"]
    assert subprocess.run(["bash", "-c", check], check=False).returncode == 0
    older = subprocess.run(["bash", "-c", check.replace("2.60.0", "2.59.0")], capture_output=True, text=True, check=False)
    assert older.returncode == 1
    assert "this node has Ray 2.60.0, not 2.59.0" in older.stderr


@pytest.mark.parametrize("instance", INSTANCES)
def test_big_shared_memory_and_the_nodes_own_disks_reach_the_container(instance: str) -> None:
    options = data_of(instance)["docker"]["worker_run_options"]
    (shared,) = [int(option.removeprefix("--shm-size=").removesuffix("g")) for option in options if "--shm-size" in option]
    assert shared >= spec_of(instance).instance.host_memory_bytes / 2**30 / 5
    assert "--ulimit=memlock=-1:-1" in options
    assert ("--volume=/mnt/nvme:/mnt/nvme" in options) == (CLOUDS[instance] != "on-prem")
    fabric = spec_of(instance).instance.fabric
    assert ("--device=/dev/infiniband" in options) == (fabric in ("efa", "infiniband"))


def test_a_jump_host_and_a_hub_login_are_written_where_ray_reads_them() -> None:
    config = data_of(
        "p5.48xlarge", provider={"jump_host": "me@bastion.example.com", "hub_token_file": "~/.cache/huggingface/token"}
    )
    assert shlex.split(config["auth"]["ssh_proxy_command"]) == ["ssh", "-W", "%h:%p", "me@bastion.example.com"]
    assert config["file_mounts"]["~/.cache/huggingface/token"] == "~/.cache/huggingface/token"


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"provider": {"zone": None, "subnet": None}}, ["provider.zone: needed", "provider.subnet: needed"]),
        ({"provider": {"container": None}}, ["provider.container or provider.environment: needed"]),
        ({"storage": "runs"}, ["storage: runs is on one machine", "/shared"]),
        ({"storage": "/sharedness/runs"}, ["storage: /sharedness/runs is on one machine"]),
        ({"cluster": {"spot": True}, "provider": {"reservation": "cr-1"}}, ["reserved nodes are not spot nodes"]),
        ({"provider": {"capacity_block": True}}, ["needs provider.reservation"]),
        ({"provider": {"zone": "eu-west-1a"}}, ["eu-west-1a does not lie in region us-east-1"]),
        ({"provider": {"hosts": ["10.0.0.1", "10.0.0.1"]}}, ["given twice"]),
        ({"provider": {"hosts": ["10.0.0.1"]}}, ["1 addresses for cluster.nodes=2"]),
    ],
)
def test_what_is_missing_or_cannot_be_meant_is_refused_all_at_once(sections: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        spec_of("p5.48xlarge", **sections)
    assert all(words in str(refused.value) for words in said), str(refused.value)


def test_a_config_without_an_instance_type_is_told_which_key_it_needs() -> None:
    with pytest.raises(UserError, match=r"cluster\.instance is not set"):
        cluster_spec(config_from({}), load_catalogue(), "ray-up")


def test_machines_without_a_template_are_pointed_to_hosts_and_kuberay() -> None:
    with pytest.raises(UserError, match=r"provider\.hosts, or use --target kuberay"):
        text_of("p3.16xlarge")


@pytest.mark.parametrize("name", ["run", "my.run_2", "7b-lora", "x" * 63, "a" * 39 + ".b"])
def test_a_clusters_name_is_one_that_clouds_and_kubernetes_allow(name: str) -> None:
    assert re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", cluster_name(name))


OVERLAYS = sorted((ROOT / "configs" / "overlays").glob("*.yaml"))


def test_an_overlay_is_shipped_for_every_cloud() -> None:
    assert {path.name.partition("-")[0] for path in OVERLAYS} >= {"aws", "gcp", "azure", "on"}


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_a_shipped_overlay_renders_with_the_quickstart_for_every_target(overlay: Path, tmp_path: Path) -> None:
    command = ["cluster", "render", str(ROOT / "configs/recipes/quickstart.yaml"), str(overlay)]
    for target in ("ray-up", "network", *KUBERAY):
        if target == "ray-up" or "on-prem" not in overlay.name:
            output = tmp_path / target
            done = CliRunner().invoke(cli, [*command, "--target", target, "--output", str(output)])
            assert done.exit_code == 0, done.output
            assert CliRunner().invoke(cli, [*command, "--target", target]).stdout == output.read_text()
    prepared(read_yaml((tmp_path / "ray-up").read_text()))


def test_a_refusal_on_the_command_line_names_the_keys_and_ends_with_2() -> None:
    done = CliRunner().invoke(
        cli, ["cluster", "render", str(ROOT / "configs/recipes/quickstart.yaml"), "cluster.instance=p5.48xlarge"]
    )
    assert done.exit_code == 2
    assert "provider.zone: needed" in done.stderr
