"""Waiting for machines that an autoscaler brings: asked for by what a run needs, with a limit and a line now and then.

The demand is a placement group. Unlike a request to the autoscaler itself it ends with this process, however that ends, so that
machines which nobody uses go again.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.util.client
from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]  (compiled)
from ray.core.generated import autoscaler_pb2
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from raytune.config.sections.cluster import ClusterSection
from raytune.errors import ClusterError
from raytune.plan.costs.hardware import load_catalogue
from raytune.units import format_seconds

SAY_EVERY_S = 30.0
LOOK_EVERY_S = 2.0
UNHEARD_S = 15.0
"""An autoscaler reports every 5 s: after this long without one, or with one that cannot bring what is needed, none will."""
MOST_OF_A_REASON = 200
"""Characters of what a cloud says when it refuses a machine."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Need:
    """Machines that a run asks for."""

    words: str
    bundles: tuple[dict[str, float], ...]
    strategy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """What the cluster's autoscaler says."""

    is_heard: bool
    """Whether it has spoken at all."""
    cannot: bool = False
    """It knows no machines that hold what is asked for."""
    starting: int = 0
    failures: tuple[str, ...] = ()
    """Of launches, the newest last."""


def need_of(section: ClusterSection, nodes: Sequence[Mapping[str, float]]) -> Need | None:
    """What has to be there before a run and is not; None where it is.

    Args:
        nodes: what each of the cluster's nodes has, by Ray's names of resources, in use or not.
    """
    if section.instance is not None and section.gpus_per_worker != 0:
        catalogue = load_catalogue()
        instance = catalogue.instance(section.instance)
        there = sum(node.get("GPU", 0) >= instance.num_gpus for node in nodes)
        if there >= section.nodes:
            return None
        words = f"{section.nodes} x {instance.num_gpus} {instance.gpu.partition('-')[0]} ({instance.name})"
        return Need(words, ({"GPU": float(instance.num_gpus)},) * section.nodes, "STRICT_SPREAD")
    workers = 1 if section.workers == "auto" else section.workers
    gpus = 1.0 if section.gpus_per_worker == 1 else 0.0
    bundle = {name: amount for name, amount in (("CPU", section.cpus_per_worker), ("GPU", gpus)) if amount}
    if not bundle or _room(bundle, nodes) >= workers:
        return None
    each = " and ".join(f"{amount:g} {name}{'s' * (amount != 1)}" for name, amount in bundle.items())
    return Need(f"the places of {workers} workers ({each} each)", (bundle,) * workers, section.placement.upper())


def _room(bundle: Mapping[str, float], nodes: Sequence[Mapping[str, float]]) -> int:
    """Workers that fit on the nodes when nothing else is on them."""
    return sum(int(min(node.get(name, 0) // amount for name, amount in bundle.items())) for node in nodes)


def bring_machines(section: ClusterSection) -> None:
    """Have the autoscaler bring what a run needs, and wait until it is there; at once where nothing is missing.

    Where the cluster has no autoscaler, or one that cannot bring it, the run has to do with what is there: that is said.

    Raises:
        ClusterError: if it is not there after `cluster.start_timeout`.
    """
    need = need_of(section, living())
    if need is None:
        return
    group = placement_group(list(need.bundles), strategy=need.strategy)
    try:
        _wait(group, need, section.start_timeout)
    finally:
        remove_placement_group(group)


def living() -> list[Mapping[str, float]]:
    """Resources of the cluster's nodes."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _wait(group: PlacementGroup, need: Need, limit_s: float) -> None:
    started = said = time.monotonic()
    limit = f"limit {format_seconds(limit_s)} (cluster.start_timeout)"
    ready = group.ready()
    while not ray.wait([ready], timeout=LOOK_EVERY_S)[0]:
        waited = time.monotonic() - started
        scaling = scaling_of(need)
        if waited >= UNHEARD_S and (scaling.cannot or not scaling.is_heard):
            _log.warning("the cluster has no autoscaler that brings %s; going on with the machines that are there", need.words)
            return
        if waited >= limit_s:
            raise ClusterError(
                f"Waited {format_seconds(limit_s)} (cluster.start_timeout) for {need.words}, in vain{_words(scaling)}. Nodes "
                f"with GPUs there: {sum(node.get('GPU', 0) > 0 for node in living())}. Try again later, raise "
                f"cluster.start_timeout, or ask for what the cloud has (another zone, instance or market). `ray status` shows "
                f"what the autoscaler does."
            )
        if waited > LOOK_EVERY_S and (said == started or time.monotonic() - said >= SAY_EVERY_S):
            said = time.monotonic()
            _log.warning("waiting for %s, %s so far, %s%s", need.words, format_seconds(waited), limit, _words(scaling))


def scaling_of(need: Need) -> Scaling:
    """Ask the cluster what its autoscaler does about a need."""
    if ray.util.client.ray.is_connected():  # ray:// leads to a process of the cluster, not to what its autoscaler reports to
        return Scaling(is_heard=True)
    reply: Any = getattr(autoscaler_pb2, "GetClusterStatusReply")()  # noqa: B009  (made at run time: type checkers do not see it)
    reply.ParseFromString(GcsClient(ray.get_runtime_context().gcs_address).get_cluster_status(timeout_s=10))
    return read_scaling(reply.autoscaling_state, need)


def read_scaling(state: Any, need: Need) -> Scaling:
    """What a report of the autoscaler means for a need.

    Args:
        state: Ray's AutoscalingState.
    """
    refused = [
        _counted([one.resources_bundle for selector in gang.bundle_selectors[:1] for one in selector.resource_requests])
        or _counted([one.resources_bundle for one in gang.requests])
        for gang in state.infeasible_gang_resource_requests
    ]
    return Scaling(
        is_heard=state.autoscaler_state_version > 0,
        cannot=_counted(need.bundles) in refused,
        starting=sum(request.count for request in state.pending_instance_requests) + len(state.pending_instances),
        failures=tuple(
            f"{failed.instance_type_name or failed.ray_node_type_name}: {' '.join(failed.reason.split())}"
            for failed in state.failed_instance_requests
            if failed.reason.strip()
        ),
    )


def _counted(bundles: Sequence[Mapping[str, float]]) -> dict[tuple[tuple[str, float], ...], int]:
    counts: dict[tuple[tuple[str, float], ...], int] = {}
    for bundle in bundles:
        # Ray adds names of its own to a group's bundles.
        key = tuple(sorted((name, amount) for name, amount in bundle.items() if not name.startswith("bundle_group")))
        counts[key] = counts.get(key, 0) + 1
    return counts


def _words(scaling: Scaling) -> str:
    """What the autoscaler says, as the end of a sentence."""
    parts = [f"{scaling.starting} starting"] if scaling.starting else []
    parts += [f"refused: {scaling.failures[-1][:MOST_OF_A_REASON]}"] if scaling.failures else []
    return f"; autoscaler: {', '.join(parts)}" if parts else ""
