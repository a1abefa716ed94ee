"""Suites that are measured while training goes on come to what the end of the run says of the same weights, wherever they are
measured; and training is the same to the last bit, whatever becomes of those who measure."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raytune.evaluate.answers import Chunk
from raytune.evaluate.suite_metrics import Given
from raytune.launch.answering import Answerer, AnsweringPlan
from raytune.launch.evaluator import Evaluator
from raytune.launch.result import RunResult
from raytune.metrics.events import EventLog, read_events
from raytune.metrics.history import History
from raytune.plan.asked_model import AskedModel
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import RunFolder
from raytune.training.run import Worker, train
from tests.numerics.test_whole_run import prepared_run

NUM_STEPS = 6
SUITES = [
    {
        "name": "qa",
        "rows": "demo:test",
        "max_rows": 4,
        "max_new_tokens": 6,
        "batch_size": 3,
        "metrics": ["token_f1", "exact_match"],
    },
    {"name": "general", "rows": "demo:validation", "kind": "loss", "max_rows": 5, "batch_size": 2},
]
METRICS = {"qa/token_f1", "qa/exact_match", "general/loss", "general/perplexity"}


def changes(while_training: Mapping[str, Any] | None, **others: Any) -> dict[str, Any]:
    asked = {} if while_training is None else {"while_training": {"every_steps": 2, **while_training}}
    return {"evaluation": {"every_steps": 3, "suites": SUITES, **asked}, **others}


def run(plan: RunPlan, attempt: int = 1, check: Callable[[], None] = lambda: None) -> None:
    train(plan, Worker(rank=0, world_size=1, device_index=0, attempt=attempt, report=lambda metrics: None, check=check))


def measured(folder: RunFolder, is_meant: Callable[[str], bool]) -> dict[int, dict[str, float]]:
    """By step and name, where anything of what is meant was measured."""
    points = {point.step: point.values for point in History.read(folder.metrics).points}
    found = {step: {name: value for name, value in values.items() if is_meant(name)} for step, values in points.items()}
    return {step: values for step, values in found.items() if values}


def of_training(folder: RunFolder) -> dict[int, dict[str, float]]:
    """But for what a clock says."""
    clocks = ("_per_s", "memory_bytes")
    return measured(folder, lambda name: name.startswith(("train/", "validation/")) and not name.endswith(clocks))


def of_suites(folder: RunFolder) -> dict[int, dict[str, float]]:
    return measured(folder, METRICS.__contains__)


def weights(folder: RunFolder) -> dict[str, Any]:
    (file,) = Path(folder.model).glob("*model.safetensors")
    return load_file(file)


def events_of(folder: RunFolder, *kinds: str) -> list[dict[str, Any]]:
    return [event for event in read_events(folder.events) if event["event"] in kinds]


def assert_trained_alike(folder: RunFolder, other: RunFolder) -> None:
    assert of_training(folder) == of_training(other)
    assert weights(folder).keys() == weights(other).keys()
    for name, value in weights(folder).items():
        assert torch.equal(value, weights(other)[name]), name


class Here:
    """Answers in this process, as the actor does; it may break."""

    def __init__(self, breaks: Callable[[], None] = lambda: None) -> None:
        self._answerer, self._breaks = Answerer(AnsweringPlan(device="cpu", threads=torch.get_num_threads())), breaks

    def answer(self, one: AskedModel, chunk: Chunk) -> dict[int, Given]:
        self._breaks()
        return self._answerer.answer(one, chunk)

    def forget(self, folder: str) -> None:
        self._answerer.forget(folder)

    def end(self) -> None:
        pass


@contextmanager
def evaluator_of(plan: RunPlan, breaks: Callable[[], None] = lambda: None) -> Iterator[Evaluator]:
    assert plan.evaluation.while_training is not None
    with closing(EventLog(RunFolder(plan.storage, plan.name).events, attempt=1)) as events:
        yield Evaluator(plan, plan.evaluation.while_training, lambda: Here(breaks), events, threading.Event())


@pytest.fixture(scope="module")
def off(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Of a run that measures at its end only."""
    folder, plan = prepared_run(tmp_path_factory.mktemp("off"), changes(None))
    run(plan)
    assert not of_suites(folder)
    assert not Path(folder.exports).exists()
    return folder


def test_between_steps_it_comes_to_what_the_end_says_and_training_is_the_same(off: RunFolder, tmp_path: Path) -> None:
    folder, plan = prepared_run(tmp_path, changes({"where": "between_steps"}))
    run(plan)
    assert_trained_alike(folder, off)
    found, result = of_suites(folder), RunResult.read(folder)
    assert found.keys() == {0, 2, 4, 6}
    assert all(values.keys() == METRICS for values in found.values())
    assert result.best_step == NUM_STEPS
    for suite, comparison in result.comparisons.items():
        for name, score in comparison.scores.items():
            assert found[NUM_STEPS][f"{suite}/{name}"] == score.tuned
            assert found[0][f"{suite}/{name}"] == score.base
    assert found[6]["general/loss"] != found[2]["general/loss"], "it measures the weights of its step"
    assert not Path(folder.exports).exists()
    assert [event["step"] for event in events_of(folder, "suites_measured")] == [0, 2, 4, 6]


def test_beside_training_it_comes_to_the_same_though_it_breaks_on_the_way(
    off: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "LOOK_EVERY_S", 0.02)
    folder, plan = prepared_run(tmp_path, changes({"where": "spare"}))
    broken = iter([True, False, False, True])
    most_exports = 0

    def breaks() -> None:
        if next(broken, False):
            raise ConnectionError("its node is gone")

    with evaluator_of(plan, breaks) as evaluator:

        def look() -> None:
            """After each step, before anything else is done there."""
            nonlocal most_exports
            evaluator.look()
            most_exports = max(most_exports, len(exports.exports_in(folder)))
            time.sleep(0.2)  # for the run to look

        run(plan, check=look)
        before_the_end = of_suites(folder)
        evaluator.look()
    assert_trained_alike(folder, off)
    # It broke at step 0, which it measured later, and at step 2, which a newer one had replaced before it was tried again.
    assert before_the_end.keys() == {0, 4}
    at_zero = History.read(folder.metrics).points[0]
    assert at_zero.step == 0
    assert [event["step"] for event in events_of(folder, "exported")] == [0, 2, 4, 6]
    assert len(events_of(folder, "evaluator_away")) == 2
    assert len(events_of(folder, "evaluator_back")) == 2
    assert most_exports <= 2
    last = exports.read_result(folder, NUM_STEPS)
    assert last is not None
    for suite, comparison in RunResult.read(folder).comparisons.items():
        for name, score in comparison.scores.items():
            assert last.values[f"{suite}/{name}"] == score.tuned
            assert before_the_end[0][f"{suite}/{name}"] == score.base
