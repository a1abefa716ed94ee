"""Claims about continuing a run with other settings: refused before Ray starts, in the words of the config, old -> new."""

from pathlib import Path

import pytest
import ray

from raytune.config.load import config_from
from raytune.config.reading.keys import keys
from raytune.config.sections.run import RunConfig
from raytune.errors import UserError
from raytune.launch.cluster.host import this_machine
from raytune.launch.data.prepare import prepare
from raytune.launch.run import run
from raytune.launch.state.begun import begun_for
from raytune.launch.state.record import RunRecord, refuse_another_run, refuse_changed_settings, write_plan
from raytune.plan.identity.identity import identity_of, leaves
from raytune.plan.identity.settings import KEY_OF, certain_changes, changes_in_keys, key_of
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import RunFolder

RUN = {
    "name": "changed",
    "model": {"base": "demo"},
    "data": {"train": {"path": "demo:train", "max_rows": 30}, "max_length": 512},
    "training": {"num_train_epochs": 2, "learning_rate": 1e-3},
}


def changed(*overrides: str, storage: Path | str = "runs") -> RunConfig:
    return config_from(RUN, [f"storage={storage}", *overrides])


def planned(config: RunConfig) -> RunPlan:
    return prepare(config, this_machine(config.cluster), map).plan


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunPlan]:
    """A run that was started and has not ended."""
    storage = tmp_path_factory.mktemp("runs")
    config = changed(storage=storage)
    plan = planned(config)
    folder = RunFolder(plan.storage, plan.name)
    write_plan(folder, plan)
    record = RunRecord(
        name=plan.name, state="interrupted", attempts=1, created=0.0, config=config.model_dump(mode="json"), versions={}
    )
    record.write(folder)
    return storage, plan


CHANGES = {
    "training.learning_rate=2e-3": "training.learning_rate: 0.001 -> 0.002",
    "training.seed=7": "training.seed: 42 -> 7",
    "training.num_train_epochs=3": "training.num_train_epochs: 2.0 -> 3.0",
    "training.lr_scheduler_type=linear": "training.lr_scheduler_type: cosine -> linear",
    "training.adam_beta1=0.8": "training.adam_beta1: 0.9 -> 0.8",
    "training.weight_decay=0.5": "training.weight_decay: 0.0 -> 0.5",
    "training.precision=bf16": "training.precision: fp32 -> bf16",
    "adapter.rank=4": "adapter.rank: 16 -> 4",
    "adapter.target_modules=[q_proj]": 'adapter.target_modules: all-linear -> ["q_proj"]',
    "data.targets=[user,assistant]": 'data.targets: assistant -> ["user", "assistant"]',
    "adapter.target_modules=attention": "adapter.target_modules: all-linear -> attention",
    "adapter.method=full": "adapter.method: lora -> full",
    "data.max_length=256": "data.max_length: 512 -> 256",
    "data.targets=all": "data.targets: assistant -> all",
    "data.system=Brief.": "data.system: nothing -> Brief.",
    "data.reasoning=none": "data.reasoning: keep -> none",
    "data.validation_fraction=0.5": "data.validation_fraction: 0.0 -> 0.5",
}


@pytest.mark.parametrize("override", CHANGES)
def test_a_changed_setting_is_refused_before_ray_starts_by_its_key_with_old_and_new_value(override: str, begun):
    storage, _ = begun
    was_up = ray.is_initialized()
    with pytest.raises(UserError) as caught:
        run(changed(override, storage=storage))
    assert f"  {CHANGES[override]}\n" in str(caught.value)
    assert caught.value.exit_code == 2
    assert all(key in keys() for key in caught.value.keys)
    assert ray.is_initialized() == was_up
    assert not (storage / "changed" / "lease").exists()


MAY_CHANGE = [
    "training.logging_steps=5",
    "checkpoint.keep_last=1",
    "cluster.max_failures=0",
    "cluster.collective_timeout=10m",
    "training.learning_rate=1e-3",
    "training.zero.stage=auto",
    "training.gradient_checkpointing=true",
    "training.compile=true",
    "training.loss=chunked",
    "training.per_device_train_batch_size=1",
    "model.attention=sdpa",
]


@pytest.mark.parametrize("override", MAY_CHANGE)
def test_what_changes_no_number_may_change(override: str, begun):
    storage, _ = begun
    config = changed(override, storage=storage)
    folder = RunFolder(str(storage), "changed")
    refuse_changed_settings(folder, config)
    refuse_another_run(folder, prepare(config, this_machine(config.cluster), map, begun=begun_for(config, folder)).plan, config)


def test_every_early_refusal_would_be_one_of_the_plan_too(begun):
    storage, plan = begun
    before = changed(storage=storage)
    for override in ("training.seed=7", "adapter.rank=4", "data.targets=all", "data.max_length=256"):
        now = changed(override, storage=storage)
        (early,) = certain_changes(plan, before, now)
        late = changes_in_keys(plan, planned(now), before, now)
        assert early in late, override


def test_other_rows_under_the_same_name_are_told_as_rows(begun):
    storage, plan = begun
    store = plan.data.train.model_copy(update={"path": "/elsewhere", "num_rows": 7})
    other = plan.model_copy(update={"data": plan.data.model_copy(update={"train": store})})
    with pytest.raises(
        UserError, match=r"data\.train \(the same names, other rows\): \d+ packed rows .* -> 7 packed rows"
    ) as caught:
        refuse_another_run(RunFolder(str(storage), "changed"), other, changed(storage=storage))
    assert "/elsewhere" not in str(caught.value)


def test_every_value_of_an_identity_is_told_by_a_key_that_exists(begun):
    _, plan = begun
    for leaf in leaves(identity_of(plan)):
        assert key_of(leaf) in keys(), leaf
    assert set(KEY_OF.values()) <= set(keys())
