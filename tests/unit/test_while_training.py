"""Suites that are measured while training goes on: where and when that is planned, what is refused, and the files between a run
and those who measure it."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from raytune.config.load import config_from
from raytune.config.problems import ConfigError
from raytune.errors import PlanError
from raytune.plan.choosing.while_training import room_for_exports
from raytune.plan.describe import plan_table
from raytune.plan.identity.identity import identity_of
from raytune.run_folder import RunFolder
from raytune.training.measuring import exports
from raytune.training.measuring.exports import Export, SuiteResult
from raytune.training.measuring.while_training import Results
from raytune.training.steps.requests import Request
from raytune.training.steps.timetable import Timetable
from tests.unit.plan_cases import CPU, LLAMA_3_8B, data, gpus, planned

SUITES = [
    {"name": "qa", "rows": "demo:test", "metrics": ["token_f1"]},
    {"name": "general", "rows": "demo:validation", "kind": "loss"},
]
SWEEP = {"space": {"training.seed": {"grid": [1, 2]}}, "metric": "general/loss"}


def evaluation(**while_training: Any) -> dict[str, Any]:
    return {"suites": SUITES, "while_training": while_training}


# --- Plan --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "cluster", "where", "why"),
    [
        (
            gpus(4),
            {"workers": 3},
            "spare",
            "3 workers leave 61 CPUs and 1 GPU of what is there, and measuring takes 1 CPU and 1 GPU",
        ),
        (gpus(4), {"workers": 4}, "between_steps", "A lower cluster.workers leaves more"),
        (CPU, {"workers": 1}, "between_steps", "the worker leaves nothing of what is there"),
        (CPU, {"workers": 1, "threads_per_worker": 2}, "spare", "the worker leaves 2 CPUs"),
    ],
)
def test_spare_machines_are_taken_where_workers_leave_some(machine: Any, cluster: Any, where: str, why: str) -> None:
    plan = planned(machine, cluster=cluster, evaluation=evaluation(every_steps=5))
    measured = plan.evaluation.while_training
    assert measured is not None
    assert measured.where == where
    assert plan.measures_beside == (where == "spare")
    assert any(why in reason for reason in plan.reasons), plan.reasons
    assert any(label == "while training" for label, _ in plan_table(plan))
    without = planned(machine, cluster=cluster, evaluation={"suites": SUITES})
    assert identity_of(plan) == identity_of(without), "what is measured is no part of what is trained"
    assert without.evaluation.while_training is None
    assert room_for_exports(without) == 0


def test_exports_of_a_whole_model_have_its_size_and_three_of_them_take_room() -> None:
    plan = planned(gpus(8), LLAMA_3_8B, adapter={"method": "full"}, cluster={"workers": 7}, evaluation=evaluation(where="spare"))
    measured = plan.evaluation.while_training
    assert measured is not None
    assert measured.export_bytes == 2 * LLAMA_3_8B.num_parameters
    assert room_for_exports(plan) == 3 * measured.export_bytes


def test_between_steps_a_gpu_has_to_have_room_for_the_model_beside_the_one_in_training() -> None:
    fits = planned(gpus(1, 40), LLAMA_3_8B, evaluation=evaluation(where="between_steps"))
    assert fits.evaluation.while_training is not None
    with pytest.raises(PlanError, match=r"for a whole model and .* beside the .* of the one in training"):
        planned(gpus(1, 26), LLAMA_3_8B, evaluation=evaluation(where="between_steps"))


def test_what_ranks_checkpoints_is_measured_whenever_one_is_saved() -> None:
    ranked: dict[str, Any] = {"metric": "qa/token_f1", "mode": "max"}
    auto = planned(training={"max_steps": 60}, checkpoint=ranked, evaluation=evaluation(every_steps=7))
    assert (auto.checkpoint.every_steps, auto.checkpoint.keep_best) == (7, 1)
    table = Timetable.of(auto)
    assert [step for step in range(1, 61) if table.measures_after(step)] == [*range(7, 61, 7), 60]
    missed = planned(training={"max_steps": 60}, checkpoint=ranked | {"every_steps": 10}, evaluation=evaluation(every_steps=7))
    table = Timetable.of(missed)
    assert all(table.measures_after(step) for step in range(1, 61) if table.saves_after(step))
    other = planned(
        training={"max_steps": 60},
        facts=data(validation=("held out",)),
        data={"validation": "demo:validation"},
        checkpoint={"every_steps": 10},
        evaluation=evaluation(every_steps=7),
    )
    assert not Timetable.of(other).measures_after(10), "where validation ranks, suites keep to their own steps"
    assert other.checkpoint.metric == "validation/loss"


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"evaluation": {"while_training": {}}}, "there are no suites to measure"),
        ({"evaluation": evaluation(suites=["q"])}, "no suite is called 'q'; these are there: qa, general"),
        ({"evaluation": evaluation(), "checkpoint": {"metric": "qa/token_f1"}}, "the higher is better; set it to max"),
        ({"evaluation": evaluation(), "checkpoint": {"metric": "qa/f1", "mode": "max"}}, "is not measured here"),
        ({"evaluation": evaluation(suites=["qa"]), "checkpoint": {"metric": "general/loss"}}, "is not measured here"),
        ({"evaluation": {"suites": SUITES}, "training": {"early_stopping": {"metric": "general/loss"}}}, "nothing is evaluated"),
        ({"evaluation": evaluation(every_steps=2, every_epochs=1)}, "every_epochs (1) says so in epochs"),
        ({"evaluation": evaluation(where="between_steps", num_gpus=1)}, "nothing is measured beside the workers"),
        (
            {
                "evaluation": evaluation(where="spare"),
                "sweep": {"space": {"training.seed": {"grid": [1, 2]}}, "metric": "general/loss"},
            },
            "trials of a sweep measure between steps",
        ),
    ],
)
def test_what_cannot_be_is_refused(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from({"name": "a", "data": {"train": "demo:train"}, **sections})
    assert said in str(caught.value)


def test_a_suite_whose_name_is_that_of_other_metrics_is_refused() -> None:
    named = {"suites": [{"name": "train", "rows": "demo:test"}], "while_training": {}}
    with pytest.raises(ConfigError, match="a suite is called 'train', as other metrics are"):
        config_from({"name": "a", "data": {"train": "demo:train"}, "evaluation": named})


# --- Files -------------------------------------------------------------------------------------------------------------------


def written(folder: RunFolder, step: int) -> Export:
    export = Export.new(step)
    Path(export.path(folder)).mkdir(parents=True)
    Path(export.path(folder), "model.safetensors").write_bytes(b"weights")
    exports.complete(folder, export)
    return export


def result_of(export: Export) -> SuiteResult:
    return SuiteResult(export=export, values={"qa/token_f1": float("nan"), "general/loss": export.step / 7}, seconds=1.0)


def test_an_export_is_not_there_before_its_last_file_is(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "run")
    draft = Export.new(3)
    Path(draft.path(folder)).mkdir(parents=True)
    assert exports.exports_in(folder) == []
    exports.remove_old(folder)
    assert Path(draft.path(folder)).exists(), "somebody may be writing it"
    exports.forget_after(folder, 10)
    assert not Path(draft.path(folder)).exists()


def test_the_newest_stays_and_the_one_that_is_measured(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "run")
    first, second, third = (written(folder, step) for step in (1, 2, 3))
    exports.take(folder, first)
    exports.remove_old(folder)
    assert exports.exports_in(folder) == [first, third]
    exports.leave(folder)
    exports.remove_old(folder)
    assert exports.exports_in(folder) == [third]
    assert second.step == 2
    exports.remove_all(folder)
    assert not Path(folder.exports).exists()


def test_what_is_said_of_an_export_that_was_taken_back_is_nobodys(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "run")
    early, late = written(folder, 2), written(folder, 4)
    assert exports.write_result(folder, result_of(early))
    assert exports.write_result(folder, result_of(late))
    exports.forget_after(folder, 2)
    assert [result.export for result in exports.results_in(folder)] == [early]
    assert not exports.write_result(folder, result_of(late))
    again = written(folder, 4)
    assert again.path(folder) != late.path(folder), "nobody who holds the old one takes it for the new one"
    results = Results(folder)
    results.begin([], [again])
    exports.write_result(folder, result_of(again))
    results.look()
    assert [result.export for result in results.take()] == [again]


def test_results_are_heard_once_and_a_newer_one_says_that_older_ones_never_come(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "run")
    results, one, two, three = Results(folder), written(folder, 1), written(folder, 2), written(folder, 3)
    for export in (one, two, three):
        results.expect(export)
    results.look()
    assert not results()
    exports.write_result(folder, result_of(two))
    results.look()
    results.look()
    assert set(results()) == {Request.TAKE_RESULTS}
    (found,) = results.take()
    assert found.export == two
    assert found.values["general/loss"] == 2 / 7
    assert not results()
    assert results.awaits == 3
    Path(folder.suite_result(3)).write_text("{")
    results.look()
    assert not results(), "a torn file is none"


def test_training_does_not_wait_for_a_storage_that_keeps_the_thread_that_looks_waiting(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "run")
    results, one, two = Results(folder), written(folder, 1), written(folder, 2)
    results.expect(one)
    slow = Path(folder.suite_result(1))
    slow.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(slow)  # who opens it waits for who writes
    looks = threading.Thread(target=results.look, daemon=True)
    looks.start()
    writer = os.open(slow, os.O_WRONLY)  # returns when it is being read
    trains = threading.Thread(target=lambda: (results.expect(two), results.take()), daemon=True)
    trains.start()
    trains.join(5)
    has_waited = trains.is_alive()
    os.write(writer, json.dumps(result_of(one).to_json()).encode())
    os.close(writer)
    looks.join()
    assert not has_waited
    assert [result.export for result in results.take()] == [one]
    assert results.awaits == 2


def test_a_reader_and_a_writer_of_exports_do_not_trip_over_each_other(tmp_path: Path) -> None:
    folder, ended, read = RunFolder(str(tmp_path), "run"), threading.Event(), []

    def read_for_ever() -> None:
        while not ended.is_set():
            for export in exports.exports_in(folder)[-1:]:
                exports.take(folder, export)
                try:
                    read.append(Path(export.path(folder), "model.safetensors").read_bytes())
                except FileNotFoundError:  # a newer one was there before it was taken
                    assert not exports.is_there(folder, export)
                exports.leave(folder)
                exports.remove_old(folder)

    thread = threading.Thread(target=read_for_ever, daemon=True)
    thread.start()
    try:
        for step in range(60):
            written(folder, step)
            exports.remove_old(folder)
    finally:
        ended.set()
        thread.join(10)
    assert set(read) <= {b"weights"}
    assert len(exports.exports_in(folder)) <= 2
