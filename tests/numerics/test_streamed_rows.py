"""A run whose rows are streamed computes what a run on a store does, on any number of ranks, and goes on exactly where it was."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from raytune.config.load import config_from
from raytune.errors import DataError
from raytune.launch.cluster.host import this_machine
from raytune.launch.data.prepare import prepare
from raytune.launch.state.record import write_plan
from raytune.launch.state.result import RunResult
from raytune.metrics.events import read_events
from raytune.metrics.history import History
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import RunFolder
from raytune.storage import write_bytes
from raytune.training.checkpoints.commit import committed
from raytune.training.run import Worker, train
from tests.numerics.processes import run_on_ranks
from tests.numerics.runs import SAME_SUMS, relative_difference, short_rows
from tests.tiny import tiny_base

NUM_STEPS, NUM_ROWS = 9, 90


class Killed(BaseException):
    """As from outside, in the middle of a run."""


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in short_rows(NUM_ROWS)))
    return path


def planned(chats: Path, storage: Path, window: int | None, workers: int = 1, **changes: Any) -> RunPlan:
    """A plan for six rows per step."""
    values: dict[str, Any] = {
        "name": "streamed",
        "storage": str(storage),
        "model": {"base": str(tiny_base(storage))},
        "data": {"train": str(chats), "max_length": 256} | ({"streaming": {"window": window}} if window else {}),
        "adapter": {"method": "lora", "rank": 4, "alpha": 8, "dropout": 0.1},
        "training": {"max_steps": NUM_STEPS, "global_batch_size": 6, "learning_rate": 2e-3, "logging_steps": 1},
        "checkpoint": {"every_steps": 2},
        "cluster": {"workers": workers},
    }
    values |= {key: values[key] | change for key, change in changes.items()}
    config = config_from(values)
    plan = prepare(config, this_machine(config.cluster), map).plan
    write_plan(RunFolder(plan.storage, plan.name), plan)
    return plan


def run(plan: RunPlan, attempt: int = 1, check: Callable[[], None] = lambda: None) -> tuple[dict[int, float], dict[str, Any]]:
    train(plan, Worker(rank=0, world_size=1, device_index=0, attempt=attempt, report=lambda metrics: None, check=check))
    return left_by(plan)


def left_by(plan: RunPlan) -> tuple[dict[int, float], dict[str, Any]]:
    """Losses and weights."""
    folder = RunFolder(plan.storage, plan.name)
    return dict(History.read(folder.metrics).series("train/loss")), load_file(Path(folder.model) / "adapter_model.safetensors")


def train_rank(plan: RunPlan, attempt: int = 1) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    train(plan, Worker(rank=rank, world_size=world_size, device_index=rank, attempt=attempt, report=lambda metrics: None))


def train_rank_there(plan: RunPlan, of_store: dict[str, str]) -> None:
    """In a process that was forked before there was a store."""
    os.environ.update(of_store)
    train_rank(plan)


def assert_equal(one: tuple[dict[int, float], dict[str, Any]], other: tuple[dict[int, float], dict[str, Any]]) -> None:
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    for name, value in one[1].items():
        assert torch.equal(value, other[1][name]), name


@pytest.fixture(scope="module")
def unbroken(chats: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, float], dict[str, Any]]:
    """In windows of 25 rows, about one and a half steps each."""
    return run(planned(chats, tmp_path_factory.mktemp("unbroken"), window=25))


def test_with_a_window_of_all_rows_a_run_is_that_on_a_store_bit_for_bit(chats: Path, tmp_path: Path) -> None:
    stored, streamed = planned(chats, tmp_path / "stored", None), planned(chats, tmp_path / "streamed", NUM_ROWS)
    assert stored.optimization.num_rows > 1.5 * stored.data.train.num_rows, "two epochs"
    assert_equal(run(streamed), run(stored))
    assert not (tmp_path / "streamed" / "stores").exists(), "nothing is written"
    assert (streamed.data.train.num_rows, streamed.data.train.num_targets) == (
        stored.data.train.num_rows,
        stored.data.train.num_targets,
    )


def run_until_killed(plan: RunPlan, step: int) -> None:
    steps_made = 0

    def kill() -> None:
        nonlocal steps_made
        steps_made += 1
        if steps_made == step:
            raise Killed

    with pytest.raises(Killed):
        run(plan, check=kill)


@pytest.mark.parametrize("step", [*(pytest.param(step, marks=pytest.mark.slow) for step in (1, 2, 3, 5, 6, 7, 8)), 4])
def test_a_run_that_is_killed_anywhere_ends_as_the_unbroken_one(
    step: int, chats: Path, tmp_path: Path, unbroken: tuple[dict[int, float], dict[str, Any]]
) -> None:
    plan = planned(chats, tmp_path, window=25)
    run_until_killed(plan, step)
    assert_equal(run(plan, attempt=2), unbroken)
    events = read_events(RunFolder(plan.storage, plan.name).events)
    saved = [event["step"] for event in events if event["event"] == "checkpoint_saved" and event["attempt"] == 1]
    first = [event["step"] for event in events if event["event"] == "training_started" and event["attempt"] == 2]
    assert first == [max(saved, default=0)]
    newest = committed(RunFolder(plan.storage, plan.name))[-1]
    assert newest.position is not None
    assert newest.position["first_row"] <= NUM_STEPS * 6
    assert len(json.dumps(newest.position)) < 500, "a small value"


@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_ranks_has_the_same_losses(
    workers: int, chats: Path, tmp_path: Path, unbroken: tuple[dict[int, float], dict[str, Any]]
) -> None:
    changes: dict[str, Any] = {"adapter": {"dropout": 0.0}}
    alone, _ = run(planned(chats, tmp_path / "alone", window=25, **changes))
    plan = planned(chats, tmp_path, window=25, workers=workers, **changes)
    run_on_ranks(train_rank, workers, plan)
    losses, _ = left_by(plan)
    assert relative_difference(list(losses.values()), list(alone.values())) <= SAME_SUMS


@pytest.mark.slow
def test_a_run_goes_on_with_other_ranks_where_it_was(chats: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"adapter": {"dropout": 0.0}}
    whole, _ = run(planned(chats, tmp_path / "whole", window=25, **changes))
    plan = planned(chats, tmp_path / "divided", window=25, **changes)
    steps_made = 0

    def kill() -> None:
        nonlocal steps_made
        steps_made += 1
        if steps_made == 5:
            raise Killed

    with pytest.raises(Killed):
        run(plan, check=kill)
    again = planned(chats, tmp_path / "divided", window=25, workers=2, **changes)
    run_on_ranks(train_rank, 2, again, 2)
    assert relative_difference(list(left_by(again)[0].values()), list(whole.values())) <= SAME_SUMS


def two_sources(folder: Path, url: str) -> list[dict[str, Any]]:
    """One in a folder, the other one behind a URL."""
    rows = [json.dumps(row) + "\n" for row in short_rows(NUM_ROWS, seed=1)]
    (folder / "near.jsonl").write_text("".join(rows[:20]))
    write_bytes(f"{url}/far.jsonl", "".join(rows[20:]).encode())
    return [
        {"path": str(folder / "near.jsonl"), "proportion": 1.0, "loss_weight": 2.0},
        {"path": f"{url}/far.jsonl", "proportion": 3.0},
    ]


@pytest.mark.parametrize("step", [*(pytest.param(step, marks=pytest.mark.slow) for step in (1, 4, 8)), 5])
def test_a_run_on_several_sources_that_is_killed_ends_as_the_unbroken_one(step: int, chats: Path, tmp_path: Path) -> None:
    train_on = two_sources(tmp_path, f"memory://{tmp_path.name}")
    whole = run(planned(chats, tmp_path / "whole", window=25, data={"train": train_on}))
    plan = planned(chats, tmp_path / "killed", window=25, data={"train": train_on})
    run_until_killed(plan, step)
    assert_equal(run(plan, attempt=2), whole)
    words = RunResult.read(RunFolder(plan.storage, plan.name)).words[-1]
    shares = [float(share) for share in re.findall(r"([\d.]+)% of them of (?:near|far)", words)]
    assert shares == pytest.approx([25, 75], abs=2)
    newest = committed(RunFolder(plan.storage, plan.name))[-1]
    assert newest.position is not None
    assert [place["taken"] > 0 for place in newest.position["places"]] == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_ranks_has_the_same_losses_on_several_sources(workers: int, chats: Path, tmp_path: Path, s3: str) -> None:
    changes: dict[str, Any] = {"adapter": {"dropout": 0.0}, "data": {"train": two_sources(tmp_path, f"{s3}/{tmp_path.name}")}}
    alone, _ = run(planned(chats, tmp_path / "alone", window=25, **changes))
    plan = planned(chats, tmp_path, window=25, workers=workers, **changes)
    of_store = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    run_on_ranks(train_rank_there, workers, plan, of_store)
    losses, _ = left_by(plan)
    assert relative_difference(list(losses.values()), list(alone.values())) <= SAME_SUMS


def test_a_bad_row_ends_a_run_with_its_line_and_skipped_ones_are_counted_in_its_result(chats: Path, tmp_path: Path) -> None:
    path = tmp_path / "torn.jsonl"
    path.write_text(chats.read_text() + "{torn\n")
    with pytest.raises(DataError, match=rf"torn\.jsonl:{NUM_ROWS + 1}: not JSON"):
        run(planned(path, tmp_path / "stops", window=25))
    plan = planned(path, tmp_path / "skips", window=25, data={"on_bad_row": "skip"})
    run(plan)
    words = RunResult.read(RunFolder(plan.storage, plan.name)).words[-1]
    assert words.startswith(f"Read by step {NUM_STEPS}: ")
    assert ", 2 bad; 180 documents, " in words
    assert words.endswith("; all files 2 times.")
