"""A run as its folder shows it at any time: finished, failed, or still at work."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from pydantic import ValidationError

from raytune.config.load import dump_yaml
from raytune.config.sections.evaluation import GENERATION
from raytune.config.sections.run import RunConfig
from raytune.credentials import redacted
from raytune.errors import UserError
from raytune.evaluation.compare import Comparison
from raytune.launch.state.diagnosis import Evidence, Symptom, diagnose
from raytune.launch.state.outcome import Change, Spent, changes, in_words
from raytune.launch.state.record import RunRecord, read_plan, readable
from raytune.launch.state.result import RunResult
from raytune.metrics.events import read_events
from raytune.metrics.history import History
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import RunFolder, SweepFolder
from raytune.storage import absolute, exists, read_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSeen:
    """What can be told of a run now."""

    folder: RunFolder
    record: RunRecord
    plan: RunPlan
    history: History
    events: Sequence[dict[str, Any]]
    result: RunResult | None
    """None until it has finished."""
    comparisons: dict[str, Comparison]
    """By suite; empty until it has finished."""
    samples: dict[str, list[dict[str, Any]]]
    """Answers of base and tuned model, by suite."""
    evidence: Evidence
    """What a diagnosis is made of; of a run without a result, changes are those of what it measured last."""

    @classmethod
    def read(cls, path: str) -> Self:
        """Read a run folder, at any time after the run was planned.

        Raises:
            UserError: if there is no run, or another raytune wrote it.
        """
        storage, _, name = absolute(path).rpartition("/")
        folder = RunFolder(storage, name)
        record = RunRecord.read(folder)
        if record is None:
            if exists(SweepFolder(storage, name).sweep):
                raise UserError(f"{folder.path} is a sweep. Name its trials, which are runs: {folder.path}/trials/*")
            raise UserError(f"{folder.path} is no run folder: it has no run.json. Name one, such as runs/quickstart.")
        if not exists(folder.plan):
            raise UserError(f"Run {folder.path} has no plan yet, so there is nothing to tell. Ask again once it has begun.")
        plan, history, events = read_plan(folder), History.read(folder.metrics), read_events(folder.events)
        result = RunResult.read(folder) if record.state == "finished" and exists(folder.result) else None
        if result:
            evidence = result.evidence
        else:
            found = changes(history, history.as_of(history.last_step), {})
            evidence = Evidence.of(plan, history, events, found, failure=record.failure)
        return cls(
            folder=folder,
            record=record,
            plan=plan,
            history=history,
            events=events,
            result=result,
            comparisons=result.comparisons if result else {},
            samples=_samples(folder) if result else {},
            evidence=evidence,
        )

    @property
    def last_step(self) -> int:
        return self.history.last_step

    @property
    def changes(self) -> Sequence[Change]:
        return self.evidence.changes

    @property
    def spent(self) -> Spent:
        assert self.evidence.spent is not None
        return self.evidence.spent

    @property
    def words(self) -> list[str]:
        return self.result.words if self.result else in_words(self.spent, self.changes, self.last_step)

    @property
    def failure(self) -> str | None:
        """What ended it, or its newest failed attempt; without credentials."""
        return self.evidence.failure

    @property
    def step_s(self) -> float | None:
        """Seconds of a step, the median."""
        return self.evidence.step_s

    @property
    def symptoms(self) -> list[Symptom]:
        return diagnose(self.evidence)

    @property
    def config(self) -> RunConfig | None:
        """What was asked; None if another raytune wrote it down."""
        try:
            return RunConfig.model_validate(self.record.config)
        except ValidationError:
            return None

    @property
    def config_text(self) -> str:
        """What was asked, as YAML that can be trained again, without credentials."""
        config = self.config
        return redacted(dump_yaml(config) if config else json.dumps(self.record.config, indent=1))


def _samples(folder: RunFolder) -> dict[str, list[dict[str, Any]]]:
    try:
        lines = read_bytes(folder.samples).splitlines()
    except FileNotFoundError:
        return {}
    found: dict[str, list[dict[str, Any]]] = {}
    with readable(folder.samples, folder):
        for line in lines:
            sample = json.loads(line)
            found.setdefault(sample.get("suite", GENERATION), []).append(sample)
    return found
