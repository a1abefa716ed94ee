"""What trackers are told of a run, made of what its folder has. Pure."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from raytune.credentials import find_secret_value
from raytune.evaluation.compare import comparisons_in
from raytune.metrics.json_numbers import decode_number
from raytune.metrics.points import is_of_training
from raytune.plan.costs.memory import tensor_bytes
from raytune.plan.run_plan import RunPlan
from raytune.tracking.tracker import Happening, Setting

_UNTOLD = ("version", "storage", "tracking", "provider", "sweep")
"""Sections that say nothing of what is trained."""


def settings_of(config: Mapping[str, Any], plan: RunPlan) -> dict[str, Setting]:
    """A config as it was resolved, and the main figures of its plan, without what looks like a credential."""
    told = {name: value for section, under in config.items() if section not in _UNTOLD for name, value in _flat(section, under)}
    told |= dict(_figures(plan))
    return {name: value for name, value in told.items() if find_secret_value(name, str(value)) is None}


def _figures(plan: RunPlan) -> Iterator[tuple[str, Setting]]:
    yield from {
        "plan.steps": plan.optimization.num_steps,
        "plan.learning_rate": plan.optimization.learning_rate,
        "plan.workers": plan.batch.workers,
        "plan.rows_per_step": plan.batch.workers * plan.batch.micro_batch_size * plan.batch.accumulation,
        "plan.row_length": plan.data.row_length,
        "plan.engine": plan.engine.kind,
        "plan.zero_stage": plan.engine.zero_stage,
        "plan.device": plan.cluster.device,
        "plan.precision": plan.precision,
        "plan.parameters": plan.num_parameters,
        "plan.trained_parameters": plan.num_trainable,
        "plan.bytes_per_worker": tensor_bytes(plan.memory),
        "plan.checkpoint_bytes": plan.checkpoint_bytes,
    }.items()
    if plan.step_time:
        yield "plan.step_s", plan.step_time.seconds
    if plan.cost:
        yield from {"plan.hours": plan.cost.hours, "plan.usd": plan.cost.usd}.items()


def _flat(name: str, value: Any) -> Iterator[tuple[str, Setting]]:
    """Every value that is there, by dotted name; lists of plain values are one text."""
    if isinstance(value, Mapping):
        for key, under in value.items():
            yield from _flat(f"{name}.{key}", under)
    elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        for number, item in enumerate(value):
            yield from _flat(f"{name}.{number}", item)
    elif isinstance(value, list):
        if value:
            yield name, ", ".join(map(str, value))
    elif value is not None:
        yield name, value


def happening_of(event: Mapping[str, Any], last_step: int) -> Happening:
    """An event of events.jsonl in a line.

    Args:
        last_step: for an event that is about no step.
    """
    facts = {name: value for name, value in event.items() if name not in ("event", "time", "step") and value not in (None, [])}
    step = event.get("step")
    words = event["event"].replace("_", " ") + (f" after step {step}" if step is not None else "")
    details = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items())
    text = f"{words} ({details})" if details else words
    return Happening(step=last_step if step is None else step, time=event["time"], text=text)


def result_of(result: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a result.json: metrics of the model that was kept, what answers are worth, base against tuned, and what it
    took."""
    numbers = {f"result/{name}": decode_number(value) for name, value in result["metrics"].items() if not is_of_training(name)}
    numbers["result/best_step"] = float(result["best_step"])
    for suite, comparison in comparisons_in(result).items():
        for name, score in comparison.scores.items():
            values = {"base": score.base, "tuned": score.tuned, "gain": score.gain}
            numbers |= {f"result/{suite}/{name}/{side}": value for side, value in values.items() if math.isfinite(value)}
    took = result.get("outcome", {})
    return numbers | {f"result/{name}": took[name] for name in ("training_s", "total_s", "usd") if took.get(name) is not None}


def page_mark(record: Mapping[str, Any]) -> str:
    """What the page of a run has in its head, made of run.json: it tells a page of this end from one of an earlier attempt."""
    return f'<meta name="run" content="{record["state"]} in attempt {record["attempts"]}">'
