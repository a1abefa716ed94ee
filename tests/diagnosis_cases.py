"""Little real runs on the built-in toy, made to go wrong in ways that a page should name; and healthy ones.

`cases/diagnosis` holds what they measured. `python -m tests.diagnosis_cases NAME...` trains them again, on one core in half a
minute each, by the plain engine without Ray, and writes it there.
"""

import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from raytune.config.load import config_from
from raytune.config.sections.run import RunConfig
from raytune.data.files.demo import demo_rows
from raytune.errors import TrainingError
from raytune.launch.cluster.host import this_machine
from raytune.launch.data.prepare import prepare
from raytune.launch.state.diagnosis import Evidence
from raytune.launch.state.outcome import changes
from raytune.launch.state.record import write_plan
from raytune.metrics.history import History
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import RunFolder
from raytune.training.run import Worker, train
from tests.tiny import tiny_plan

STORED = Path(__file__).parent / "cases" / "diagnosis"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run, and what is wrong with it."""

    symptoms: tuple[str, ...]
    """Names of those that are to be told, no others."""
    keys: tuple[str, ...] = ()
    """What to change, as told."""
    rate: float = 3e-3
    steps: int = 60
    num_rows: int = 240
    full: bool = False
    training: dict[str, Any] = field(default_factory=dict)
    has_general_rows: bool = False
    """Whether the loss is measured on what the base can do, too."""
    are_shuffled: bool = False
    """Whether each row has the answer of the next, so that there is nothing to learn but the rows themselves."""
    odd_rows: tuple[int, ...] = ()
    """Places in the file of rows that are noise."""
    template: str = "auto"


CASES = {
    "healthy": Case(symptoms=()),
    "healthy_cosine": Case(symptoms=(), rate=1e-3, training={"lr_scheduler_type": "cosine"}),
    "rate_too_high": Case(symptoms=("rate_too_high",), keys=("training.learning_rate",), rate=0.3, steps=40),
    "rate_far_too_high": Case(symptoms=("not_finite",), keys=("training.learning_rate",), rate=1e30, full=True, steps=20),
    "rate_too_low": Case(symptoms=("rate_too_low",), keys=("training.learning_rate",), rate=1e-5, steps=40),
    "no_rate": Case(symptoms=("not_falling",), keys=("training.learning_rate",), rate=1e-9, steps=20),
    "overfit": Case(
        symptoms=("overfitting", "few_rows"),
        keys=("training.num_train_epochs", "data.train"),
        full=True,
        num_rows=16,
        rate=1e-3,
        steps=80,
        are_shuffled=True,
    ),
    "spikes": Case(symptoms=("spikes",), keys=("training.divergence.policy",), num_rows=300, steps=75, odd_rows=(60, 130, 220)),
    "forgetting": Case(
        symptoms=("forgetting",),
        keys=("strategy.replay",),
        has_general_rows=True,
    ),
}


def config_of(case: Case, folder: Path) -> RunConfig:
    rows = demo_rows("train", case.num_rows, seed=0)
    if case.are_shuffled:
        answers = [row["messages"][-1]["content"] for row in rows]
        for row, answer in zip(rows, [*answers[1:], answers[0]]):
            row["messages"][-1]["content"] = answer
    noise = "".join(chr(33 + 7 * index % 90) for index in range(200))
    for place in case.odd_rows:
        rows[place]["messages"][-1]["content"] = noise
    files = {"rows": rows, "general": demo_rows("pretraining", 24, seed=0)}
    for name, content in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    validation = ["demo:validation", str(folder / "general.jsonl")][: 1 + case.has_general_rows]
    return config_from(
        {
            "name": "run",
            "storage": str(folder),
            "model": {"base": "demo"},
            "data": {
                "train": str(folder / "rows.jsonl"),
                "validation": [{"path": path, "max_rows": 24} for path in validation],
                "max_length": 256,
                "packing": "none",
                "template": case.template,
            },
            "adapter": {"method": "full"} if case.full else {"method": "lora", "rank": 8, "alpha": 16},
            "training": {
                "max_steps": case.steps,
                "global_batch_size": 4,
                "learning_rate": case.rate,
                "lr_scheduler_type": "linear",
                "warmup_steps": 0 if case.rate > 1 else 4,
                **case.training,
            },
            "evaluation": {"every_steps": max(4, case.steps // 6)},
            "cluster": {"workers": 1, "cpus_per_worker": 1},
        }
    )


def train_case(case: Case, folder: Path) -> tuple[RunPlan, History, str | None]:
    """Plan, measurements, and what ended the run before its last step, if anything did."""
    config = config_of(case, folder)
    plan = prepare(config, this_machine(config.cluster), map).plan
    files, failure = RunFolder(plan.storage, plan.name), None
    write_plan(files, plan)
    try:
        train(plan, Worker(rank=0, world_size=1, device_index=0, attempt=1, report=lambda metrics: None))
    except TrainingError as error:
        failure = f"rank 0: TrainingError: {error}"
    return plan, History.read(files.metrics), failure


def stored_evidence(name: str) -> Evidence:
    """What a page knows of a stored run; of its plan, what the rules look at."""
    case, history = CASES[name], History.read(STORED / f"{name}.jsonl")
    failures = json.loads((STORED / "failures.json").read_text())
    rows = {"num_rows": case.num_rows, "num_tokens": 135 * case.num_rows, "num_targets": 58 * case.num_rows}
    plan = tiny_plan(
        data={"train": {"name": "train", "path": "/nowhere", **rows}, "row_length": 256},
        optimization={"num_steps": case.steps, "num_rows": 4 * case.steps, "learning_rate": case.rate},
    )
    return evidence_of(plan, history, failures.get(name))


def evidence_of(plan: RunPlan, history: History, failure: str | None) -> Evidence:
    found = changes(history, history.as_of(history.last_step), {})
    return Evidence(plan=plan, history=history, failure=failure, changes=found)


def main(names: list[str]) -> None:
    STORED.mkdir(parents=True, exist_ok=True)
    path = STORED / "failures.json"
    for name in names or list(CASES):
        with TemporaryDirectory() as folder:
            _, _, failure = train_case(CASES[name], Path(folder))
            shutil.copy(Path(folder) / "run" / "metrics.jsonl", STORED / f"{name}.jsonl")
        failures = json.loads(path.read_text()) if path.exists() else {}
        failures |= {name: failure} if failure else {}
        path.write_text(json.dumps(failures, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
