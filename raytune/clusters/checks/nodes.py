"""What the facts of several machines mean together: who differs, who is slow, who does not see what others wrote. Pure."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raytune.clusters.checks.facts import MachineFacts
from raytune.clusters.checks.finding import Finding, fail, ok, warn
from raytune.units import format_bytes, format_rate

# Below these shares of what the network should give. Published all-reduce figures reach 80 to 90 % of the line.
SLOW_SHARE, POOR_SHARE = 0.5, 0.75
# A node whose best pair has less than this share of what the middle node's best pair has is the slow one.
SLOW_NODE_SHARE = 0.6
CLOCK_S = 2.0


def judge_versions(nodes: Mapping[str, MachineFacts]) -> Finding:
    """Different versions compute different numbers, or do not understand each other's messages."""
    names = list(dict.fromkeys(name for facts in nodes.values() for name in facts.versions))
    differing = []
    for name in names:
        seen = {node: facts.versions.get(name, "missing") for node, facts in nodes.items()}
        if len(set(seen.values())) > 1:
            common = _most_common(list(seen.values()))
            others = ", ".join(f"{version} on {node}" for node, version in seen.items() if version != common)
            differing.append(f"{name}: {others}; {common} elsewhere")
    if differing:
        return fail(
            "versions",
            "; ".join(differing),
            "Start every node from the same image, or install the same lock file on it, and restart Ray there.",
        )
    (versions,) = {tuple(facts.versions.items()) for facts in nodes.values()} or {()}
    return ok("versions", f"{len(nodes)} nodes: " + ", ".join(f"{name} {version}" for name, version in versions))


def judge_alike(nodes: Mapping[str, MachineFacts]) -> Finding:
    """The slowest GPU sets the pace, and the smallest one the plan."""
    kinds = {node: _kind(facts) for node, facts in nodes.items() if facts.gpus}
    if len(set(kinds.values())) > 1:
        common = _most_common(list(kinds.values()))
        return warn(
            "equal nodes",
            ", ".join(f"{node} has {kind}" for node, kind in kinds.items() if kind != common) + f"; {common} elsewhere",
            "Train on nodes of one kind: the slowest sets the pace, the smallest what fits.",
        )
    return ok("equal nodes", f"{len(kinds)} × {next(iter(kinds.values()))}" if kinds else "no GPUs to compare")


def judge_tokens(nodes: Mapping[str, MachineFacts], *, is_reachable: bool) -> Finding:
    """Whether the cluster asks for a token, on every node alike.

    Args:
        is_reachable: whether other machines than this one reach it.
    """
    modes = {node: facts.auth_mode or "not set" for node, facts in nodes.items()}
    if len(set(modes.values())) > 1:
        return fail(
            "token",
            ", ".join(f"RAY_AUTH_MODE is {mode} on {node}" for node, mode in modes.items()),
            "Export the same RAY_AUTH_MODE before `ray start` on every node: raylets that disagree refuse each other.",
        )
    if "token" not in modes.values() and is_reachable:
        return warn(
            "token",
            f"RAY_AUTH_MODE is {next(iter(modes.values()), 'not set')}: who reaches the cluster's ports runs code on it",
            "Start it with RAY_AUTH_MODE=token (`ray get-auth-token --generate`, mode 600, the same file on every node), and "
            "keep its ports closed.",
        )
    return ok("token", f"RAY_AUTH_MODE is {next(iter(modes.values()), 'not set')}")


def judge_names(nodes: Mapping[str, MachineFacts]) -> Finding:
    """gloo listens where a machine's own name points: at 127.0.0.1 no other machine finds it."""
    if len({facts.host for facts in nodes.values()}) < 2:
        return ok("host names", "one machine")
    wrong = {
        node: facts.resolves_to
        for node, facts in nodes.items()
        if "GLOO_SOCKET_IFNAME" not in facts.settings
        and all(address.startswith(("127.", "::1")) for address in facts.resolves_to)
    }
    if wrong:
        return fail(
            "host names",
            "; ".join(f"{node} resolves its own name to {', '.join(found) or 'nothing'}" for node, found in wrong.items()),
            "Set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface of the training network before `ray start` (`ip -br "
            "addr` lists them), or put the node's address for its name into its /etc/hosts.",
        )
    return ok("host names", f"{len(nodes)} nodes resolve their own")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockReading:
    """How far a node's clock is ahead of ours, as one question and its answer tell."""

    ahead_s: float
    round_trip_s: float

    @property
    def surely_off_s(self) -> float:
        """The part of the difference that the way there and back cannot explain."""
        return max(0.0, abs(self.ahead_s) - self.round_trip_s / 2)


def judge_clocks(clocks: Mapping[str, Sequence[ClockReading]]) -> Finding:
    """Clocks that differ make logs lie, and credentials of buckets invalid.

    Args:
        clocks: readings of each node, at least one.
    """
    best = {node: min(readings, key=lambda reading: reading.round_trip_s) for node, readings in clocks.items()}
    off = {node: reading for node, reading in best.items() if reading.surely_off_s > CLOCK_S}
    if off:
        return warn(
            "clocks",
            "; ".join(
                f"{node} is {abs(reading.ahead_s):.1f} s {'ahead' if reading.ahead_s > 0 else 'behind'} "
                f"(± {reading.round_trip_s / 2:.2g} s)"
                for node, reading in off.items()
            ),
            "Start a time service there: `systemctl enable --now chronyd` (or systemd-timesyncd).",
        )
    worst = max((reading.surely_off_s for reading in best.values()), default=0.0)
    return ok("clocks", f"within {max(worst, 0.1):.1f} s of each other")


def judge_shared_storage(storage: str, failures: Mapping[tuple[str, str], str], nodes: Sequence[str]) -> Finding:
    """Whether what each node wrote was read on every other one.

    Args:
        failures: what went wrong, by the node that wrote and the node that read; the same node twice where it could not write.
    """
    if not failures:
        where = f"written and read on {len(nodes)} nodes, both ways" if len(nodes) > 1 else "written and read"
        return ok("storage", f"{storage}: {where}")
    unable = {writer: what for (writer, reader), what in failures.items() if writer == reader}
    if unable:
        return fail(
            "storage",
            "; ".join(f"{node}: {what}" for node, what in unable.items()),
            f"Give the user of Ray on {', '.join(unable)} the right to read and write {storage}, or mount it there.",
        )
    apart = nodes_apart(failures, nodes)
    if apart:
        return fail(
            "storage",
            f"{storage} on {', '.join(apart)} is not the one that the other nodes have",
            f"Mount the shared file system at {storage} on {', '.join(apart)} before Ray starts, or use a bucket: "
            f"storage=s3://bucket/runs.",
        )
    (writer, reader), what = next(iter(failures.items()))
    return fail(
        "storage",
        f"{reader} does not read what {writer} wrote to {storage}: {what}"
        + (f"; {len(failures)} such pairs" * (len(failures) > 1)),
        "Name a folder that is one and the same on every node (NFS, Lustre, FSx), or a bucket: storage=s3://bucket/runs.",
    )


def nodes_apart(failures: Mapping[tuple[str, str], str], nodes: Sequence[str]) -> list[str]:
    """Nodes that fail with most of the others, while most nodes fail with few; empty where there is no such majority."""
    trouble = {node: sum(node in pair for pair in failures) for node in nodes}
    apart = [node for node in nodes if trouble[node] > len(nodes) - 1]
    return apart if 0 < len(apart) < len(nodes) / 2 else []


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduction:
    """One all-reduce, as the slowest of its ranks saw it."""

    num_bytes: int
    seconds: float
    num_ranks: int

    @property
    def bytes_per_s(self) -> float:
        """Bus bandwidth, as nccl-tests counts it: what every rank sends when the ring is perfect."""
        return 2 * (self.num_ranks - 1) / self.num_ranks * self.num_bytes / self.seconds


def judge_all_reduce(
    reductions: Sequence[Reduction], expected_bytes_per_s: float | None, why: str = "as --expect says"
) -> Finding:
    """Whether all workers together reduce as fast as the network allows.

    Args:
        reductions: by size, the largest last; none where there is one worker only.
        expected_bytes_per_s: of the network; None: not known.
        why: it is expected.
    """
    if not reductions:
        return ok("all-reduce", "one worker, nothing to reduce")
    seen = _seen(reductions)
    if expected_bytes_per_s is None:
        return ok("all-reduce", f"{seen}; what it should be is not known (cluster.instance or --expect says it)")
    share = max(reduction.bytes_per_s for reduction in reductions) / expected_bytes_per_s
    seen += (
        f"; {share:.0%} of the expected {format_rate(expected_bytes_per_s)} ({why}); fails below {SLOW_SHARE:.0%}, "
        f"{format_rate(SLOW_SHARE * expected_bytes_per_s)}"
    )
    fix = (
        "Look at the fabric: `NCCL_DEBUG=INFO` must name EFA, IB or TCPX and not Socket; the security group must allow all "
        "traffic within itself (EFA), and NCCL_SOCKET_IFNAME name the right interface."
    )
    if share < SLOW_SHARE:
        return fail("all-reduce", seen, fix)
    return warn("all-reduce", seen, fix) if share < POOR_SHARE else ok("all-reduce", seen)


def judge_within(reductions: Sequence[Reduction]) -> Finding:
    """What the workers of one node reach, which no network has a part in."""
    return ok("all-reduce", _seen(reductions) if reductions else "one worker, nothing to reduce")


def _seen(reductions: Sequence[Reduction]) -> str:
    return f"{reductions[-1].num_ranks} workers: " + ", ".join(
        f"{format_rate(reduction.bytes_per_s)} at {format_bytes(reduction.num_bytes)}" for reduction in reductions
    )


def is_slow(finding: Finding, expected_bytes_per_s: float | None) -> bool:
    """Whether pairs of nodes are worth a look: the total is slow, or nothing says what it should be."""
    return finding.status != "ok" or expected_bytes_per_s is None


def rounds_of_pairs(nodes: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Each node with its two neighbours in a ring, in rounds whose pairs share no node, so that they run at the same time.

    A slow node slows both of its pairs, a slow pair none of the others: with three nodes and more the slow one is known.
    """
    if len(nodes) < 2:
        return []
    if len(nodes) == 2:
        return [[(nodes[0], nodes[1])]]
    ring = [(node, nodes[(index + 1) % len(nodes)]) for index, node in enumerate(nodes)]
    even = len(ring) - len(ring) % 2
    return [ring[0:even:2], ring[1:even:2], *([ring[even:]] if len(ring) % 2 else [])]


def judge_pairs(pairs: Mapping[tuple[str, str], Reduction], nodes: Sequence[str]) -> Finding:
    """Which node is slow, by the best of each node's pairs against the best of the node in the middle."""
    best = {node: max(pair.bytes_per_s for names, pair in pairs.items() if node in names) for node in nodes}
    middle = statistics.median(best.values())
    slow = [node for node in nodes if best[node] < SLOW_NODE_SHARE * middle]
    if slow:
        return fail(
            "slow node",
            "; ".join(f"{node} reaches {format_rate(best[node])} with its better neighbour" for node in slow)
            + f"; the others {format_rate(middle)}",
            f"Replace {', '.join(slow)}, or look there at the link (`ethtool`, `ibstat`), at other jobs, and at a throttled GPU "
            f"(`nvidia-smi -q -d PERFORMANCE`).",
        )
    return ok("slow node", f"none; pairs of nodes reach {format_rate(min(best.values()))} to {format_rate(max(best.values()))}")


def _kind(facts: MachineFacts) -> str:
    return f"{len(facts.gpus)} × {facts.gpus[0].name}"


def _most_common(values: Sequence[str]) -> str:
    return max(values, key=list(values).count)
