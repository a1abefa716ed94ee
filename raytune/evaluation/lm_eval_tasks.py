"""Tasks of lm_eval (lm-evaluation-harness): what a task's files say, and what its metrics are made of.

lm_eval puts a metric together from what each document adds to it. Here that is a sum and how many it is of (documents, words,
bytes), which add up: so the metric is computed, and drawn again for an interval, as those of other suites are.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from raytune.errors import UserError
from raytune.missing import OPTIONAL, install_command
from raytune.plan.run_plan import TaskPlan

PACKAGE = "lm_eval"
SHARES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match")
"""Metrics of lm_eval that lie in 0..1."""


@dataclass(frozen=True, slots=True)
class Aggregation:
    """How lm_eval puts a metric together."""

    of_document: Callable[[Any], tuple[float, float]]
    """A sum and how many it is of, of what a document adds."""
    of_mean: Callable[[np.ndarray], np.ndarray]
    """The metric, of the mean over all documents."""


def _once(value: Any) -> tuple[float, float]:
    return float(value), 1.0


def _weighted(value: Any) -> tuple[float, float]:
    first, second = value
    return float(first), float(second)


def _unless_nan(value: Any) -> tuple[float, float]:
    return (0.0, 0.0) if math.isnan(value) else _once(value)


def _same(mean: np.ndarray) -> np.ndarray:
    return mean


def _perplexity(mean: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # of a model that diverged
        return np.exp(-mean)


AGGREGATIONS: Mapping[str, Aggregation] = {
    "mean": Aggregation(_once, _same),
    "nanmean": Aggregation(_unless_nan, _same),
    "perplexity": Aggregation(_once, _perplexity),
    "weighted_perplexity": Aggregation(_weighted, _perplexity),
    "bits_per_byte": Aggregation(_weighted, lambda mean: -mean / math.log(2)),
}
"""By lm_eval's names. What is no function of a mean is not here."""


@dataclass(frozen=True, slots=True)
class TaskMetric:
    """A metric of a task as its files describe it."""

    put_together_by: str
    """By lm_eval's name: one of `AGGREGATIONS` or another."""
    higher_is_better: bool
    is_share: bool

    @property
    def aggregation(self) -> Aggregation:
        return AGGREGATIONS[self.put_together_by]


@contextmanager
def laid_out(task: TaskPlan) -> Iterator[Any]:
    """lm_eval's index of a task's files, which lie in a folder of their own for the duration of the block.

    Raises:
        UserError: if lm_eval is not here, or its files do not describe the task as one that can be asked.
    """
    if find_spec(PACKAGE) is None:
        raise UserError(
            f"Tasks of lm_eval need the package {PACKAGE}, which the Python of this process does not have. Install it on every "
            f"node: {install_command(OPTIONAL[PACKAGE])}"
        )
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    logging.getLogger(PACKAGE).setLevel(logging.ERROR)  # it warns of what every task and every model in memory does
    with TemporaryDirectory() as scratch:
        for name, text in task.files.items():
            file = Path(scratch, name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        index = TaskManager(include_path=scratch, include_defaults=False)
        entry = index.task_index.get(task.name)
        if entry is None:
            there = ", ".join(index.all_subtasks[:8]) or "none"
            raise UserError(
                f"lm_eval finds no task {task.name} in {', '.join(list(task.files)[:8])}. It finds: {there}. It leaves out "
                f"files whose YAML or `include` it cannot read; what is included has to lie in the folder."
            )
        if entry.kind.name != "TASK":
            raise UserError(
                f"{task.name} is a {entry.kind.name.lower()} of lm_eval. A suite is one task that its YAML describes; make a "
                f"suite of each."
            )
        yield index


def metrics_of_task(task: TaskPlan) -> dict[str, TaskMetric]:
    """The metrics of a task as lm_eval prints them: of a task with several filters, each followed by the filter's name.

    Raises:
        UserError: as above.
    """
    with laid_out(task) as index:
        described: Mapping[str, Any] = index.task_index[task.name].cfg
    from lm_eval.api.registry import AGGREGATION_REGISTRY, DEFAULT_METRIC_REGISTRY, get_metric_aggregation, is_higher_better  # pyright: ignore[reportMissingImports]

    names_of: dict[Any, str] = {function: name for name, function in AGGREGATION_REGISTRY.items()}
    usual = DEFAULT_METRIC_REGISTRY[described.get("output_type", "generate_until")]
    found = {}
    for entry in described.get("metric_list") or [{"metric": name} for name in usual]:
        metric = (
            str(entry["metric"]).rpartition("/")[2].rpartition(".")[2]
        )  # of a function, which stands there by its file: its name
        how = str(entry.get("aggregation") or names_of.get(get_metric_aggregation(metric), "nothing that it knows"))
        higher = entry["higher_is_better"] if "higher_is_better" in entry else is_higher_better(metric)
        found[metric] = TaskMetric(how, bool(higher), metric in SHARES and how == "mean")
    filters = [one["name"] for one in described.get("filter_list") or []]
    if len(filters) < 2:
        return found
    return {f"{metric},{name}": one for name in filters for metric, one in found.items()}


def chosen_metrics(task: TaskPlan, names: Sequence[str]) -> dict[str, TaskMetric]:
    """Some of a task's metrics.

    Raises:
        UserError: as above; if the task has no such metric, or it cannot be put together of sums.
    """
    known = metrics_of_task(task)
    for name in names:
        if name not in known:
            raise UserError(f"Task {task.name} has no metric {name}; it has {'; '.join(known)}.")
        if known[name].put_together_by not in AGGREGATIONS:
            raise UserError(
                f"{name} of task {task.name} is put together by {known[name].put_together_by!r}, of all documents at once, so "
                f"that no interval can be had. Take one that is put together by {', '.join(AGGREGATIONS)}."
            )
    return {name: known[name] for name in names}
