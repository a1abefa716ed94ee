"""Cross-validation: one run per fold, one after the other on one cluster, and what they come to together."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from raytune.config.sections.run import RunConfig
from raytune.config.sections.split import FoldSection
from raytune.errors import UserError
from raytune.launch.cluster.cluster import connect, map_on_cluster
from raytune.launch.data.prepare import Preparation, refuse_without_cluster
from raytune.launch.data.stores import STORES_FOLDER
from raytune.launch.run import run
from raytune.launch.state.begun import begun_for
from raytune.launch.state.callbacks import Callback
from raytune.launch.state.finished import answer
from raytune.launch.state.result import RunResult
from raytune.metrics.json_numbers import encode_number
from raytune.metrics.points import is_of_training
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import FoldsFolder, RunFolder, SweepFolder
from raytune.storage import absolute, exists, is_local, write_json

NO_INTERVAL = (
    "A standard deviation is over the folds. It is no confidence interval, and none is given: folds share most of their training "
    "rows, so that their values are not independent."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """What a metric came to over the folds."""

    values: tuple[float, ...]
    """By fold."""

    @property
    def mean(self) -> float:
        return math.fsum(self.values) / len(self.values)

    @property
    def deviation(self) -> float:
        """Standard deviation of a fold, from n - 1."""
        return statistics.stdev(self.values) if all(map(math.isfinite, self.values)) else math.nan

    def to_json(self) -> dict[str, Any]:
        numbers = {"mean": self.mean, "standard_deviation": self.deviation, "min": min(self.values), "max": max(self.values)}
        values = [encode_number(value) for value in self.values]
        return {name: encode_number(number) for name, number in numbers.items()} | {"values": values}


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldsResult:
    """Finished runs, one per fold.

    Attributes:
        folder: with the run folders of the folds (`fold-0`, ...) and `folds.json`.
        folds: their results, in the order of the folds.
    """

    name: str
    folder: str
    folds: tuple[RunResult, ...]

    @property
    def metrics(self) -> dict[str, Spread]:
        """What the model of every fold was measured by: validation rows, the test, suites."""
        each = [_metrics_of(result) for result in self.folds]
        return {name: Spread(values=tuple(own[name] for own in each)) for name in each[0] if all(name in own for own in each)}

    @property
    def notes(self) -> list[str]:
        """What to know of these numbers."""
        policy = self.folds[0].plan.checkpoint
        chosen, by = policy.keep_best or policy.keep_last > 1, policy.metric
        words = f"Each fold has its best checkpoint by {by}, chosen by rows that it is measured on: a little too good a value."
        return [NO_INTERVAL, *([words] if chosen else [])]

    @property
    def lines(self) -> list[str]:
        """What they came to, in words: each metric's mean, standard deviation and values, and what to know of them."""
        read = [one.name for one in self.folds if one.finished_before]
        lines = [f"Finished before, and not trained again: {', '.join(read)}."] if read else []
        for name, spread in self.metrics.items():
            each = ", ".join(f"{value:.4g}" for value in spread.values)
            lines.append(f"{name}: {spread.mean:.4g} on average, standard deviation {spread.deviation:.3g}; by fold {each}")
        return [*lines, *self.notes, f"folds    {self.folder}"]

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "folder": self.folder,
            "metrics": {name: spread.to_json() for name, spread in self.metrics.items()},
            "notes": self.notes,
            "folds": [result.to_json() for result in self.folds],
        }


def _metrics_of(result: RunResult) -> dict[str, float]:
    measured = {name: value for name, value in result.metrics.items() if not is_of_training(name)}
    for suite, comparison in result.comparisons.items():
        measured |= {f"{suite}/{name}": score.tuned for name, score in comparison.scores.items()}
    return measured


def train_folds(
    config: RunConfig,
    watch: Callable[[RunPlan], AbstractContextManager] = lambda plan: nullcontext(),
    callbacks: Sequence[Callback] = (),
    leave: Callable[[RunFolder], None] = lambda folder: None,
) -> FoldsResult:
    """Train each fold, or go on where an earlier command stopped: a fold that has finished is only read.

    All folds are planned before the first one is trained.

    Args:
        config: with `data.fold`, which says how many there are.
        watch, callbacks, leave: as for `launch.run.run`, for each fold.

    Raises:
        UserError: before anything is started, if a fold cannot be done, or the folder holds a run or a sweep.
        RunFailedError: if a fold failed; those before it stay.
    """
    fold = config.data.fold
    assert fold is not None
    folder = FoldsFolder(absolute(config.storage), config.name)
    files = {"run": RunFolder(folder.storage, folder.name).run, "sweep": SweepFolder(folder.storage, folder.name).sweep}
    if what := next((what for what, file in files.items() if exists(file)), None):
        raise UserError(f"{folder.path} holds a {what}. Give the folds another name (name=...).", keys=("name",))
    configs = [config_of_fold(config, index) for index in range(fold.of)]
    left = [one for one in configs if not answer(one, RunFolder(one.storage, one.name))]
    with _one_cluster(left):
        results = tuple(run(one, watch=watch, callbacks=callbacks, leave=leave) for one in configs)
    result = FoldsResult(name=config.name, folder=folder.path, folds=results)
    write_json(folder.folds, _record(result))
    return result


def config_of_fold(config: RunConfig, index: int) -> RunConfig:
    """The run of a fold, in the folder of all, with the stores of all runs."""
    fold, storage = config.data.fold, absolute(config.storage)
    assert fold is not None
    beside = f"{storage}/{STORES_FOLDER}" if is_local(storage) else None
    data = {"fold": FoldSection(index=index, of=fold.of), "store": config.data.store or beside}
    return config.model_copy(
        update={
            "name": f"fold-{index}",
            "storage": FoldsFolder(storage, config.name).path,
            "data": config.data.model_copy(update=data),
        }
    )


@contextmanager
def _one_cluster(configs: Sequence[RunConfig]) -> Iterator[None]:
    """A cluster for all of some runs, on which each of them was planned; none where there is nothing to train."""
    if not configs:
        yield
        return
    base = refuse_without_cluster(configs[0])
    with connect(configs[0].cluster) as machine:
        on_cluster = partial(map_on_cluster, start_timeout=configs[0].cluster.start_timeout)
        preparation = Preparation(machine, on_cluster)
        for one in configs:
            preparation.prepare(one, begun_for(one, RunFolder(one.storage, one.name)), base)
        yield


def _record(result: FoldsResult) -> dict[str, Any]:
    """What is written down of all folds; the rest is in their own folders."""
    folds = [
        {"name": one.name, "folder": one.folder, "best_step": one.best_step, "metrics": _encoded(_metrics_of(one))}
        for one in result.folds
    ]
    return {**result.to_json(), "folds": folds}


def _encoded(metrics: Mapping[str, float]) -> dict[str, Any]:
    return {name: encode_number(value) for name, value in metrics.items()}
