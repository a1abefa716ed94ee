"""`ray up` files of a cluster: what the templates need to know beside the spec, and the two commands of Ray that use them."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune.clusters.provider import ClusterSpec, Target, place_of, render
from raytune.config.problems import ConfigError, Place
from raytune.config.yaml_nodes import read_nodes
from raytune.errors import ClusterError, UserError
from raytune.token_file import make_token

NCCL_PROFILES = {"tcpx": "/var/lib/tcpx/lib64/nccl-env-profile.sh", "tcpxo": "/var/lib/tcpxo/lib64/nccl-env-profile.sh"}
"""Where Google's installers put NCCL's environment."""

EFA = "/opt/amazon"
"""Where AWS's images have the EFA library and NCCL's plug-in for it."""

SPOT, RESERVED, ON_DEMAND = "spot", "reserved", "on-demand"


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
        "num_gpu_networks": spec.instance.num_interfaces if fabric in NCCL_PROFILES else 0,
        "market": SPOT if spec.spot else RESERVED if user.reservation else ON_DEMAND,
        "worker_account": f"rt-{spec.name}"[:30].strip("-"),
        "image": _azure_image(user.machine_image or ""),
        "nccl_profile": user.nccl_profile or NCCL_PROFILES.get(fabric),
        "storage_is_folder": "://" not in spec.storage,
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
    # Gloo would go by the host's name, which often means its loopback; the interface that leads to the others is meant.
    other = "$RAY_HEAD_IP" if not spec.head_trains else f"${{RAY_HEAD_IP:-{spec.user.hosts[-1]}}}"
    lines = [f"export GLOO_SOCKET_IFNAME=$(ip -o route get {other} | sed 's/.* dev \\([^ ]*\\).*/\\1/')"] if several else []
    lines += [] if hosts else ["export HF_HUB_CACHE=/mnt/nvme/huggingface"]
    if fabric == "efa":
        # Without the plug-in NCCL would use sockets and say nothing.
        plugin = f"find -L {EFA}/ofi-nccl -name 'libnccl-net*.so' | grep -q ."
        refused = f'{{ echo "EFA is not installed: no libnccl-net in {EFA}/ofi-nccl" >&2; exit 1; }}'
        return [
            *lines,
            *([f"{plugin} || {refused}"] if several else []),
            "export FI_PROVIDER=efa NCCL_SOCKET_IFNAME=^docker,lo,veth",
            f"export LD_LIBRARY_PATH={EFA}/ofi-nccl/lib:{EFA}/ofi-nccl/lib/x86_64-linux-gnu:{EFA}/efa/lib:$LD_LIBRARY_PATH",
        ]
    if fabric in NCCL_PROFILES:
        profile = spec.user.nccl_profile or NCCL_PROFILES[fabric]
        refused = f'{{ echo "GPUDirect is not installed: no {profile}" >&2; exit 1; }}'
        return [
            *lines,
            f"test -r {profile} || {refused}",
            f". {profile}",
            f"export LD_LIBRARY_PATH={Path(profile).parent}:$LD_LIBRARY_PATH",
        ]
    if fabric == "infiniband" and not hosts and several and spec.instance.cloud == "azure":
        return [*lines, "export NCCL_IB_DISABLE=1 NCCL_SOCKET_IFNAME=$GLOO_SOCKET_IFNAME"]
    return [*lines, *(["export NCCL_SOCKET_IFNAME=$GLOO_SOCKET_IFNAME"] if several else [])]


def fabric_run_options(spec: ClusterSpec) -> list[str]:
    """Options of the container that give it the fast network."""
    fabric = spec.instance.fabric
    if fabric == "efa":
        return ["--device=/dev/infiniband", f"--volume={EFA}:{EFA}:ro"]
    if fabric == "infiniband":
        azure = ["--volume=/etc/nccl.conf:/etc/nccl.conf:ro", "--volume=/opt/microsoft:/opt/microsoft:ro"]
        return ["--device=/dev/infiniband", *(azure if spec.instance.cloud == "azure" else [])]
    if fabric in NCCL_PROFILES:
        folder = Path(spec.user.nccl_profile or NCCL_PROFILES[fabric]).parents[1]
        return [f"--volume={folder}:{folder}", *(["--volume=/run/tcpx:/run/tcpx"] if fabric == "tcpx" else [])]
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
