"""What the launcher settles without a cluster: which nodes count, and what it says about files of another raytune."""

import json
import os
import re
import shutil
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import ray
from click.testing import CliRunner
from rich.console import Console

from raytune.cli import cli
from raytune.config.load import config_from, load_config
from raytune.config.sections.cluster import ClusterSection
from raytune.config.sections.run import RunConfig
from raytune.errors import ClusterError, UserError
from raytune.launch.cluster.cluster import nodes_for_workers
from raytune.launch.run import run
from raytune.launch.state.finished import answer, damage, damage_text, is_finished
from raytune.launch.state.progress import show_result
from raytune.launch.state.record import RunRecord, read_plan, write_plan
from raytune.launch.state.result import RunResult
from raytune.run_folder import RunFolder
from raytune.training.checkpoints.commit import Commit
from raytune.units import GIB
from tests.tiny import tiny_plan

HEAD = {"memory": 1e9}
SMALL = {"CPU": 2.0, "memory": 4e9}
LARGE = {"CPU": 8.0, "memory": 8e9}
WITH_GPUS = {"CPU": 8.0, "GPU": 2.0, "memory": 8e9}
ASKED = config_from({"name": "tiny"})
HELD = [{"node": "a", "weights": rank * GIB, "gradients": 0, "optimizer": GIB, "peak": 3 * GIB} for rank in (1, 2)]


def test_a_head_without_cpus_is_no_node_for_workers() -> None:
    assert nodes_for_workers([HEAD, SMALL, LARGE], ClusterSection()) == [SMALL, LARGE]
    assert nodes_for_workers([HEAD, SMALL, LARGE], ClusterSection(cpus_per_worker=4)) == [LARGE]


def test_beside_gpus_only_nodes_with_gpus_count_unless_training_is_on_cpus() -> None:
    assert nodes_for_workers([HEAD, LARGE, WITH_GPUS], ClusterSection()) == [WITH_GPUS]
    assert nodes_for_workers([HEAD, LARGE, WITH_GPUS], ClusterSection(gpus_per_worker=0)) == [LARGE, WITH_GPUS]
    assert nodes_for_workers([HEAD, {"GPU": 1.0}], ClusterSection(cpus_per_worker=0)) == [{"GPU": 1.0}]


def test_a_cluster_without_room_for_a_worker_is_refused_with_what_its_nodes_have() -> None:
    with pytest.raises(ClusterError, match=r"takes 16 CPUs .* and a GPU.*0 CPUs, 0 GPUs; 8 CPUs, 2 GPUs"):
        nodes_for_workers([HEAD, WITH_GPUS], ClusterSection(cpus_per_worker=16))


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A finished run as far as its files go."""
    folder = RunFolder(str(tmp_path), "tiny")
    write_plan(folder, tiny_plan(storage=str(tmp_path)))
    record = RunRecord(name="tiny", state="finished", attempts=1, created=0.0, config={}, versions={"raytune": "0.0.1"})
    record.write(folder)
    result = {"metrics": {}, "best_step": 4, "held_bytes": HELD, "median_step_s": 0.5, "comparisons": {}}
    Path(folder.result).write_text(json.dumps(result))
    return folder


def change(path: str, **values: object) -> None:
    """Lay values over a JSON file; None removes a key."""
    content = json.loads(Path(path).read_text()) | values
    gone = [key for key, value in values.items() if value is None]
    Path(path).write_text(json.dumps({key: value for key, value in content.items() if key not in gone}))


def test_files_of_this_raytune_are_read(folder: RunFolder) -> None:
    assert RunResult.read(folder).plan == read_plan(folder)


def test_what_was_planned_stands_beside_what_was_measured(folder: RunFolder) -> None:
    memory = [{"name": "weights", "num_bytes": 2 * GIB}, {"name": "activations", "num_bytes": GIB}]
    write_plan(folder, tiny_plan(storage=folder.storage, memory=memory))
    result = RunResult.read(folder)
    assert result.planned_and_measured == [
        ("weights", 2 * GIB, 2 * GIB),
        ("optimizer", None, GIB),
        ("peak", 3 * GIB, 3 * GIB),
        ("step_s", None, 0.5),
    ]
    assert result.to_json()["planned_and_measured"][3] == {"name": "step_s", "planned": None, "measured": 0.5}
    console = Console(file=StringIO(), width=100)
    show_result(result, console)
    shown = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert re.search(r"weights +│ +2 GiB │ +2 GiB", shown)
    assert re.search(r"seconds per step +│ +- │ +0\.5", shown)


@pytest.mark.parametrize(
    ("file", "values", "misfit"),
    [
        ("run", {"attempt": 3}, r"unexpected keyword argument 'attempt'"),
        ("run", {"attempts": None}, r"missing 1 required .*'attempts'"),
        ("plan", {"seed": "x"}, r"seed: Input should be a valid integer"),
        ("plan", {"colour": "blue", "batch": None}, r"batch: Field required; colour: Extra inputs are not permitted"),
        ("result", {"best_step": None}, r"'best_step' is missing"),
    ],
)
def test_a_file_of_another_raytune_is_refused_with_its_name_the_misfit_and_the_way_out(
    folder: RunFolder, file: str, values: dict, misfit: str
) -> None:
    path = getattr(folder, file)
    change(path, **values)
    read = RunRecord.read if file == "run" else RunResult.read
    with pytest.raises(UserError, match=rf"{path} .*{misfit}.*raytune 0\.0\.1 wrote it.*another name") as caught:
        read(folder)
    assert caught.value.exit_code == 2


def test_a_file_that_is_not_json_is_refused_with_its_name(folder: RunFolder) -> None:
    Path(folder.run).write_text("{")
    with pytest.raises(UserError, match=rf"{folder.run} .*it was edited"):
        RunRecord.read(folder)


# --- Finished runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(folder: RunFolder) -> RunConfig:
    """A finished run with its model, and the config that asks for it."""
    config = RunConfig(name="tiny", storage=folder.storage)
    change(folder.run, config=config.model_dump(mode="json"), created=time.time())
    files = {"model.safetensors": "0123456789", "config.json": '{"a": 1}'}
    Path(folder.model).mkdir()
    for name, content in files.items():
        Path(folder.model, name).write_text(content)
    change(folder.result, model_files={name: len(content) for name, content in files.items()})
    return config


def commit_step(folder: RunFolder) -> None:
    """A checkpoint as far as its manifest goes."""
    path = folder.checkpoint(4)
    commit = Commit(
        path=path,
        step=4,
        world_size=1,
        attempt=1,
        parent=None,
        created=0.0,
        metrics={},
        fingerprint={},
        versions={},
        folder="state",
        files=(),
    )
    Path(path).mkdir(parents=True)
    Path(path, "MANIFEST.json").write_bytes(commit.to_manifest())


def test_a_finished_run_is_answered_without_a_cluster_its_data_or_its_base(folder: RunFolder, finished: RunConfig) -> None:
    """No Ray, no file of data and no tokenizer is here to be asked: what the plan names does not exist."""
    result = run(finished)
    assert (result.best_step, result.model_path) == (4, folder.model)
    assert not ray.is_initialized()
    elsewhere = finished.cluster.model_copy(update={"max_failures": 8, "address": "1.2.3.4:6379"})
    assert run(finished.model_copy(update={"cluster": elsewhere})).best_step == 4


@pytest.mark.parametrize(("rows", "is_answered"), [("auto", True), (4, True), (8, False)])
def test_more_workers_ask_for_the_run_that_is_there_while_the_rows_of_a_step_stay(
    folder: RunFolder, finished: RunConfig, rows: Any, is_answered: bool
) -> None:
    assert read_plan(folder).batch.global_batch_size == 4
    training = finished.training.model_copy(update={"global_batch_size": rows})
    cluster = finished.cluster.model_copy(update={"workers": 2})
    assert (answer(finished.model_copy(update={"training": training, "cluster": cluster}), folder) is not None) is is_answered


def test_any_number_of_commands_read_a_finished_run_where_nobody_may_write(folder: RunFolder, finished: RunConfig) -> None:
    before = sorted(Path(folder.path).rglob("*"))
    run(finished)
    assert sorted(Path(folder.path).rglob("*")) == before, "no lease, no event"


def test_what_a_finished_run_does_not_do_any_more_is_said(
    folder: RunFolder, finished: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    later = finished.model_copy(update={"checkpoint": finished.checkpoint.model_copy(update={"keep_last": 7})})
    assert answer(later, folder) is not None
    assert "checkpoint.keep_last (2 -> 7)" in caplog.text


@pytest.mark.parametrize("key", ["seed", "learning_rate", "max_steps", "optimizer"])
def test_a_changed_setting_is_not_answered_by_the_run_before_it(folder: RunFolder, finished: RunConfig, key: str) -> None:
    values = {"seed": 1, "learning_rate": 1.0, "max_steps": 7, "optimizer": "lion"}
    training = finished.training.model_copy(update={key: values[key]})
    assert answer(finished.model_copy(update={"training": training}), folder) is None


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: shutil.rmtree(folder.model), "model.safetensors is missing"),
        (lambda folder: os.truncate(f"{folder.model}/model.safetensors", 5), "model.safetensors has 5 bytes instead of 10"),
        (lambda folder: os.truncate(f"{folder.model}/config.json", 5), "config.json has 5 bytes instead of 8"),
        (lambda folder: os.remove(f"{folder.model}/config.json"), "config.json is missing"),
        (lambda folder: os.truncate(folder.result, 20), "result.json is torn"),
        (lambda folder: os.truncate(folder.result, 0), "result.json is torn"),
        (lambda folder: os.remove(folder.result), "result.json is missing"),
        (lambda folder: os.remove(folder.plan), "plan.json is missing"),
    ],
)
def test_a_damaged_finished_run_is_not_finished(folder: RunFolder, finished: RunConfig, spoil: Any, said: str) -> None:
    commit_step(folder)
    assert is_finished(folder, ASKED)
    spoil(folder)
    assert not is_finished(folder, ASKED)
    assert said in damage_text(folder, list(damage(folder)))
    assert answer(finished, folder) is None
    shutil.rmtree(folder.checkpoints)
    with pytest.raises(UserError, match=rf"{said}.*No checkpoint is left.*another name"):
        answer(finished, folder)


def test_a_model_whose_small_files_were_edited_or_that_got_more_files_is_whole(folder: RunFolder, finished: RunConfig) -> None:
    Path(folder.model, "config.json").write_text('{"a": 1, "b": 2}')
    Path(folder.model, "README.md").write_text("mine")
    assert is_finished(folder, ASKED)


def test_a_result_without_a_list_of_files_is_believed(folder: RunFolder, finished: RunConfig) -> None:
    """Written by a raytune that made none."""
    change(folder.result, model_files=None)
    assert is_finished(folder, ASKED)


def test_train_of_a_finished_run_needs_no_file_that_the_config_names(
    folder: RunFolder, finished: RunConfig, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"name: tiny\nstorage: {folder.storage}\nmodel: {{base: {tmp_path}/gone}}\ndata: {{train: {tmp_path}/gone.jsonl}}"
    )
    refused = CliRunner().invoke(cli, ["train", str(file), "--json"])
    assert refused.exit_code == 2
    assert "is not on this machine" in refused.output
    change(folder.run, config=load_config([file]).model_dump(mode="json"))
    done = CliRunner().invoke(cli, ["train", str(file), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["best_step"] == 4


def test_a_finished_run_whose_data_has_changed_since_is_compared_with_the_data(
    folder: RunFolder, finished: RunConfig, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("old")
    asking = config_from(
        finished.model_dump(mode="json") | {"data": {"train": "demo:train", "validation": str(tmp_path / "*.jsonl")}}
    )
    change(folder.run, config=asking.model_dump(mode="json"), created=time.time() + 0.1)
    assert answer(asking, folder) is not None
    time.sleep(0.2)
    (tmp_path / "new").write_text("new")
    os.utime(tmp_path / "new", (0, 0))  # as `cp -p` and archives leave it
    os.replace(tmp_path / "new", rows)
    assert answer(asking, folder) is None
    rows.unlink()
    assert answer(asking, folder) is not None, "what is gone cannot be compared"
