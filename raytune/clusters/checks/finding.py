"""What a check found: a value, and how a person and a program see it."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["ok", "warn", "fail"]

_RANK: dict[Status, int] = {"ok": 0, "warn": 1, "fail": 2}
_MARK: dict[Status, str] = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The outcome of one check. `warn` slows a run or may end it; `fail` does not let it start, or makes it wrong."""

    name: str
    status: Status
    seen: str
    fix: str = ""
    """What to do about it; empty where nothing is to be done."""

    def __post_init__(self) -> None:
        assert self.status == "ok" or self.fix, f"{self.name}: a finding that is not ok says what to do"


def ok(name: str, seen: str) -> Finding:
    return Finding(name=name, status="ok", seen=seen)


def warn(name: str, seen: str, fix: str) -> Finding:
    return Finding(name=name, status="warn", seen=seen, fix=fix)


def fail(name: str, seen: str, fix: str) -> Finding:
    return Finding(name=name, status="fail", seen=seen, fix=fix)


def worst(findings: Iterable[Finding]) -> Status:
    ranks: dict[int, Status] = {rank: status for status, rank in _RANK.items()}
    return ranks[max((_RANK[finding.status] for finding in findings), default=0)]


def over_nodes(findings: Sequence[tuple[str, Finding]]) -> Finding:
    """One line of the same check on several nodes: the nodes that stand out by name, or what all have.

    Args:
        findings: node and finding, of at least one node.
    """
    status = worst(finding for _, finding in findings)
    name = findings[0][1].name
    if status == "ok":
        seen: dict[str, int] = {}
        for _, finding in findings:
            seen[finding.seen] = seen.get(finding.seen, 0) + 1
        only = len(seen) == 1
        text = "; ".join(what if only else f"{count} × {what}" for what, count in seen.items())
        return ok(name, text if len(findings) == 1 else f"{len(findings)} nodes: {text}")
    bad = [(node, finding) for node, finding in findings if finding.status != "ok"]
    fixes = list(dict.fromkeys(finding.fix for _, finding in bad if finding.status == status))
    where: dict[str, list[str]] = {}
    for node, finding in bad:
        where.setdefault(finding.seen, []).append(node)
    parts = [f"{', '.join(nodes)}: {what}" for what, nodes in where.items()]
    return Finding(name=name, status=status, seen="; ".join(parts), fix=" ".join(fixes))


def findings_text(findings: Sequence[Finding]) -> str:
    """A table with one line per check, the fix below each that needs one, and a line that counts."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{_MARK[finding.status]}  {finding.name.ljust(width)}  {finding.seen}")
        if finding.fix:
            lines.append(f"      {'':{width}}  fix: {finding.fix}")
    counts = {status: sum(finding.status == status for finding in findings) for status in _RANK}
    lines.append(f"{len(findings)} checks: {counts['ok']} ok, {counts['warn']} to look at, {counts['fail']} failed")
    return "\n".join(lines)


def findings_json(findings: Sequence[Finding]) -> dict[str, Any]:
    return {"ok": worst(findings) != "fail", "checks": [asdict(finding) for finding in findings]}
