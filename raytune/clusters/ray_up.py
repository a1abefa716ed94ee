"""`ray up` files of a cluster: what the templates need to know beside the spec, and the two commands of Ray that use them."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune.clusters.provider import ClusterSpec, Target, place_of, render, shortened
from raytune.config.problems import ConfigError, Place
from raytune.config.yaml_nodes import read_nodes
from raytune.errors import ClusterError, UserError
from raytune.token_file import make_token

EFA = "/opt/amazon"
"""Where AWS's installer puts the EFA library and NCCL's plug-in for it."""
EFA_OF_NODE = "/opt/amazon-of-node"
"""Where a container sees what its node has there. The image's own goes first: it fits the image's rdma-core."""

LONGEST_ACCOUNT = 30
"""Letters of a service account's name in GCP."""

SPOT, RESERVED, ON_DEMAND = "spot", "reserved", "on-demand"


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuDirect:
    """One of Google's ways from GPU to GPU between nodes, as its installer and its guide for the machine type set it up."""

    profile: str
    """NCCL's environment, beside the plug-in."""
    settings: dict[str, str]
    """What the profile does not know: shell values, with $GLOO_SOCKET_IFNAME and $cards."""
    mounts: tuple[str, ...]
    """What the plug-in talks to its daemon and its cards through."""


GPUDIRECT: dict[str, GpuDirect] = {
    "tcpx": GpuDirect(
        profile="/var/lib/tcpx/lib64/nccl-env-profile.sh",
        settings={
            "NCCL_GPUDIRECTTCPX_CTRL_DEV": "$GLOO_SOCKET_IFNAME",
            "NCCL_GPUDIRECTTCPX_SOCKET_IFNAME": "$cards",
            "NCCL_GPUDIRECTTCPX_UNIX_CLIENT_PREFIX": "/run/tcpx",
        },
        mounts=("/run/tcpx",),
    ),
    "tcpxo": GpuDirect(
        profile="/var/lib/tcpxo/lib64/nccl-env-profile.sh",
        settings={
            "NCCL_FASTRAK_CTRL_DEV": "$GLOO_SOCKET_IFNAME",
            "NCCL_FASTRAK_IFNAME": "$cards",
            "NCCL_FASTRAK_LLCM_DEVICE_DIRECTORY": "/dev/aperture_devices",
            "NCCL_TUNER_PLUGIN": "${NCCL_TUNER_PLUGIN:-libnccl-tuner.so}",
            "NCCL_TUNER_CONFIG_PATH": "${NCCL_TUNER_CONFIG_PATH:-$NCCL_LIB_DIR/a3plus_tuner_config.textproto}",
        },
        mounts=("/dev/aperture_devices",),
    ),
}
"""By fabric; as Google's guides "Maximize GPU network bandwidth" (GKE) and the Cluster Toolkit's examples for a3 have it."""


@dataclass(frozen=True, slots=True)
class Interface:
    """A network interface of an EC2 machine."""

    card: int
    device: int
    kind: str


def ray_up_text(spec: ClusterSpec, target: Target = "ray-up") -> str:
    """The cluster file for `ray up`, or with `target="network"` the file that makes what it stands on."""
    user, fabric = spec.user, spec.instance.fabric
    hosts = place_of(spec) == "hosts"
    # Where nobody set up the machine for us, only the login's own folder can be written for certain.
    gcs_folder = f"$HOME/.raytune/{spec.name}" if hosts and not user.container else f"/var/lib/raytune/{spec.name}"
    facts = {
        "interfaces": efa_interfaces(spec),
        "num_gpu_networks": spec.instance.num_interfaces if fabric in GPUDIRECT else 0,
        "market": SPOT if spec.spot else RESERVED if user.reservation else ON_DEMAND,
        "worker_account": shortened(f"rt-{spec.name}", LONGEST_ACCOUNT),
        "image": _azure_image(user.machine_image or ""),
        "nccl_profile": user.nccl_profile or (GPUDIRECT[fabric].profile if fabric in GPUDIRECT else None),
        "storage_is_folder": spec.storage_folder is not None,
        "gcs_folder": gcs_folder,
        "local_disks": not hosts,
        "activate": "" if user.container else f"export PATH={user.environment}/bin:$PATH; ",
        "login": _login_setup(spec),
        "version_check": _version_check(spec),
        "worker_environment": worker_environment(spec),
        "fabric_run_options": fabric_run_options(spec),
        # On a cloud `ray dashboard` reaches the head's loopback through ssh, and the network lets nothing else in.
        "dashboard_host": user.hosts[0] if user.hosts else "0.0.0.0",
        "head_options": (f"--node-ip-address={user.hosts[0]} " if user.hosts else "")
        + ("" if spec.head_trains else "--num-cpus=0 --num-gpus=0 "),
    }
    return render(spec, target, facts)


def efa_interfaces(spec: ClusterSpec) -> list[Interface]:
    """The interfaces that use all network cards of an instance with EFA, as AWS prescribes; none for other instances.

    On p5 and p5e every fourth card carries IP traffic too. On other instances with more than four cards only the first does.
    """
    instance = spec.instance
    if instance.fabric != "efa":
        return []
    num_cards = instance.num_interfaces
    every = {32: 4, 16: 16}.get(num_cards, 1)
    return [Interface(card, min(card, 1), "efa" if card % every == 0 else "efa-only") for card in range(num_cards)]


def worker_environment(spec: ClusterSpec) -> list[str]:
    """Shell statements before `ray start` on a GPU node: its caches, and what the fast network wants."""
    fabric, hosts, several = spec.instance.fabric, place_of(spec) == "hosts", spec.num_nodes > 1
    lines = [] if hosts else ["export HF_HUB_CACHE=/mnt/nvme/huggingface"]
    if not several:
        return lines
    # Gloo would go by the host's name, which often means its loopback; the interface that leads to the others is meant.
    other = "$RAY_HEAD_IP" if not spec.head_trains else f"${{RAY_HEAD_IP:-{spec.user.hosts[-1]}}}"
    lines.append(f"export GLOO_SOCKET_IFNAME=$(ip -o route get {other} | sed 's/.* dev \\([^ ]*\\).*/\\1/')")
    same_for_nccl = "export NCCL_SOCKET_IFNAME=$GLOO_SOCKET_IFNAME"
    if fabric == "efa":
        return [*lines, *_efa(in_container=spec.user.container is not None)]
    if fabric in GPUDIRECT:
        return [*lines, *_gpudirect(spec)]
    if fabric == "infiniband" and not hosts and spec.instance.cloud == "azure":
        return [*lines, "export NCCL_IB_DISABLE=1", same_for_nccl]
    return [*lines, same_for_nccl]


def _efa(in_container: bool) -> list[str]:
    """Find a plug-in for EFA that can be loaded, and name it to NCCL, which would use sockets without it and say nothing.

    A plug-in that lacks a library, or finds an older one than it was built with, is no better than none: `ldd` says both. NCCL is
    given its path, since AWS's installer no longer gives it the name that NCCL looks for.
    """
    roots = f"{EFA} {EFA_OF_NODE}" if in_container else EFA
    search = (
        f"for efa in {roots}; do found=$(find -L $efa/ofi-nccl -name 'libnccl-net*.so' 2>/dev/null | sort | head -n 1); "
        '[ -n "$found" ] || continue; plugin=$found; libraries=${plugin%/*}:$efa/efa/lib:$efa/efa/lib64; '
        "lacking=$(LD_LIBRARY_PATH=$libraries:$LD_LIBRARY_PATH ldd $plugin 2>&1 | grep 'not found'); "
        '[ -n "$lacking" ] || break; done'
    )
    absent = _refused(f"EFA is not installed: no libnccl-net in {' or '.join(f'{root}/ofi-nccl' for root in roots.split())}")
    update = "build the image with EFA_INSTALLER (cluster/image/Dockerfile)" if in_container else "install the node's packages"
    broken = _refused(f"EFA cannot be loaded, {update}: $plugin lacks $lacking")
    return [
        "plugin= lacking=",
        search,
        f'[ -n "$plugin" ] || {absent}',
        f'[ -z "$lacking" ] || {broken}',
        "export FI_PROVIDER=efa NCCL_NET_PLUGIN=$plugin NCCL_SOCKET_IFNAME=^docker,lo,veth",
        "export LD_LIBRARY_PATH=$libraries:$LD_LIBRARY_PATH",
    ]


def _gpudirect(spec: ClusterSpec) -> list[str]:
    """Read the settings of Google's installer, and name the cards: one leads to the others, the rest carry GPU traffic.

    The profile's own names of cards hold in Google's images only, so they are looked up, in the order of the PCI bus that the
    plug-in counts in.
    """
    direct = GPUDIRECT[spec.instance.fabric]
    profile = spec.user.nccl_profile or direct.profile
    folder, num_cards = Path(profile).parent, spec.instance.num_interfaces
    cards = (
        "cards=$(for card in /sys/class/net/*; do [ -e $card/device ] && "
        "echo $(basename $(readlink -f $card/device)) ${card##*/}; done | sort | "
        "awk -v control=$GLOO_SOCKET_IFNAME '$2 != control {print $2}' | paste -sd, -)"
    )
    absent = _refused(f"GPUDirect is not installed: no {profile}")
    count = "$(echo $cards | tr , '\\n' | grep -c .)"
    wrong = _refused(f"GPUDirect needs {num_cards} network cards beside $GLOO_SOCKET_IFNAME, found: $cards")
    return [
        f"test -r {profile} || {absent}",
        f"export NCCL_LIB_DIR={folder}",
        f". {profile}",
        cards,
        f"[ {count} = {num_cards} ] || {wrong}",
        "export NCCL_SOCKET_IFNAME=$GLOO_SOCKET_IFNAME " + " ".join(f"{name}={value}" for name, value in direct.settings.items()),
        f"export LD_LIBRARY_PATH={folder}:$LD_LIBRARY_PATH",
    ]


def _refused(why: str) -> str:
    """A command that ends the start of a node."""
    return f'{{ echo "{why}" >&2; exit 1; }}'


def fabric_run_options(spec: ClusterSpec) -> list[str]:
    """Options of the container that give it the fast network."""
    fabric = spec.instance.fabric
    if fabric == "efa":
        return ["--device=/dev/infiniband", f"--volume={EFA}:{EFA_OF_NODE}:ro"]
    if fabric == "infiniband":
        azure = ["--volume=/etc/nccl.conf:/etc/nccl.conf:ro", "--volume=/opt/microsoft:/opt/microsoft:ro"]
        return ["--device=/dev/infiniband", *(azure if spec.instance.cloud == "azure" else [])]
    if fabric in GPUDIRECT:
        folder = Path(spec.user.nccl_profile or GPUDIRECT[fabric].profile).parents[1]
        return [f"--volume={place}:{place}" for place in (folder, *GPUDIRECT[fabric].mounts)]
    return []


def up(cluster_file: Path) -> None:
    """Start or update the cluster of a file with Ray's own `ray up`; make its token before, if there is none.

    Raises:
        UserError: if the file is none of a cluster.
        ClusterError: if Ray could not start it.
    """
    config = _read(cluster_file)
    for source in config.get("file_mounts", {}).values():
        if Path(source).name == "auth_token":
            make_token(Path(source).expanduser())
    _ray(["up", "--yes", "--no-config-cache", str(cluster_file)], config)


def down(cluster_file: Path) -> None:
    """End the cluster of a file with Ray's own `ray down`.

    Raises:
        UserError: if the file is none of a cluster.
        ClusterError: if Ray could not end it.
    """
    _ray(["down", "--yes", str(cluster_file)], _read(cluster_file))


def _ray(arguments: Sequence[str], config: dict[str, Any]) -> None:
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    if config["provider"]["type"] == "local":
        # Autoscaler v2 takes the head for a worker and leaves one host out (Ray 2.60).
        environment["RAY_UP_enable_autoscaler_v2"] = "0"
    done = subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *arguments], env=environment, check=False)
    if done.returncode:
        raise ClusterError(
            f"`ray {' '.join(arguments)}` ended with {done.returncode}; its last lines above say why. The command can be run "
            f"again."
        )


def _read(cluster_file: Path) -> dict[str, Any]:
    try:
        text = cluster_file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{cluster_file} cannot be read: {error.strerror}. Write it with `raytune cluster render`.") from error
    node, problems = read_nodes(text, Place(str(cluster_file), 1, 1))
    if problems:
        raise ConfigError(problems)
    config = node.plain if node else None
    if not isinstance(config, dict) or not isinstance(config.get("provider"), dict) or "type" not in config["provider"]:
        raise UserError(f"{cluster_file} is no cluster file for `ray up`: it has no provider.type.")
    return config


def _login_setup(spec: ClusterSpec) -> str:
    """A command that makes every later login find Ray and carry the token; the same however often it runs."""
    path = "" if spec.user.container else f" PATH={spec.user.environment}/bin:$PATH"
    line = f"export RAY_AUTH_MODE=token{path}  # by raytune"
    return f"touch ~/.bashrc; sed -i '/# by raytune$/d' ~/.bashrc; echo '{line}' >> ~/.bashrc"


def _version_check(spec: ClusterSpec) -> str:
    wanted = spec.ray_version
    activate = "" if spec.user.container else f"export PATH={spec.user.environment}/bin:$PATH; "
    check = f"import ray, sys; sys.exit(ray.__version__ != '{wanted}' and f'this node has Ray {{ray.__version__}}, not {wanted}')"
    return f'{activate}python -c "{check}"'


def _azure_image(image: str) -> dict[str, str]:
    """ARM parameters of `publisher:offer:sku:version`, or of an image's resource id."""
    names = ("imagePublisher", "imageOffer", "imageSku", "imageVersion")
    parts = image.split(":")
    return dict(zip(names, parts)) if len(parts) == len(names) else {"imageId": image}
