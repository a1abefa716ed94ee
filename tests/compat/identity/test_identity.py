"""Run folders that commit 02fb5b9 wrote (`make.py`) are known again on another machine, and go on as they would have there."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from raytune.config.sections.run import RunConfig
from raytune.errors import UserError
from raytune.launch.cluster.host import this_machine
from raytune.launch.data.prepare import prepare
from raytune.launch.run import train_plan
from raytune.launch.state.begun import read_begun
from raytune.launch.state.finished import answer
from raytune.launch.state.record import RunRecord
from raytune.launch.state.result import RunResult
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import RunFolder
from raytune.training.run import Worker, train
from tests.compat.identity.make import config

HERE = Path(__file__).parent


@pytest.fixture
def moved(tmp_path: Path) -> Path:
    """The stored folders on another machine: elsewhere, rows and all."""
    shutil.copytree(HERE / "storage", tmp_path / "runs")
    shutil.copytree(HERE / "rows", tmp_path / "rows")
    return tmp_path


def asked(place: Path, name: str) -> RunConfig:
    return config(place / "runs", place / "rows", name)


def continued_here(asked: RunConfig) -> tuple[RunResult, RunPlan]:
    """What `launch.run.run` does, with this process for a worker group."""

    def attempt(plan: RunPlan, number: int, check: Callable[[], None]) -> None:
        train(plan, Worker(rank=0, world_size=1, device_index=0, attempt=number, report=lambda metrics: None))

    begun = read_begun(RunFolder(asked.storage, asked.name))
    prepared = prepare(asked, this_machine(asked.cluster), map, begun=begun)
    return train_plan(prepared.plan, prepared.questions, asked, attempt=attempt), prepared.plan


def numbers(path: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    measured = ("train/loss", "validation/loss")
    return {line["step"]: {name: line[name] for name in measured if name in line} for line in lines if "step" in line}


def test_an_unfinished_run_goes_on_elsewhere_to_the_weights_of_the_unbroken_one(moved: Path) -> None:
    folder = RunFolder(str(moved / "runs"), "unfinished")
    result, plan = continued_here(asked(moved, "unfinished"))
    assert RunRecord.read(folder).state == "finished"  # pyright: ignore[reportOptionalMemberAccess]
    assert [point.attempt for point in result.history.points if point.step in (2, 4)] == [1, 2]
    whole = numbers(HERE / "whole.metrics.jsonl")
    for step, values in numbers(Path(folder.metrics)).items():
        # Steps in fp32 on another processor or with newer libraries, which add in another order: some hundred times 1.2e-7.
        assert values == pytest.approx(whole[step], rel=1e-5), step
    expected, found = load_file(HERE / "whole.safetensors"), load_file(f"{folder.model}/adapter_model.safetensors")
    assert expected.keys() == found.keys()
    assert all(found[name] == pytest.approx(expected[name], abs=1e-5) for name in expected)
    assert plan.batch.global_batch_size == 2


def renamed(place: Path) -> RunConfig:
    """The unfinished run, asked for with files of other names."""
    for side in ("train", "validation"):
        (place / "rows" / f"{side}.jsonl").rename(place / "rows" / f"other-{side}.jsonl")
    config = asked(place, "unfinished")
    files = {
        side: [
            source.model_copy(update={"path": str(place / "rows" / f"other-{side}.jsonl")})
            for source in getattr(config.data, side)
        ]
        for side in ("train", "validation")
    }
    return config.model_copy(update={"data": config.data.model_copy(update=files)})


def test_an_unfinished_run_goes_on_with_files_of_other_names_whose_rows_are_those_of_its_stores(moved: Path) -> None:
    folder = RunFolder(str(moved / "runs"), "unfinished")
    result, _ = continued_here(renamed(moved))
    assert result.plan.data.train.known_as
    assert [store.name for store in result.plan.data.validation] == ["validation"], "under the name of its first attempt"
    assert [point.attempt for point in result.history.points if point.step in (2, 4)] == [1, 2]
    assert RunRecord.read(folder).state == "finished"  # pyright: ignore[reportOptionalMemberAccess]


def test_without_its_stores_nothing_says_that_files_of_other_names_hold_the_same_rows(moved: Path) -> None:
    shutil.rmtree(moved / "runs" / "stores")
    with pytest.raises(UserError, match="was started with other settings") as caught:
        continued_here(renamed(moved))
    assert set(caught.value.keys) == {"data.train", "data.validation"}


def test_other_rows_are_another_run(moved: Path) -> None:
    with (moved / "rows" / "train.jsonl").open("a") as file:
        file.write('{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}\n')
    with pytest.raises(UserError, match="was started with other settings") as caught:
        continued_here(asked(moved, "unfinished"))
    assert "data.train" in caught.value.keys


def test_a_finished_run_is_answered_from_its_folder_alone(moved: Path) -> None:
    shutil.rmtree(moved / "rows")
    shutil.rmtree(moved / "runs" / "stores")
    config = asked(Path("/srv/first"), "finished").model_copy(update={"storage": str(moved / "runs")})
    result = answer(config, RunFolder(config.storage, config.name))
    assert result is not None
    assert result.best_step == 2
