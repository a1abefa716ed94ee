"""Run folders as the driver and the workers write them, without a run."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raytune.config.load import config_from
from raytune.launch.state.record import RunRecord, write_plan
from raytune.metrics.events import EventLog
from raytune.metrics.writer import MetricsWriter
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import RunFolder
from raytune.storage import write_bytes, write_json
from tests.tiny import tiny_plan

STEPS = 20


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def left_run(
    storage: Path,
    *,
    name: str = "r",
    state: Any = "finished",
    failure: str | None = None,
    until: int = STEPS,
    sets: Sequence[str] = (),
    samples: Sequence[Mapping[str, Any]] = (),
    comparisons: Mapping[str, Any] | None = None,
    plan: RunPlan | None = None,
    config: Mapping[str, Any] | None = None,
) -> RunFolder:
    """A run folder as the driver and the workers write it, with an attempt that dies after step 7 and is resumed from step 5."""
    suites = dict.fromkeys(["generation", *(sample["suite"] for sample in samples if "suite" in sample)])
    plan = plan or planned(storage, name=name, evaluation={"suites": [suite(one) for one in suites]})
    folder, clock = RunFolder(str(storage), name), Clock()
    write_plan(folder, plan)
    asked = config_from({"name": "r", "storage": str(storage), "training": {"learning_rate": 0.003}, **(config or {})})
    RunRecord(
        name=name,
        state=state,
        attempts=2,
        created=clock.now,
        config=asked.model_dump(mode="json"),
        versions={"raytune": "0.1"},
        failure=failure,
    ).write(folder)
    for attempt, first, last in ((1, 0, min(7, until)), (2, 5, until)):
        if last <= first:
            continue
        with EventLog(folder.events, attempt=attempt, clock=clock) as events:
            events.write("attempt_started", workers=1, job=None)
            events.write("training_started", step=first)
            with MetricsWriter(folder.metrics, attempt=attempt, resumed_step=first, clock=clock) as metrics:
                if first == 0:
                    metrics.write(0, measured(0, sets))
                for step in range(first + 1, last + 1):
                    metrics.write(step, {"train/loss": 4 / step, "train/learning_rate": 1e-3, "train/grad_norm": 1 + 1 / step})
                    metrics.write(step, {"train/tokens_per_s": 1000.0, "train/memory_bytes": 2.0**30})
                    if step % 5 == 0:
                        metrics.write(step, measured(step, sets))
                        events.write("checkpoint_saved", step=step, num_bytes=2048, path="x")
            if attempt == 1:
                events.write("attempt_failed", cause="rank 0: WorkerDied: killed", collateral=[], decision="retry")
            elif state == "finished":
                events.write("run_finished")
    if state == "finished":
        result = {"best_step": 20, "metrics": measured(20, sets) | {"train/loss": 0.2}, "median_step_s": 1.0}
        result |= {"held_bytes": [{"weights": 100, "optimizer": 200, "peak": 2**30}], "comparison": None}
        write_json(folder.result, result | ({"comparisons": comparisons} if comparisons else {}))
    write_bytes(folder.samples, "".join(json.dumps(sample) + "\n" for sample in samples).encode())
    return folder


def planned(storage: Path, **changes: Any) -> RunPlan:
    counts = {"num_parameters": 1000, "num_trainable": 10}
    return tiny_plan(**{"name": "r", "storage": str(storage), "optimization": {"num_steps": STEPS}, **counts, **changes})


def measured(step: int, sets: Sequence[str]) -> dict[str, float]:
    loss = 5 / (step + 1)
    own = {f"validation/{name}/loss": loss + number * step for number, name in enumerate(sets)}
    return {"validation/loss": loss, "validation/perplexity": math.exp(loss), **own}


def suite(name: str) -> dict[str, Any]:
    return {"name": name, "metrics": ["exact_match"], "batch_size": 8, "max_new_tokens": 64}


def sample(row: int, expected: str, base: str, tuned: str, **more: str) -> dict[str, Any]:
    return {"row": row, "prompt": f"question {row}", "expected": expected, "base": base, "tuned": tuned, **more}


def score(base: float, tuned: float) -> dict[str, Any]:
    numbers = {"base": base, "tuned": tuned, "gain_low": tuned - base - 0.1, "gain_high": tuned - base + 0.1}
    return {"num_rows": 4, "scores": {"exact_match": {"words": "exact match", **numbers}}}
