"""What a trial is told: its config, its plan and the questions that it is measured by, in a file of the sweep's folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from raytune.config.sections.run import RunConfig
from raytune.evaluation.questions import Question, from_json_lines, to_json_lines
from raytune.plan.run_plan import RunPlan
from raytune.storage import read_json, write_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What a trial is to do."""

    config: RunConfig
    plan: RunPlan
    questions: Sequence[Question]
    """Of suites that are measured while it trains."""

    @classmethod
    def read(cls, path: str) -> Self:
        values = read_json(path)
        return cls(
            config=RunConfig.model_validate(values["config"]),
            plan=RunPlan.model_validate(values["plan"]),
            questions=from_json_lines(values.get("questions", "").encode()),
        )

    def write(self, path: str) -> None:
        plan, config = self.plan.model_dump(mode="json"), self.config.model_dump(mode="json")
        write_json(path, {"config": config, "plan": plan, "questions": to_json_lines(self.questions).decode()})
