"""The ledger of a sweep: its trials, what was decided about them, how they ended. One JSON object per line, only ever added.

It is what a sweep resumes from, whatever process died: Ray Tune's own state is a cache beside it. Lines come in the order of the
decisions, on which asynchronous halving depends.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from raytune.metrics.events import EventFollower, EventLog
from raytune.metrics.json_numbers import decode_number, encode_number
from raytune.sweeps.halving import RungDecision, Standings, Verdict
from raytune.sweeps.trial import Trial

End = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """One decision about a trial."""

    trial: str
    step: int
    amount: float
    """Training that the trial had had, in the unit of the rungs."""
    value: float
    decision: RungDecision


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a trial ended."""

    state: End
    cause: str | None = None
    is_final: bool = True
    """False: it failed for a reason that may pass, and the next command tries it again."""


@dataclass(slots=True)
class Known:
    """What a ledger says."""

    num_commands: int = 0
    comparison: dict[str, Any] = field(default_factory=dict)
    """How the first command compared trials."""
    trials: dict[str, Trial] = field(default_factory=dict)
    decisions: list[Decided] = field(default_factory=list)
    ends: dict[str, Ended] = field(default_factory=dict)
    wall_s: float = 0.0
    """Over all commands, from a command's first line to its last."""

    @property
    def standings(self) -> Standings:
        """Values at rungs, in the order in which they were judged."""
        standings = Standings()
        for decided in self.decisions:
            if decided.decision.rung is not None:
                standings.note(decided.decision.rung, decided.trial, decided.value)
        return standings

    def verdict_on(self, trial: str) -> Decided | None:
        """The decision that ended a trial, if one did."""
        against = (decided for decided in self.decisions if decided.trial == trial)
        return next((decided for decided in against if decided.decision.verdict is not Verdict.GO_ON), None)

    def has_ended(self, trial: str) -> bool:
        """Whether a trial has ended for good: trying it again would only end alike."""
        end = self.ends.get(trial)
        return end is not None and end.is_final

    @property
    def unended(self) -> list[Trial]:
        return [trial for trial in self.trials.values() if not self.has_ended(trial.name)]

    def rung_of(self, trial: str) -> int | None:
        """Index of the last rung that a trial has reached."""
        rungs = [d.decision.rung for d in self.decisions if d.trial == trial and d.decision.rung is not None]
        return max(rungs, default=None)


def read_ledger(path: str) -> Known:
    """What the ledger of a sweep says; nothing for a new sweep."""
    return LedgerFollower(path).look()


class LedgerFollower:
    """Reads a ledger while it grows: every look reads what was added since the one before."""

    def __init__(self, path: str) -> None:
        self._events = EventFollower(path)
        self._begin()

    def _begin(self) -> None:
        self._known = Known()
        self._spans: dict[int, tuple[float, float]] = {}

    def look(self) -> Known:
        """What it says by now; the same object, changed, as long as the file only grows.

        Raises:
            UserError: if a line is not JSON.
            ClusterError: if the storage does not answer.
        """
        lines, is_new = self._events.look()
        if is_new:
            self._begin()
        for line in lines:
            first_s, _ = self._spans.get(line["attempt"], (line["time"], 0.0))
            self._spans[line["attempt"]] = first_s, line["time"]
            _note(self._known, line)
        self._known.num_commands = max(self._spans, default=0)
        self._known.wall_s = sum(last_s - first_s for first_s, last_s in self._spans.values())
        return self._known


def _note(known: Known, line: Mapping[str, Any]) -> None:
    match line["event"]:
        case "sweep_started" if not known.comparison:
            known.comparison = dict(line["comparison"])
        case "trial_assigned":
            known.trials[line["trial"]] = Trial(number=line["number"], values=line["values"])
            known.ends.pop(line["trial"], None)
        case "trial_decided":
            decision = RungDecision(Verdict(line["verdict"]), line["rung"], line["cut"])
            value = decode_number(line["value"])
            known.decisions.append(
                Decided(trial=line["trial"], step=line["step"], amount=line["amount"], value=value, decision=decision)
            )
        case "trial_ended":
            known.ends[line["trial"]] = Ended(state=line["state"], cause=line["cause"], is_final=line["is_final"])


class Ledger:
    """Writes the ledger for one command, and knows what it says.

    Args:
        comparison: how this command compares trials, in JSON values.
    """

    def __init__(self, path: str, comparison: Mapping[str, Any]) -> None:
        self.known = read_ledger(path)
        self.command = self.known.num_commands + 1
        """Number of this command among all that worked at the sweep."""
        self._log = EventLog(path, attempt=self.command)
        self._write("sweep_started", comparison=dict(comparison))

    def assign(self, trial: Trial) -> None:
        self._write("trial_assigned", trial=trial.name, number=trial.number, values=dict(trial.values))

    def decide(self, decided: Decided) -> None:
        """Note a decision; it counts once this returns."""
        decision = decided.decision
        self._write(
            "trial_decided",
            trial=decided.trial,
            step=decided.step,
            amount=decided.amount,
            value=encode_number(decided.value),
            verdict=decision.verdict.value,
            rung=decision.rung,
            cut=decision.cut,
        )

    def end(self, trial: str, ended: Ended) -> None:
        self._write("trial_ended", trial=trial, state=ended.state, cause=ended.cause, is_final=ended.is_final)

    def close(self) -> None:
        self._write("sweep_ended")
        self._log.close()

    def _write(self, event: str, **facts: object) -> None:
        self._log.write(event, **facts)
        self._log.flush()
        _note(self.known, {"event": event, **facts})


def end_of(decided: Decided, metric: str) -> Ended:
    """What a decision against a trial makes of it, in words."""
    if decided.decision.verdict is Verdict.FAIL:
        return Ended(state="failed", cause=f"{metric} is {decided.value} after step {decided.step}")
    cut = "" if decided.decision.cut is None else f" against a cut of {_short(decided.decision.cut)}"
    return Ended(state="stopped", cause=f"after step {decided.step}: {_short(decided.value)}{cut}")


def _short(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else str(value)
