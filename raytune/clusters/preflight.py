"""`raytune preflight`: whether the nodes of a cluster are fit for a run, before it is started on them.

Every node is looked at by a process of its own, then all of them reduce together. Nothing is left behind.
"""

import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytune.clusters.checks.bandwidth import Ranks, ReductionError, ranks_on_cluster
from raytune.clusters.checks.facts import MachineFacts
from raytune.clusters.checks.finding import Finding, fail, over_nodes, warn
from raytune.clusters.checks.inspector import Inspector
from raytune.clusters.checks.judge import judge_machine
from raytune.clusters.checks.network import Expected, expected_of, judge_network
from raytune.clusters.checks.nodes import (
    ClockReading,
    Reduction,
    is_slow,
    judge_alike,
    judge_all_reduce,
    judge_clocks,
    judge_names,
    judge_pairs,
    judge_shared_storage,
    judge_tokens,
    judge_versions,
    judge_within,
    rounds_of_pairs,
)
from raytune.config.sections.cluster import ClusterSection
from raytune.errors import ClusterError
from raytune.launch.cluster.cluster import joined, nodes_for_workers
from raytune.launch.cluster.scaling import bring_machines
from raytune.plan.costs.hardware import Instance, load_catalogue
from raytune.units import format_seconds

ANSWER_TIMEOUT_S = 60.0
"""Longest wait for a node to look at itself."""
_NUM_CLOCK_READINGS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A living node of a cluster."""

    id: str
    name: str
    """As a person knows it: its host name where that is unique, else with the beginning of its id."""
    address: str
    resources: Mapping[str, float]


def examine_cluster(section: ClusterSection, storage: str | None, *, expected_bytes_per_s: float | None = None) -> list[Finding]:
    """Join the cluster, look at every node, and reduce over all places of workers.

    Args:
        storage: where runs go; None leaves that out.
        expected_bytes_per_s: what a node's network should give; None: what the catalogue says of `cluster.instance`, or of the
            type that the nodes say they are.

    Raises:
        ClusterError: if the cluster cannot be joined.
    """
    with joined(section):
        bring_machines(section)
        nodes = living_nodes()
        findings = []
        with _inspectors(nodes, section.start_timeout) as inspectors:
            facts, silent = _facts(nodes, inspectors, storage)
            findings += [*silent, *judge_nodes(nodes, facts)]
            present = {name: inspectors[name] for name in facts}
            if present:
                findings.append(judge_clocks(_clocks(present)))
                findings.append(_storage(present, storage))
        expected = None if expected_bytes_per_s is None else Expected(expected_bytes_per_s, "as --expect says")
        return [*findings, *_bandwidth(section, nodes, facts, expected)]


def judge_nodes(nodes: Sequence[Node], facts: Mapping[str, MachineFacts]) -> list[Finding]:
    """What the facts of all nodes decide. Pure.

    Args:
        facts: by name of the node; nodes that gave none are left out.
    """
    known = [node for node in nodes if node.name in facts]
    if not known:
        return []
    by_check = zip(
        *([(node.name, one) for one in judge_machine(facts[node.name], promised_gpus=_promised(node))] for node in known)
    )
    return [
        judge_versions(facts),
        judge_alike(facts),
        *(over_nodes(findings) for findings in by_check),
        judge_tokens(facts, is_reachable=any(not node.address.startswith("127.") for node in nodes)),
        judge_names(facts),
    ]


def living_nodes() -> list[Node]:
    """Those of the cluster that this process is connected to, the one of this process first."""
    here = ray.get_runtime_context().get_node_id()
    alive = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: (node["NodeID"] != here, node["NodeID"]))
    hosts = [node["NodeManagerHostname"] for node in alive]
    return [
        Node(
            id=node["NodeID"],
            name=host if hosts.count(host) == 1 else f"{host}/{node['NodeID'][:6]}",
            address=node["NodeManagerAddress"],
            resources=node["Resources"],
        )
        for node, host in zip(alive, hosts)
    ]


def _promised(node: Node) -> float:
    return node.resources.get("GPU", 0.0)


@contextmanager
def _inspectors(nodes: Sequence[Node], start_timeout: float) -> Iterator[dict[str, Any]]:
    """A process on each node, by the node's name."""
    handles: dict[str, Any] = {
        node.name: Inspector.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote()
        for node in nodes
    }
    try:
        # The first answer of a node includes unpacking this package there.
        ray.wait([handle.clock.remote() for handle in handles.values()], num_returns=len(handles), timeout=start_timeout)
        yield handles
    finally:
        for handle in handles.values():
            ray.kill(handle)


def _facts(
    nodes: Sequence[Node], inspectors: Mapping[str, Any], storage: str | None
) -> tuple[dict[str, MachineFacts], list[Finding]]:
    """What each node says of itself, and a finding for those that say nothing."""
    answers = _ask({name: handle.facts.remote(storage) for name, handle in inspectors.items()})
    facts = {node.name: answers[node.name] for node in nodes if isinstance(answers[node.name], MachineFacts)}
    missing = {name: answer for name, answer in answers.items() if name not in facts}
    if not missing:
        return facts, []
    return facts, [
        fail(
            "nodes",
            "; ".join(f"{name}: {what}" for name, what in missing.items()),
            "No process of raytune runs there: look at the raylet's logs (/tmp/ray/session_latest/logs), free memory, and "
            "whether its Python is the cluster's.",
        )
    ]


def _ask(tasks: Mapping[str, Any]) -> dict[str, Any]:
    """Answers by name; a text where there is none."""
    ray.wait(list(tasks.values()), num_returns=len(tasks), timeout=ANSWER_TIMEOUT_S)
    answers: dict[str, Any] = {}
    for name, task in tasks.items():
        try:
            answers[name] = ray.get(task, timeout=0)
        except TimeoutError:  # Ray's GetTimeoutError is one
            answers[name] = f"no answer in {format_seconds(ANSWER_TIMEOUT_S)}"
        except RayError as error:
            answers[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
    return answers


def _clocks(inspectors: Mapping[str, Any]) -> dict[str, list[ClockReading]]:
    readings: dict[str, list[ClockReading]] = {}
    for name, handle in inspectors.items():
        for _ in range(_NUM_CLOCK_READINGS):
            with suppress(RayError, TimeoutError):  # a node that has just been lost: the next check names it
                asked = time.time()
                theirs: Any = ray.get(handle.clock.remote(), timeout=ANSWER_TIMEOUT_S)
                answered = time.time()
                reading = ClockReading(ahead_s=theirs - (asked + answered) / 2, round_trip_s=answered - asked)
                readings.setdefault(name, []).append(reading)
    return readings


def _storage(inspectors: Mapping[str, Any], storage: str | None) -> Finding:
    """Each node writes, then each reads what all others wrote."""
    if storage is None:
        return warn("storage", "not checked: no config names one", "Name it: `raytune preflight CONFIG`, or storage=FOLDER.")
    tokens = {name: secrets.token_hex(16) for name in inspectors}
    try:
        written = _ask({name: handle.write_token.remote(storage, name, tokens[name]) for name, handle in inspectors.items()})
        failures = {(name, name): what for name, what in written.items() if what is not None}
        wrote = {name: token for name, token in tokens.items() if written[name] is None}
        read = _ask({name: handle.read_tokens.remote(storage, wrote) for name, handle in inspectors.items()})
        for reader, misread in read.items():
            if isinstance(misread, str):
                failures[(reader, reader)] = misread
            elif (reader, reader) not in failures:
                failures.update({(writer, reader): what for writer, what in misread.items()})
    finally:
        _ask({name: handle.remove_tokens.remote(storage) for name, handle in inspectors.items()})
        _ask({name: handle.remove_new_storage.remote(storage) for name, handle in inspectors.items()})
    return judge_shared_storage(storage, failures, list(inspectors))


def instance_of(section: ClusterSection, facts: Iterable[MachineFacts]) -> Instance | None:
    """The type of the nodes: what the user says, or what all machines with GPUs say of themselves; None: not known."""
    catalogue = load_catalogue()
    if section.instance is not None:
        return catalogue.instance(section.instance)
    products = {one.product for one in facts if one.gpus}
    return catalogue.instances.get(str(products.pop())) if len(products) == 1 else None


def _bandwidth(
    section: ClusterSection, nodes: Sequence[Node], facts: Mapping[str, MachineFacts], expected: Expected | None
) -> list[Finding]:
    try:
        fitting = nodes_for_workers([node.resources for node in nodes], section)
    except ClusterError as error:
        return [fail("all-reduce", str(error), "Ask for less per worker, or look why nodes lack what they should have.")]
    num_gpus = 0 if section.gpus_per_worker == 0 else int(sum(node.get("GPU", 0) for node in fitting))
    # On CPUs the number of workers is the config's choice; one per node is what tells most.
    workers = section.workers if section.workers != "auto" else num_gpus or len(fitting)
    names = {node.id: node.name for node in nodes}
    try:
        with ranks_on_cluster(
            workers,
            cpus=section.cpus_per_worker,
            gpus=1 if num_gpus else 0,
            placement=section.placement if section.workers != "auto" or num_gpus else "spread",
            start_timeout=section.start_timeout,
        ) as ranks:
            instance = instance_of(section, facts.values()) if num_gpus else None
            if expected is None and instance is not None:
                expected = expected_of(instance, load_catalogue().gpu_of(instance), ranks.workers_on_a_node)
            reductions = ranks.reduce_all()
            total = _judged(reductions, expected, num_nodes=len(ranks.nodes))
            found = [total, *_network(ranks, names, facts, instance)] if reductions else [total]
            if len(ranks.nodes) < 3 or not is_slow(total, expected and expected.bytes_per_s):
                return found
            return [*found, judge_pairs(_pairs(ranks, names), [names[node] for node in ranks.nodes])]
    except ReductionError as error:
        return [fail("all-reduce", str(error), error.fix)]
    except ClusterError as error:  # the places are not free
        return [
            fail("all-reduce", str(error), "Try again when the jobs that hold the places have ended, or ask for fewer workers.")
        ]


def _judged(reductions: Sequence[Reduction], expected: Expected | None, *, num_nodes: int) -> Finding:
    """One node has no network between nodes to be held against anything."""
    if num_nodes < 2:
        return judge_within(reductions)
    if expected is None:
        return judge_all_reduce(reductions, None)
    return judge_all_reduce(reductions, expected.bytes_per_s, expected.why)


def _network(
    ranks: Ranks, names: Mapping[str, str], facts: Mapping[str, MachineFacts], instance: Instance | None
) -> list[Finding]:
    networks = {names[node]: network for node, network in ranks.networks().items()}
    return [judge_network(networks, instance, {name: one.fabric_devices for name, one in facts.items()})]


def _pairs(ranks: Ranks, names: Mapping[str, str]) -> dict[tuple[str, str], Reduction]:
    found: dict[tuple[str, str], Reduction] = {}
    for pairs in rounds_of_pairs(ranks.nodes):
        found.update({(names[one], names[other]): pair for (one, other), pair in ranks.reduce_pairs(pairs).items()})
    return found
