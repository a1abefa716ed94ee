"""What a worker can do: a table of tasks, each given the same started engine. A request is what the driver asks, as JSON."""

from collections.abc import Callable, Mapping
from typing import Any

from raytune.plan.run_plan import RunPlan
from raytune.training.find_rate import find_rate
from raytune.training.run import train_started
from raytune.training.score import score_rows
from raytune.training.start.start import Started, Worker, start

Request = Mapping[str, Any]
"""`saved_model`: the folder of a model that is loaded in place of the untrained one; `checkpoint`: the task loads one over it;
the rest is the task's own."""

TASKS: dict[str, Callable[[Started, Request], None]] = {
    "train": lambda started, request: train_started(started),
    "score": score_rows,
    "find_rate": find_rate,
}


def perform(task: str, plan: RunPlan, worker: Worker, request: Request) -> None:
    """Start the engine and do a task with it, on this rank.

    Raises:
        RaytuneError: the same on every rank where it concerns all of them.
    """
    checkpoint = request.get("checkpoint")
    num_made = checkpoint["step"] if checkpoint else 0
    started = start(plan, worker, request.get("saved_model"), looks_at_data=not checkpoint, num_made=num_made)
    TASKS[task](started, request)
