"""What a sweep came to: its trials, ranked, and what they cost. Values, with their form as JSON."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from raytune.metrics.json_numbers import decode_number, encode_number
from raytune.sweeps.trial import Trial

State = Literal["waiting", "running", "finished", "stopped", "failed"]
Mode = Literal["min", "max"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialResult:
    """What one trial came to.

    Attributes:
        value: best finite value of the metric so far; None: never measured.
        step: last step that was trained.
        num_steps: its full budget.
        rung: index of the last rung that it reached, from 0; None before the first.
        worker_s: wall seconds × workers that it held, over all attempts.
        cause: why it failed, which rung stopped it, or which rule of its own ended it early.
        curve: (step, value) of the metric wherever it was measured.
        folder: its run folder.
    """

    trial: Trial
    state: State
    value: float | None
    step: int
    num_steps: int
    rung: int | None
    worker_s: float
    cause: str | None
    curve: tuple[tuple[int, float], ...]
    folder: str

    @property
    def is_ranked(self) -> bool:
        """Whether it may win: it did not fail and has a finite value."""
        return self.state != "failed" and self.value is not None and math.isfinite(self.value)

    @property
    def ended_early(self) -> bool:
        """Whether it is finished, by a rule of its own, before its full budget."""
        return self.state == "finished" and self.step < self.num_steps

    @property
    def num_rungs(self) -> int:
        """How many rungs it reached."""
        return 0 if self.rung is None else self.rung + 1

    def to_json(self) -> dict[str, Any]:
        """The result as strict JSON."""
        return {
            "name": self.trial.name,
            "number": self.trial.number,
            "values": dict(self.trial.values),
            "state": self.state,
            "value": None if self.value is None else encode_number(self.value),
            "step": self.step,
            "num_steps": self.num_steps,
            "rung": self.rung,
            "worker_s": self.worker_s,
            "cause": self.cause,
            "curve": [[step, encode_number(value)] for step, value in self.curve],
            "folder": self.folder,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """What `to_json` was called on."""
        return cls(
            trial=Trial(number=record["number"], values=dict(record["values"])),
            state=record["state"],
            value=None if record["value"] is None else decode_number(record["value"]),
            step=record["step"],
            num_steps=record["num_steps"],
            rung=record["rung"],
            worker_s=record["worker_s"],
            cause=record["cause"],
            curve=tuple((step, decode_number(value)) for step, value in record["curve"]),
            folder=record["folder"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepResult:
    """What a sweep came to, or has come to so far.

    Attributes:
        metric: name of the metric that trials are compared by, such as `validation/loss`.
        rungs: steps of the rungs, for a trial with the usual number of tokens per step.
        keys: keys of the space, in its order.
        trials: as `ranked` puts them.
        wall_s: seconds that all commands of the sweep took together.
        spent_worker_s: wall seconds × workers that were held.
        full_worker_s: what it would have taken to train every trial to its full budget.
        finished_before: whether it was only read: an earlier command had finished it.
    """

    name: str
    folder: str
    metric: str
    mode: Mode
    device: Literal["cpu", "cuda"]
    rungs: tuple[int, ...]
    keys: tuple[str, ...]
    trials: tuple[TrialResult, ...]
    wall_s: float
    spent_worker_s: float
    full_worker_s: float
    finished_before: bool = False

    @property
    def best(self) -> TrialResult | None:
        """The winner; None while no trial has a value that counts."""
        return next((trial for trial in ranked(self.trials, self.mode) if trial.is_ranked), None)

    @property
    def is_complete(self) -> bool:
        """Whether every trial has ended and at least one was trained to the end: only then can a saving be told."""
        states = {trial.state for trial in self.trials}
        return "finished" in states and not states & {"waiting", "running"}

    @property
    def saved_share(self) -> float:
        """Share of the full grid's worker seconds that were not needed; below zero where faults cost more than stopping saved."""
        return 1 - self.spent_worker_s / self.full_worker_s if self.full_worker_s > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """The result as strict JSON. `best` and `saved_share` are for readers; they follow from the rest."""
        return {
            "name": self.name,
            "folder": self.folder,
            "metric": self.metric,
            "mode": self.mode,
            "device": self.device,
            "rungs": list(self.rungs),
            "keys": list(self.keys),
            "best": self.best.trial.name if self.best else None,
            "saved_share": self.saved_share,
            "wall_s": self.wall_s,
            "spent_worker_s": self.spent_worker_s,
            "full_worker_s": self.full_worker_s,
            "trials": [trial.to_json() for trial in self.trials],
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """What `to_json` was called on."""
        return cls(
            name=record["name"],
            folder=record["folder"],
            metric=record["metric"],
            mode=record["mode"],
            device=record["device"],
            rungs=tuple(record["rungs"]),
            keys=tuple(record["keys"]),
            trials=tuple(TrialResult.from_json(trial) for trial in record["trials"]),
            wall_s=record["wall_s"],
            spent_worker_s=record["spent_worker_s"],
            full_worker_s=record["full_worker_s"],
        )


def ranked(results: Iterable[TrialResult], mode: Mode) -> list[TrialResult]:
    """Best value first, then those without a finite value, failed ones last; equal ones by number."""

    def place(result: TrialResult) -> tuple[int, float, int]:
        if result.is_ranked:
            assert result.value is not None
            return 0, result.value if mode == "min" else -result.value, result.trial.number
        return (2 if result.state == "failed" else 1), 0.0, result.trial.number

    return sorted(results, key=place)
