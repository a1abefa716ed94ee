"""Which network NCCL took, as its own log says, against the one that the nodes have; and what that should carry. Pure."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from raytune.clusters.checks.finding import Finding, fail, ok, warn
from raytune.plan.costs.fabric import NAMES
from raytune.plan.costs.hardware import Fabric, Gpu, Instance
from raytune.plan.costs.throughput import LINK_SHARE, Speed
from raytune.units import format_rate

LOG_SETTINGS = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET"}
"""With which NCCL writes the lines that `network_of` reads."""


@dataclass(frozen=True, slots=True)
class Network:
    """What a process reaches those of other nodes through."""

    name: str
    """As NCCL calls it: IB, Socket, AWS Libfabric, FasTrak, ...; or gloo."""
    detail: str
    """Provider and cards; empty where the log does not say."""

    def __str__(self) -> str:
        return f"{self.name} ({self.detail})" if self.detail else self.name


GLOO = Network("gloo", "TCP")

_FITTING: dict[Fabric, str] = {
    "efa": "libfabric",
    "infiniband": r"\bg?ib|ucx|sharp",
    "tcpx": "gpudirecttcpx",
    "tcpxo": "fastrak",
    "tcp": "",
}
"""What NCCL's name of a network holds where it is the fast one of that kind of fabric."""

_FIXES: dict[Fabric, str] = {
    "efa": "NCCL's plug-in for EFA was not found or could not be loaded. In the container `ldd` of libnccl-net*.so below "
    "/opt/amazon/ofi-nccl must find every library (build the image with EFA_INSTALLER), NCCL_NET_PLUGIN name that file, and "
    "/dev/infiniband be there.",
    "infiniband": "In the container `ibv_devinfo` must list the cards (rdma-core, ibverbs-providers, --device=/dev/infiniband, "
    "an unlimited memlock), and NCCL_IB_DISABLE not be 1. In Azure the nodes must be of one scale set.",
    "tcpx": "Run Google's installer and its receive daemon on the nodes, and start Ray with the environment that `cluster "
    "render` writes: the plug-in's folder in LD_LIBRARY_PATH, NCCL_GPUDIRECTTCPX_*, and /run/tcpx in the container.",
    "tcpxo": "Run Google's installer and its receive daemon on the nodes, and start Ray with the environment that `cluster "
    "render` writes: the plug-in's folder in LD_LIBRARY_PATH, NCCL_FASTRAK_*, and /dev/aperture_devices in the container.",
    "tcp": "",
}


def network_of(log: str) -> Network | None:
    """The network that a process chose, from what NCCL wrote while it started; None: it did not say.

    Args:
        log: with NCCL_DEBUG=INFO and the subsystems INIT and NET; `[pid] NCCL INFO Using network IB`.
    """
    used = re.findall(r"Using network (.+?)\s*$", log, re.MULTILINE)
    if not used:
        return None
    name = used[-1]
    if "libfabric" in name.lower():
        found = re.findall(r"NET/OFI Selected [Pp]rovider is ([\w;-]+).*?\(found (\d+) nics\)", log)
        return Network(name, f"provider {found[-1][0]}, {_cards(int(found[-1][1]))}" if found else "")
    cards = re.findall(r"NET/(?:IB|Socket|\S+) : Using (.+?)(?:; OOB|$)", log, re.MULTILINE)
    devices = re.findall(r"\[\d+\]\s*([\w.-]+:[^\s<]+)", cards[-1]) if cards else []
    if not devices:
        return Network(name, "")
    kinds = sorted({device.rpartition("/")[2] for device in devices if "/" in device})
    detail = devices[0].partition(":")[0] if len(devices) == 1 else _cards(len(devices))
    return Network(name, f"{detail}, {', '.join(kinds)}" if kinds else detail)


def fits(network: Network, fabric: Fabric) -> bool:
    """Whether NCCL took the fast network of that kind, and no substitute."""
    if not re.search(_FITTING[fabric], network.name.lower()):
        return False
    return fabric != "efa" or not network.detail or "provider efa" in network.detail


def judge_network(
    networks: Mapping[str, Network | None],
    instance: Instance | None,
    devices: Mapping[str, tuple[str, ...]],
) -> Finding:
    """Whether NCCL took the network that the nodes have: by name, since a slow one works too and says nothing.

    Args:
        networks: by node, of one process on each; None where NCCL did not say.
        instance: type of the nodes, if it is known.
        devices: InfiniBand and EFA devices by node.
    """
    known = {node: network for node, network in networks.items() if network is not None}
    names = {node: str(network) for node, network in known.items()}
    distinct = list(dict.fromkeys(names.values()))
    if not known:
        return warn(
            "network",
            "NCCL did not say which network it took",
            "Look yourself: NCCL_DEBUG=INFO before Ray starts, and `Using network` in the workers' logs.",
        )
    if len(networks) < 2:
        return ok("network", f"{distinct[0]}; not used within one node")
    if len({network.name for network in known.values()}) > 1:
        return fail(
            "network",
            "; ".join(f"{name} on {_nodes(names, name)}" for name in distinct),
            "All nodes must take the same network: start them from one image, with one environment.",
        )
    fabric = instance.fabric if instance else None
    slow = [node for node, network in known.items() if fabric and not fits(network, fabric)]
    if instance and fabric and slow:
        carried = f", {format_rate(instance.inter_bytes_per_s)} per node"
        return fail(
            "network",
            f"NCCL took {names[slow[0]]} on {', '.join(slow)}; {instance.name} has {NAMES[fabric]}{carried}",
            _FIXES[fabric],
        )
    unused = [node for node, network in known.items() if network.name == "Socket" and devices.get(node)]
    if fabric is None and unused:
        return warn(
            "network",
            f"NCCL took {names[unused[0]]} although {', '.join(unused)} has {', '.join(devices[unused[0]][:4])}",
            f"{_FIXES['infiniband']} Name cluster.instance, so that this is judged.",
        )
    return ok("network", f"{len(known)} nodes: {distinct[0]}")


@dataclass(frozen=True, slots=True)
class Expected:
    """What an all-reduce over all workers should reach, as bus bandwidth."""

    bytes_per_s: float
    why: str


def expected_of(instance: Instance, gpu: Gpu, workers_on_a_node: float) -> Expected:
    """What large all-reduces reach between nodes of a type; NCCL spreads a node's cards over its GPUs, so fewer use fewer."""
    part = min(1.0, workers_on_a_node / instance.num_gpus)
    whole = f"{LINK_SHARE[instance.fabric]:.0%} of the {format_rate(instance.inter_bytes_per_s)} of {instance.name}"
    few = f", {workers_on_a_node:g} of its {instance.num_gpus} GPUs" if part < 1 else ""
    return Expected(Speed.of(instance, gpu).inter_bytes_per_s * part, whole + few)


def _nodes(names: Mapping[str, str], name: str) -> str:
    return ", ".join(node for node, one in names.items() if one == name)


def _cards(count: int) -> str:
    return f"{count} card{'s' * (count != 1)}"
