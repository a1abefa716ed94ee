"""Runs in one process, from config to saved model: whatever a config asks for, the files have the loss that was recorded."""

import gc
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from raytune.config.load import config_from
from raytune.errors import RaytuneError, TrainingError
from raytune.evaluation.questions import to_json_lines
from raytune.launch.cluster.host import this_machine
from raytune.launch.data.prepare import prepare
from raytune.launch.run import train_plan
from raytune.launch.state.record import write_plan
from raytune.launch.state.result import RunResult
from raytune.metrics.events import EventLog, read_events
from raytune.metrics.history import History
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import RunFolder
from raytune.storage import write_bytes
from raytune.training.checkpoints.commit import committed
from raytune.training.engines.plain_engine import PlainEngine
from raytune.training.measuring import final
from raytune.training.run import Worker, train
from raytune.training.whereabouts import findable, whereabouts
from tests.numerics.processes import run_on_ranks
from tests.numerics.saved_models import loss_by_plain_transformers
from tests.tiny import tiny_base, tiny_rows
from tests.variants import variants

LORA = {"method": "lora", "rank": 4, "alpha": 8}

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": LORA},
    "dora": {"adapter": LORA | {"use_dora": True}},
    "rslora": {"adapter": LORA | {"use_rslora": True, "target_modules": "attention"}},
    "lora+": {"adapter": LORA | {"lora_plus_ratio": 4.0, "target_modules": "mlp"}},
    "pissa": {"adapter": LORA | {"init": "pissa"}},
    "olora": {"adapter": LORA | {"init": "olora"}},
    "eva": {"adapter": LORA | {"init": "eva"}},
    "orthogonal": {"adapter": LORA | {"init": "orthogonal"}},
    "trained embeddings": {"adapter": LORA | {"modules_to_save": ["embed_tokens"]}},
    "rank pattern": {"adapter": LORA | {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}}},
    "full": {"adapter": {"method": "full"}},
    "full with checkpointing": {"adapter": {"method": "full"}, "training": {"gradient_checkpointing": True}},
    "chunked loss": {"adapter": {"method": "full"}, "training": {"loss": "chunked"}},
    "dense mask": {"model": {"attention": "sdpa"}},
    "by length": {"data": {"packing": "token_budget"}},
    "no packing": {"data": {"packing": "none"}},
    "noisy embeddings": {"training": {"neftune_noise_alpha": 5.0}},
    "dropout": {"adapter": LORA | {"dropout": 0.1}},
    "distilled": {"strategy": {"distillation": {"teacher": "base", "weight": 0.3}}},
    "adafactor": {"training": {"optimizer": "adafactor"}},
    "lion": {"training": {"optimizer": "lion", "learning_rate": 3e-4}},
    "8-bit adam": {"training": {"optimizer": "adamw_8bit"}},
    "wsd": {"training": {"lr_scheduler_type": "wsd", "min_lr_ratio": 0.1}},
}
SAVED_AS_OTHERS = (
    "trained embeddings",
    "distilled",
    "rslora",
    "lora+",
    "olora",
    "orthogonal",
    "rank pattern",
    "full with checkpointing",
    "chunked loss",
    "noisy embeddings",
    "dense mask",
    "by length",
    "no packing",
    "adafactor",
    "lion",
    "8-bit adam",
    "wsd",
    "eva",
    "dora",
    "pissa",
)
"""Trained in another way, and saved as a variant that is not among these; what plain PEFT computes of DoRA's and PiSSA's files is
held in unit/test_model_export.py."""


def config(storage: Path, changes: dict[str, Any]) -> dict[str, Any]:
    base: dict[str, Any] = {
        "name": "whole-run",
        "storage": str(storage),
        "model": {"base": str(tiny_base(storage))},
        "data": {
            "train": {"path": "demo:train", "max_rows": 30},
            "validation": {"path": "demo:validation", "max_rows": 12},
            "max_length": 288,
        },
        "adapter": LORA,
        "training": {"max_steps": 6, "global_batch_size": 2, "learning_rate": 2e-3},
        "evaluation": {"every_steps": 3},
        "cluster": {"workers": 1},
    }
    replaced = {key: value if key == "adapter" else base.get(key, {}) | value for key, value in changes.items()}
    return base | replaced


def finished(storage: Path, changes: dict[str, Any]) -> RunResult:
    """Train in this process what a config asks for."""
    folder, plan = prepared_run(storage, changes)
    train(plan, Worker(rank=0, world_size=1, device_index=0, attempt=1, report=lambda metrics: None))
    return RunResult.read(folder)


def prepared_run(storage: Path, changes: dict[str, Any]) -> tuple[RunFolder, RunPlan]:
    resolved = config_from(config(storage, changes))
    prepared = prepare(resolved, this_machine(resolved.cluster), map)
    plan = prepared.plan
    folder = RunFolder(plan.storage, plan.name)
    write_plan(folder, plan)
    write_bytes(folder.questions, to_json_lines(prepared.questions))
    return folder, plan


def train_rank(plan: RunPlan) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    train(plan, Worker(rank=rank, world_size=world_size, device_index=rank, attempt=1, report=lambda metrics: None))


@pytest.mark.parametrize("variant", variants([name for name in VARIANTS if name not in SAVED_AS_OTHERS], SAVED_AS_OTHERS))
def test_the_saved_model_has_the_validation_loss_that_was_recorded(variant: str, tmp_path: Path) -> None:
    result = finished(tmp_path, VARIANTS[variant])
    losses = dict(result.history.series("validation/loss"))
    assert min(losses[3], losses[6]) < losses[0], "nothing was learned"
    # Two orders of fp32 additions, over a few hundred targets.
    assert loss_by_plain_transformers(result.plan, result.model_path) == pytest.approx(
        result.metrics["validation/loss"], rel=2e-5
    )


def test_the_best_checkpoint_is_found_though_saves_and_evaluations_fall_on_different_steps(tmp_path: Path) -> None:
    changes = {
        "training": {"learning_rate": 2e-3, "max_steps": 4},
        "evaluation": {"every_steps": 3},
        "checkpoint": {"every_steps": 2, "mode": "max"},  # the loss falls: the earlier of two is "best"
    }
    result = finished(tmp_path, changes)
    losses = dict(result.history.series("validation/loss"))
    assert losses.keys() == {0, 2, 3, 4}
    assert losses[2] > losses[4]
    assert result.best_step == 2
    assert result.metrics["validation/loss"] == losses[2]


@pytest.mark.parametrize(
    ("adapter", "file", "saved_as"),
    [
        ({"method": "full"}, "model.safetensors", torch.bfloat16),
        (LORA, "adapter_model.safetensors", torch.float32),
    ],
    ids=["full", "lora"],
)
def test_a_run_in_bf16_saves_what_its_products_were_made_of(
    adapter: dict[str, Any], file: str, saved_as: torch.dtype, tmp_path: Path
) -> None:
    result = finished(tmp_path, {"adapter": adapter, "training": {"precision": "bf16"}})
    assert {tensor.dtype for tensor in load_file(Path(result.model_path) / file).values()} == {saved_as}
    # Training rounded every factor of a product to 8 bits, by up to 2^-9 of its value; here products are exact. A logit sums up
    # many of them, whose errors have either sign, and the loss is a mean over hundreds of logits: no more than one such error.
    assert loss_by_plain_transformers(result.plan, result.model_path) == pytest.approx(
        result.metrics["validation/loss"], rel=2**-9
    )


def test_engine_and_teacher_are_gone_when_base_and_tuned_model_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parameters() -> set[int]:
        return {id(thing) for thing in gc.get_objects() if issubclass(type(thing), nn.Parameter)}

    compare_suites, seen = final.compare_suites, []

    def watched(*arguments: Any) -> Any:
        seen.append(parameters())
        return compare_suites(*arguments)

    monkeypatch.setattr(final, "compare_suites", watched)
    gc.collect()
    before = parameters()
    generation = {"rows": "demo:test", "max_rows": 2, "max_new_tokens": 4}
    strategy = {"distillation": {"teacher": "demo"}}
    result = finished(tmp_path, {"evaluation": {"generation": generation}, "strategy": strategy})
    assert [*result.comparisons] == ["generation"]
    assert len(seen) == 1
    assert seen[0] <= before


SHARDED = {
    "adapter": {"method": "full"},
    "cluster": {"workers": 2},
    "training": {"zero": {"stage": 3}, "max_steps": 2, "global_batch_size": 2},
}


def test_sharded_ranks_share_the_questions_and_leave_one_model(tmp_path: Path) -> None:
    generation = {"rows": "demo:test", "max_rows": 3, "max_new_tokens": 4}
    folder, plan = prepared_run(tmp_path, SHARDED | {"evaluation": {"generation": generation}})
    run_on_ranks(train_rank, 2, plan)
    result = RunResult.read(folder)
    assert [sample["row"] for sample in map(json.loads, Path(folder.samples).read_text().splitlines())] == [0, 1, 2]
    assert loss_by_plain_transformers(plan, result.model_path) == pytest.approx(result.metrics["validation/loss"], rel=2e-5)


def test_a_model_that_rank_0_cannot_write_stops_every_rank_with_the_reason(tmp_path: Path) -> None:
    folder, plan = prepared_run(tmp_path, SHARDED)
    Path(folder.model).write_text("a file where the model's folder belongs")
    for error in run_on_ranks(train_rank, 2, plan):
        assert isinstance(error, RaytuneError)
        assert "Rank 0 on" in str(error)
        assert folder.model in str(error)


def test_a_loss_that_is_not_finite_names_file_and_line_of_its_documents(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(60)))
    hopeless = {
        "adapter": {"method": "full"},
        "data": {"train": str(rows)},
        "training": {"learning_rate": 1e38, "warmup_steps": 0, "max_grad_norm": 0},
    }
    message = rf"The loss of step 2 is not finite \(rank 0: nan on rows \d+(, \d+)* \({rows}:\d+, {rows}:\d+"
    with pytest.raises(TrainingError, match=message):
        finished(tmp_path, hopeless)


def test_the_final_model_is_the_best_checkpoint_not_the_last(tmp_path: Path) -> None:
    rising = {
        "training": {"learning_rate": 2e-3, "max_steps": 4},
        "evaluation": {"every_steps": 1},
        "checkpoint": {"mode": "max"},
    }
    result = finished(tmp_path, rising)
    losses = dict(result.history.series("validation/loss"))
    del losses[0]
    assert result.best_step == max(losses, key=losses.__getitem__) != 4
    assert loss_by_plain_transformers(result.plan, result.model_path) == pytest.approx(losses[result.best_step], rel=2e-5)


def test_a_resume_after_the_last_step_has_the_metrics_of_the_whole_run(tmp_path: Path) -> None:
    first = finished(tmp_path, {"training": {"max_steps": 4}, "evaluation": {"every_steps": 2}})
    folder = RunFolder(first.plan.storage, first.plan.name)
    Path(folder.result).unlink()  # as if the process had died between its last checkpoint and its result
    train(first.plan, Worker(rank=0, world_size=1, device_index=0, attempt=2, report=lambda metrics: None))
    again = RunResult.read(folder)
    assert again.metrics == first.metrics
    assert {"train/loss", "validation/loss"} <= again.metrics.keys()
    assert again.best_step == first.best_step


def test_saves_on_request_are_agreed_on_at_log_steps_and_cost_no_collective_between_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathers: dict[int, int] = {}
    own = PlainEngine.gather_objects
    for every in (2, 3, 6):

        def counted(engine: PlainEngine, value: Any, every: int = every) -> list[Any]:
            gathers[every] = gathers.get(every, 0) + 1
            return own(engine, value)

        monkeypatch.setattr(PlainEngine, "gather_objects", counted)
        changes = {"checkpoint": {"every": "1h"}, "training": {"max_steps": 6, "logging_steps": every}}
        finished(tmp_path / str(every), changes)
    assert gathers[2] - gathers[3] == 1, "steps 2, 4, 6, and steps 3, 6"
    assert gathers[3] - gathers[6] == 1


def test_ranks_save_together_where_somebody_asks_for_it_and_train_as_without(tmp_path: Path) -> None:
    changes = {
        "training": {"max_steps": 6, "logging_steps": 2, "global_batch_size": 4},
        "evaluation": {"every_steps": 6},
        "checkpoint": {"every_steps": 6, "keep_last": 6},
        "cluster": {"workers": 2},
    }
    histories = []
    for name in ("asked", "alone"):
        folder, plan = prepared_run(tmp_path / name, changes)
        if name == "asked":
            write_bytes(folder.save_request, b"by somebody")
        run_on_ranks(train_rank, 2, plan)
        histories.append([(point.step, point.values["train/loss"]) for point in History.read(folder.metrics).points[1:]])
        assert [commit.step for commit in committed(folder)] == ([2, 6] if name == "asked" else [6])
    assert histories[0] == histories[1]


def test_ranks_save_together_when_the_time_has_come(tmp_path: Path) -> None:
    changes = {
        "training": {"max_steps": 6, "logging_steps": 2, "global_batch_size": 4},
        "evaluation": {"every_steps": 6},
        "checkpoint": {"every": "1h", "every_steps": 6, "keep_last": 6},
        "cluster": {"workers": 2},
    }
    folder, plan = prepared_run(tmp_path, changes)
    always = plan.model_copy(update={"checkpoint": plan.checkpoint.model_copy(update={"every_s": 0.0})})
    run_on_ranks(train_rank, 2, always)
    assert [commit.step for commit in committed(folder)] == [2, 4, 6]


def test_between_steps_a_rank_says_which_was_the_last(tmp_path: Path) -> None:
    said: list[str] = []
    _, plan = prepared_run(tmp_path, {"training": {"max_steps": 2}, "evaluation": {"at_start": False}})
    worker = Worker(
        rank=0,
        world_size=1,
        device_index=0,
        attempt=1,
        report=lambda metrics: None,
        check=lambda: said.append(str(whereabouts())),
    )
    with findable():
        train(plan, worker)
    assert [words.partition(" (")[0] for words in said] == ["is after step 1", "is after step 2"]


def test_the_events_of_a_run_that_fails_are_all_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cast("dict[str, Any]", EventLog.__init__.__kwdefaults__), "upload_every_s", 3600.0)
    url = f"memory://{tmp_path.name}"
    changes = {"data": {"store": str(tmp_path / "stores")}, "checkpoint": {"every_steps": 3}}
    # A bucket's stand-in for this one process; a config may not name it, whose workers are others.
    resolved = config_from(config(tmp_path, changes)).model_copy(update={"storage": url})
    plan = prepare(resolved, this_machine(resolved.cluster), map).plan
    folder, calls = RunFolder(plan.storage, plan.name), []

    def fail_in_the_end() -> None:
        calls.append(True)
        while len(calls) == 6 and not committed(folder):
            time.sleep(0.05)
        if len(calls) == 6:
            raise TrainingError("the last step went wrong")

    worker = Worker(rank=0, world_size=1, device_index=0, attempt=1, report=lambda metrics: None, check=fail_in_the_end)
    with pytest.raises(TrainingError):
        train(plan, worker)
    deadline = time.monotonic() + 10
    while not read_events(folder.events) and time.monotonic() < deadline:
        time.sleep(0.05)  # the save of step 3 may still be writing its line
    assert [event["event"] for event in read_events(folder.events)] == ["training_started", "checkpoint_saved"]


def test_a_damaged_finished_run_is_exported_again_from_its_checkpoint_and_not_trained_again(tmp_path: Path) -> None:
    resolved = config_from(config(tmp_path, {}))
    prepared = prepare(resolved, this_machine(resolved.cluster), map)
    folder, attempts = RunFolder(prepared.plan.storage, prepared.plan.name), []

    def attempt(plan: RunPlan, number: int, check: Callable[[], None]) -> None:
        attempts.append(number)
        train(plan, Worker(rank=0, world_size=1, device_index=0, attempt=number, report=lambda metrics: None, check=check))

    first = train_plan(prepared.plan, prepared.questions, resolved, attempt=attempt)
    weights = Path(first.model_path, "adapter_model.safetensors")
    content = weights.read_bytes()
    train_plan(prepared.plan, prepared.questions, resolved, attempt=attempt)
    assert attempts == [1], "a finished run is only read"
    truncate, remove = lambda: weights.write_bytes(content[:100]), lambda: shutil.rmtree(folder.model)
    for spoil in (truncate, remove, lambda: os.remove(folder.result)):
        spoil()
        again = train_plan(prepared.plan, prepared.questions, resolved, attempt=attempt)
        assert weights.read_bytes() == content
        assert again.metrics == first.metrics
        assert again.history.points == first.history.points, "no step was made again"
    assert attempts == [1, 2, 3, 4]
