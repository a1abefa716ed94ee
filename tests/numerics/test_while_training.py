"""Suites that are measured while training goes on come to what the end of the run says of the same weights, wherever they are
measured; and training is the same to the last bit, whatever becomes of those who measure."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raytune.evaluation.answers import Chunk
from raytune.evaluation.suite_metrics import Given
from raytune.launch.asking.answering import Answerer, AnsweringPlan
from raytune.launch.asking.evaluator import MOST_FAILURES, Evaluator
from raytune.launch.state.result import RunResult
from raytune.metrics.events import EventLog, read_events
from raytune.metrics.history import History
from raytune.plan.run_plan import RunPlan
from raytune.plan.saved.asked_model import AskedModel
from raytune.run_folder import RunFolder
from raytune.training.checkpoints.commit import committed
from raytune.training.measuring import exports
from raytune.training.run import Worker, train
from raytune.training.steps import requests
from tests.numerics.processes import run_on_ranks
from tests.numerics.test_whole_run import prepared_run, train_rank
from tests.variants import variants

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
    clocks = ("_per_s", "wait_s", "memory_bytes")
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
    num_chunks = 5
    calls, broken, most_exports = count(), (0, 1 + num_chunks, 2 + num_chunks), 0

    def breaks() -> None:
        if next(calls) in broken:
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
    # It broke at step 0, which it measured when it was asked again, and twice at step 2, which step 4 had replaced by then.
    assert before_the_end.keys() == {0, 4}
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


def test_an_evaluator_that_fails_for_ever_gives_up_and_the_run_does_not_wait_for_it(tmp_path: Path) -> None:
    ranked = {"checkpoint": {"metric": "general/loss"}, "training": {"max_steps": 2, "global_batch_size": 2}}
    folder, plan = prepared_run(tmp_path, changes({"where": "spare", "at_start": False}, **ranked))

    def breaks() -> None:
        raise ConnectionError("its node is gone")

    with evaluator_of(plan, breaks) as evaluator:
        thread = threading.Thread(target=evaluator.run, args=(0.05,), daemon=True)
        thread.start()
        run(plan)
        thread.join(20)
        assert not thread.is_alive()
    result = RunResult.read(folder)
    assert result.best_step == 2, "without any value the newest is the best"
    assert len(events_of(folder, "evaluator_away")) == len(events_of(folder, "evaluator_given_up")) == 1
    assert [event["step"] for event in events_of(folder, "suites_awaited", "suites_not_awaited")] == [2, 2]
    assert MOST_FAILURES == 3
    assert not of_suites(folder)


def test_the_best_checkpoint_is_chosen_by_results_that_come_after_it_was_saved(tmp_path: Path) -> None:
    ranked = {"checkpoint": {"metric": "general/loss", "mode": "min", "keep_last": 3}}
    folder, plan = prepared_run(tmp_path, changes({"where": "spare", "every_steps": 2, "at_start": False}, **ranked))
    assert plan.checkpoint.every_steps == 2
    with evaluator_of(plan) as evaluator:
        slow = threading.Event()
        thread = threading.Thread(target=evaluator.run, args=(0.05,), daemon=True)
        run(plan, check=lambda: (thread.is_alive() or thread.start(), time.sleep(0.4), slow.set())[-1])
        evaluator._ended.set()
        thread.join(20)
    found, result = of_suites(folder), RunResult.read(folder)
    assert NUM_STEPS in found, "it was waited for"
    assert result.best_step == min(found, key=lambda step: found[step]["general/loss"])
    assert result.metrics["general/loss"] == found[result.best_step]["general/loss"]
    known = {commit.step: commit.metrics for commit in committed(folder)}
    assert not any("general/loss" in metrics for metrics in known.values()), "it was not known when they were saved"


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_with_what_was_measured_before(off: RunFolder, tmp_path: Path) -> None:
    folder, plan = prepared_run(tmp_path, changes({"where": "spare"}, checkpoint={"every_steps": 3}))

    with evaluator_of(plan) as evaluator:
        die = dying_after(5)
        with pytest.raises(ConnectionError):
            run(plan, check=lambda: (evaluator.look(), die())[-1])
        assert [result.export.step for result in exports.results_in(folder)] == [0, 2, 4]
        stale = exports.exports_in(folder)[-1]
        assert stale.step == 4
        run(plan, attempt=2, check=lambda: (evaluator.look(), None)[-1])
    assert_trained_alike(folder, off)
    found = of_suites(folder)
    assert {0, 2} <= found.keys(), "though the first attempt had not taken them"
    result = exports.read_result(folder, 4)
    assert result is not None
    assert result.export != stale
    assert not exports.write_result(folder, exports.SuiteResult(export=stale, values={"qa/exact_match": 1.0}, seconds=0.0))
    assert exports.read_result(folder, 4) == result, "nobody takes what is still said of an export that is gone"


def dying_after(step: int) -> Callable[[], None]:
    made = count(1)

    def die() -> None:
        if next(made) == step:
            raise ConnectionError("the node is gone")

    return die


def test_a_suite_ends_a_run_early_and_one_that_is_killed_ends_where_the_unbroken_one_does(tmp_path: Path) -> None:
    early = {"early_stopping": {"metric": "qa/exact_match", "mode": "max", "patience": 2}}
    asked = {"training": {"max_steps": 12, "global_batch_size": 2, "learning_rate": 2e-3, **early}}
    asked |= {"checkpoint": {"every_steps": 3, "metric": "qa/exact_match", "mode": "max"}}
    ends = []
    for dies_after in (None, 5):
        where = tmp_path / str(dies_after)
        folder, plan = prepared_run(where, changes({"where": "between_steps", "suites": ["qa"]}, **asked))
        if dies_after is not None:
            with pytest.raises(ConnectionError):
                run(plan, check=dying_after(dies_after))
        run(plan, attempt=2)
        result = RunResult.read(folder)
        assert result.findings.stopped is not None
        assert result.findings.stopped.rule == "early_stopping"
        ends.append((result.findings.stopped.step, result.findings.stopped.reason, of_suites(folder), of_training(folder)))
        assert {name for values in of_suites(folder).values() for name in values} == {"qa/token_f1", "qa/exact_match"}
    assert ends[0] == ends[1]
    assert ends[0][0] < 12


VARIANTS: dict[str, dict[str, Any]] = {
    "two ranks": {"cluster": {"workers": 2}},
    "ZeRO-3": {"cluster": {"workers": 2}, "training": {"zero": {"stage": 3}}},
    "ZeRO-2 in full, averaged": {
        "cluster": {"workers": 2},
        "adapter": {"method": "full"},
        "training": {"zero": {"stage": 2}, "averaging": {"kind": "ema", "decay": 0.5}},
    },
}


@pytest.mark.parametrize("variant", variants(list(VARIANTS)[:1], list(VARIANTS)[1:]))
def test_ranks_measure_together_what_the_end_says(variant: str, tmp_path: Path) -> None:
    asked = VARIANTS[variant]
    asked = asked | {"training": {"max_steps": 4, "global_batch_size": 2, "learning_rate": 2e-3, **asked.get("training", {})}}
    folders = []
    for while_training in (None, {"where": "between_steps"}, {"where": "spare"}):
        where = tmp_path / str(while_training and while_training["where"])
        folder, plan = prepared_run(where, changes(while_training, **asked))
        run_on_ranks(train_rank, 2, plan)
        folders.append(folder)
    off, between, beside = folders
    assert_trained_alike(between, off)
    assert_trained_alike(beside, off)
    found = of_suites(between)
    assert found.keys() == {0, 2, 4}
    for suite, comparison in RunResult.read(between).comparisons.items():
        for name, score in comparison.scores.items():
            assert found[4][f"{suite}/{name}"] == score.tuned
    (export,) = exports.exports_in(beside)
    (file,) = Path(export.path(beside)).glob("*model.safetensors")
    assert file.read_bytes() == (Path(beside.model) / file.name).read_bytes()
