"""Claims about what a run is, and how it is divided: a moved one is known again, another division goes on or is refused early."""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from raytune.config.load import config_from
from raytune.config.sections.run import RunConfig
from raytune.errors import PlanError, UserError
from raytune.launch.cluster.host import this_machine
from raytune.launch.data.prepare import Prepared, prepare
from raytune.launch.planning import plan_run
from raytune.launch.run import RunFailedError, run, train_plan
from raytune.launch.state.begun import known_rows, read_begun
from raytune.launch.state.finished import _has_changed, answer
from raytune.launch.state.record import RunRecord, read_plan, refuse_another_run
from raytune.plan.choosing.choose import choose_plan
from raytune.plan.choosing.setting import settle
from raytune.plan.facts.machine import Machine
from raytune.plan.identity.deepspeed_keys import computing_overrides
from raytune.plan.identity.division import Begun, Division, Layout, continued
from raytune.plan.identity.identity import identity_of
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import LAYOUT_FILE, RunFolder
from raytune.training.checkpoints.commit import committed
from raytune.training.engines.layout import fill_with_layout
from raytune.training.run import Worker, train
from raytune.training.worker import recorded
from tests.compat.identity.make import config as stored_config
from tests.unit.plan_cases import LLAMA_3_8B, config, data, gpus

STORED = Path(__file__).parents[1] / "compat" / "identity"


# --- Plans -------------------------------------------------------------------------------------------------------------------


def planned(machine: Machine, begun: Begun | None = None, **sections: Any) -> RunPlan:
    """A plan of Llama 3 8B; of a run that is there, as `launch.data.prepare` makes it."""
    asked = config(name="r", **sections)
    asked = continued(asked, begun) if begun else asked
    setting = settle(asked, LLAMA_3_8B, machine, begun)
    return choose_plan(setting, data(), model_path="/models/base", storage="/runs")


def length(plan: RunPlan) -> tuple[Any, ...]:
    """What the optimizer does, and with how many rows."""
    return plan.batch.global_batch_size, plan.optimization


DIVISIONS: dict[str, dict[str, Any]] = {
    "attention": {"model": {"attention": "sdpa"}},
    "checkpointing": {"training": {"gradient_checkpointing": True}},
    "compile": {"training": {"compile": True, "zero": {"stage": 2}}},
    "liger": {"training": {"liger": True}},
    "offload": {"training": {"zero": {"offload_optimizer": "cpu"}}},
    "stage": {"training": {"zero": {"stage": 3}}},
    "rows of a pass": {"training": {"per_device_train_batch_size": 1}},
    "accumulation": {"training": {"gradient_accumulation_steps": 2}},
    "workers": {"cluster": {"workers": 4}},
    "loss": {"training": {"loss": "full"}},
}


@pytest.mark.parametrize("name", DIVISIONS)
def test_another_division_is_the_same_run(name: str) -> None:
    was = planned(gpus(8))
    plan = planned(gpus(8), Begun(plan=was, layout=None), **DIVISIONS[name])
    assert Division.of(plan) != Division.of(was)
    assert identity_of(plan) == identity_of(was)


@pytest.mark.parametrize("num_gpus", [1, 2, 3, 5, 6, 12, 24, 32])
def test_a_plan_made_again_on_other_nodes_keeps_steps_rows_and_schedule(num_gpus: int) -> None:
    was = planned(gpus(16, num_nodes=2))
    again = planned(gpus(num_gpus), Begun(plan=was, layout=None))
    assert length(again) == length(was)
    assert identity_of(again) == identity_of(was)
    assert again.batch.workers == max(number for number in range(1, num_gpus + 1) if 16 % number == 0)


def test_without_the_run_the_same_nodes_would_make_other_rows_and_steps() -> None:
    assert length(planned(gpus(6))) != length(planned(gpus(16)))


def test_the_precision_of_a_run_stays_on_machines_that_would_choose_another() -> None:
    was = planned(gpus(2, supports_bf16=False))
    assert (was.precision, planned(gpus(2)).precision) == ("fp16", "bf16")
    assert planned(gpus(2), Begun(plan=was, layout=None)).precision == "fp16"


SHARDS = Layout(zero_stage=2, world_size=8, precision="bf16")


def test_shards_go_on_with_the_workers_and_the_stage_that_saved_them() -> None:
    was = planned(gpus(8), training={"zero": {"stage": 2}})
    begun = Begun(plan=was, layout=SHARDS)
    again = planned(gpus(16, num_nodes=2), begun)
    assert (again.batch.workers, again.engine.zero_stage) == (8, 2)
    assert identity_of(again) == identity_of(was)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "workers": ({"cluster": {"workers": 4}}, r"cluster\.workers is 4, but .* saved by 8 workers at .*Set cluster\.workers to 8"),
    "stage": ({"training": {"zero": {"stage": 3}}}, r"zero\.stage is 3, but .*Set training\.zero\.stage to 2 to continue it"),
    "nvme": (
        {"training": {"zero": {"offload_optimizer": "nvme", "nvme_path": "/nvme"}}},
        r"offload_optimizer is nvme, but .*Set training\.zero\.offload_optimizer to none",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_division_that_shards_do_not_fit_is_refused_with_the_way_out(name: str) -> None:
    sections, message = REFUSED[name]
    begun = Begun(plan=planned(gpus(8), training={"zero": {"stage": 2}}), layout=SHARDS)
    with pytest.raises(PlanError, match=message):
        continued(config(name="r", **sections), begun)


def test_too_few_machines_for_shards_are_refused_with_what_the_run_keeps() -> None:
    begun = Begun(plan=planned(gpus(8), training={"zero": {"stage": 2}}), layout=SHARDS)
    with pytest.raises(PlanError, match=r"cluster\.workers is 8, but the cluster has 4 GPUs"):
        planned(gpus(4), begun)


ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "workers": ({"cluster": {"workers": 3}}, r"cluster\.workers 3 makes 3, times a whole number\. Leave cluster\.workers out"),
    "all three": (
        {
            "cluster": {"workers": 2},
            "training": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        },
        r"16 rows per step, but .* makes 8\. Set training\.gradient_accumulation_steps to 4, or leave it out",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_written_division_with_other_rows_per_step_is_refused_with_the_way_out(name: str) -> None:
    sections, message = ROWS[name]
    with pytest.raises(UserError, match=message):
        continued(config(name="r", **sections), Begun(plan=planned(gpus(8)), layout=None))


def test_a_run_that_no_longer_fits_is_advised_nothing_that_would_make_another_run_of_it() -> None:
    begun = Begun(plan=planned(gpus(8, 80), adapter={"method": "full"}), layout=None)
    with pytest.raises(PlanError, match="does not fit") as caught:
        planned(gpus(1, 24, host_gib=8), begun, adapter={"method": "full"})
    assert not any(key in str(caught.value) for key in ("adapter.method=", "data.max_length=", "training.optimizer="))


# --- Run folders -------------------------------------------------------------------------------------------------------------

RUN = {
    "name": "divided",
    "data": {"train": {"path": "demo:train", "max_rows": 40}, "max_length": 256},
    "adapter": {"method": "lora", "rank": 2, "target_modules": ["q_proj"]},
    "training": {"max_steps": 4, "learning_rate": 1e-3, "global_batch_size": 4},
    "checkpoint": {"every_steps": 2},
}


def asked(storage: Path, *overrides: str) -> RunConfig:
    return config_from(RUN, [f"storage={storage}", *overrides])


def started(config: RunConfig, stop_after: int | None = None) -> None:
    """What `run` does, with this process for a worker group; ended like by Ctrl-C after some steps, whose checkpoint is there."""
    folder = RunFolder(config.storage, config.name)

    def attempt(plan: RunPlan, number: int, check: Callable[[], None]) -> None:
        steps = iter(range(1, 1000))

        def stop() -> None:
            if stop_after is not None and next(steps) > stop_after:
                while not committed(folder):
                    time.sleep(0.05)
                raise KeyboardInterrupt

        with recorded(plan, number, 0):
            train(plan, Worker(rank=0, world_size=1, device_index=0, attempt=number, report=lambda metrics: None, check=stop))

    prepared = again(config)
    train_plan(prepared.plan, prepared.questions, config, attempt=attempt)


def again(config: RunConfig) -> Prepared:
    begun = read_begun(RunFolder(config.storage, config.name))
    return prepare(config, this_machine(config.cluster), map, begun=begun)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the folder of a run lies that ended after its first checkpoint."""
    storage = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(KeyboardInterrupt, match="continues from step 2"):
        started(asked(storage), stop_after=2)
    return storage


@pytest.fixture
def elsewhere(interrupted: Path, tmp_path: Path) -> Path:
    """The same run, moved."""
    shutil.copytree(interrupted, tmp_path / "runs")
    return tmp_path / "runs"


def test_a_moved_run_goes_on_under_another_division_as_it_would_have(elsewhere: Path, tmp_path: Path) -> None:
    started(asked(tmp_path / "whole"))
    divided = asked(
        elsewhere, "model.attention=sdpa", "training.gradient_checkpointing=true", "training.per_device_train_batch_size=1"
    )
    started(divided)
    whole, moved = (RunFolder(str(storage), "divided") for storage in (tmp_path / "whole", elsewhere))
    losses, others = (dict(_history(folder)) for folder in (whole, moved))
    assert others == pytest.approx(losses, rel=1e-4)  # other kernels and sums of fewer rows, in fp32
    assert RunRecord.read(moved).attempts == 2  # pyright: ignore[reportOptionalMemberAccess]


def _history(folder: RunFolder) -> list[tuple[int, float]]:
    from raytune.metrics.history import History

    return History.read(folder.metrics).series("train/loss")


def _save_as(storage: Path, layout: Layout) -> None:
    (commit,) = committed(RunFolder(str(storage), "divided"))
    assert (Path(commit.state) / LAYOUT_FILE).exists()
    fill_with_layout(layout, Path(commit.state) / LAYOUT_FILE)


def test_a_checkpoint_that_the_plan_does_not_fit_is_refused_before_a_cluster_is_started(elsewhere: Path) -> None:
    _save_as(elsewhere, Layout(zero_stage=2, world_size=2, precision="fp32"))
    was_up = ray.is_initialized()
    with pytest.raises(PlanError, match=r"cluster\.workers is 1, .*saved by 2 workers at ZeRO stage 2") as caught:
        run(asked(elsewhere, "cluster.workers=1"))
    assert caught.value.exit_code == 2
    assert ray.is_initialized() == was_up
    assert RunRecord.read(RunFolder(str(elsewhere), "divided")).attempts == 1  # pyright: ignore[reportOptionalMemberAccess]
    assert plan_run(asked(elsewhere)).batch.workers == 2
    assert plan_run(asked(elsewhere)).engine.zero_stage == 2


def test_a_checkpoint_that_does_not_fit_after_all_ends_the_run_at_once_and_promises_nothing(elsewhere: Path) -> None:
    plan = again(asked(elsewhere))
    (commit,) = committed(RunFolder(str(elsewhere), "divided"))
    manifest = Path(commit.path) / "MANIFEST.json"
    changed = replace(commit, fingerprint={"seed": 1})
    manifest.write_bytes(changed.to_manifest())
    attempts: list[int] = []

    def attempt(plan: RunPlan, number: int, check: Callable[[], None]) -> Any:
        from raytune.launch.attempts.causes import first_failure

        attempts.append(number)
        try:
            with recorded(plan, number, 0):
                train(plan, Worker(rank=0, world_size=1, device_index=0, attempt=number, report=lambda metrics: None))
        except Exception as error:
            return first_failure(RunFolder(plan.storage, plan.name), number, error)

    with pytest.raises(RunFailedError, match="UnfitCheckpointError") as caught:
        train_plan(plan.plan, plan.questions, asked(elsewhere), attempt=attempt)
    assert attempts == [2]
    assert "same command" not in str(caught.value)


# --- Finished runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """Where the folder of a finished run lies; its rows and its store are gone."""
    shutil.copytree(STORED / "storage" / "finished", tmp_path / "finished")
    return tmp_path


ANSWERED = [
    "",
    "cluster.workers=2",
    "cluster.address=nowhere:6379",
    "cluster.instance=p5.48xlarge",
    "cluster.gpus_per_worker=1",
    "model.attention=eager",
    "training.gradient_checkpointing=true",
    "training.compile=true",
    "training.zero.stage=3",
    "training.per_device_train_batch_size=1",
    "training.precision=fp32",
    "training.weight_decay=0",
    "checkpoint.keep_last=3",
    "data.limits.cut=0.5",
]
NOT_ANSWERED = [
    *("training.seed=1", "training.global_batch_size=4", "training.precision=bf16"),
    *("adapter.rank=4", "data.max_length=32", "training.zero.overrides.zero_optimization.zero_quantized_weights=true"),
]


@pytest.mark.parametrize("override", ANSWERED)
def test_a_finished_run_is_answered_from_its_folder_whatever_division_is_asked_for(override: str, finished: Path) -> None:
    config = config_from(stored_config(finished, Path("/srv/first/rows"), "finished"), [override] if override else [])
    was_up = ray.is_initialized()
    result = run(config)
    assert result.finished_before
    assert ray.is_initialized() == was_up
    assert not (finished / "stores").exists()


@pytest.mark.parametrize("override", NOT_ANSWERED)
def test_what_may_be_another_run_is_not_answered(override: str, finished: Path) -> None:
    config = config_from(stored_config(finished, Path("/srv/first/rows"), "finished"), [override])
    assert answer(config, RunFolder(str(finished), "finished")) is None


def test_other_epochs_that_make_the_same_number_by_chance_are_for_the_plan_to_say(finished: Path) -> None:
    then = config_from(stored_config(finished, Path("/srv/first/rows"), "finished"))
    num_rows = read_plan(RunFolder(str(finished), "finished")).optimization.num_rows
    epochs = then.training.model_copy(update={"max_steps": None, "num_train_epochs": float(num_rows)})
    assert answer(then.model_copy(update={"training": epochs}), RunFolder(str(finished), "finished")) is None


def test_a_run_without_its_plan_goes_on_as_its_checkpoint_was_and_as_nothing_else(elsewhere: Path) -> None:
    folder = RunFolder(str(elsewhere), "divided")
    Path(folder.plan).unlink()
    with pytest.raises(UserError, match=r"training\.learning_rate: 0\.001 -> 0\.002"):
        started(asked(elsewhere, "training.learning_rate=2e-3"))
    assert not Path(folder.plan).exists()
    started(asked(elsewhere))
    assert RunRecord.read(folder).state == "finished"  # pyright: ignore[reportOptionalMemberAccess]


def test_where_the_newest_checkpoint_is_damaged_the_one_before_says_how_it_goes_on(elsewhere: Path, tmp_path: Path) -> None:
    folder = RunFolder(str(elsewhere), "divided")
    (older,) = committed(folder)
    newer = replace(older, path=folder.checkpoint(3), step=3)
    shutil.copytree(older.path, newer.path)
    (Path(newer.path) / "MANIFEST.json").write_bytes(newer.to_manifest())
    (Path(newer.state) / LAYOUT_FILE).unlink()
    begun = read_begun(folder)
    assert begun is not None
    assert begun.layout == Layout(zero_stage=0, world_size=1, precision="fp32")


def test_what_rows_were_known_as_is_kept_over_commands(elsewhere: Path) -> None:
    folder = RunFolder(str(elsewhere), "divided")
    plan = again(asked(elsewhere)).plan
    store = plan.data.train.model_copy(update={"known_as": ("older",)})
    was = plan.model_copy(update={"data": plan.data.model_copy(update={"train": store})})
    assert known_rows(folder, was, plan).data.train.known_as == ("older",)


def test_a_folder_that_was_moved_to_the_name_of_another_is_looked_into(finished: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "a.jsonl").touch()
    os.utime(rows / "a.jsonl", (1, 1))
    config = asked(tmp_path, f"data.train={rows}")
    created = (rows / "a.jsonl").stat().st_ctime
    time.sleep(0.05)
    rows.rename(tmp_path / "other")
    (tmp_path / "other").rename(rows)
    assert _has_changed(config, since=created + 0.02)
    assert not _has_changed(config, since=time.time() + 1)


def test_a_teacher_that_was_written_anew_is_looked_into(tmp_path: Path) -> None:
    weights = tmp_path / "teacher" / "model.safetensors"
    weights.parent.mkdir()
    weights.touch()
    written = weights.stat().st_ctime
    config = asked(tmp_path, f"strategy.distillation.teacher={weights.parent}")
    assert _has_changed(config, since=written - 1)
    assert not _has_changed(asked(tmp_path), since=written - 1)


def test_overrides_that_change_numbers_are_of_the_run_and_those_of_speed_are_not() -> None:
    overrides = {
        "zero_optimization": {"zero_quantized_weights": True, "overlap_comm": False},
        "steps_per_print": 3,
        "fp16": {"loss_scale": 8},
    }
    assert computing_overrides(overrides) == {"zero_optimization.zero_quantized_weights": True, "fp16.loss_scale": 8}


def test_the_words_for_another_run_name_what_is_other(interrupted: Path) -> None:
    folder = RunFolder(str(interrupted), "divided")
    plan = again(asked(interrupted)).plan
    other = plan.model_copy(update={"seed": 7, "batch": plan.batch.model_copy(update={"accumulation": 99})})
    with pytest.raises(UserError, match=r"training\.global_batch_size") as caught:
        refuse_another_run(folder, other, asked(interrupted, "training.seed=7"))
    assert "training.seed: 42 -> 7" in str(caught.value)
