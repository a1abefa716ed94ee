"""What `training.optimizer: schedule_free_adamw` is planned as, what it costs, and what is refused beside it."""

from pathlib import Path
from typing import Any

import pytest

from raytune.config.load import config_from, load_with_places
from raytune.config.words.places import errors_at
from raytune.errors import PlanError, UserError
from raytune.plan.choosing.setting import settle
from raytune.plan.describe import plan_table
from raytune.plan.identity.identity import differences, identity_of
from raytune.plan.run_plan import RunPlan
from tests.unit.plan_cases import CPU, DEMO, data, gpus, planned

NAME = "schedule_free_adamw"


def plan(**training: Any) -> RunPlan:
    return planned(facts=data(validation=("validation",)), training={"max_steps": 100, "optimizer": NAME} | training)


def test_the_rate_is_constant_after_the_warm_up_and_said_to_be() -> None:
    asked = plan(warmup_steps=7)
    assert (asked.optimization.schedule, asked.optimization.warmup_steps) == ("constant", 7)
    assert f"training.lr_scheduler_type is constant: {NAME} has no other." in asked.reasons
    assert "(constant, " in dict(plan_table(asked))["optimizer"]
    assert any("The model of the run is the average" in note for note in asked.notes)
    written = plan(warmup_steps=7, lr_scheduler_type="constant")
    assert written.optimization == asked.optimization
    assert not any("lr_scheduler_type" in reason for reason in written.reasons)


def test_without_it_a_schedule_that_nobody_writes_is_a_cosine_as_if_written() -> None:
    left, written = (planned(training={"max_steps": 100} | more) for more in ({}, {"lr_scheduler_type": "cosine"}))
    assert left == written
    assert left.optimization.schedule == "cosine"


def test_it_is_another_run_than_adamw_at_a_constant_rate() -> None:
    adamw = plan(optimizer="adamw", lr_scheduler_type="constant")
    assert differences(identity_of(adamw), identity_of(plan()))


def test_it_holds_as_much_as_adamw_and_a_tensor_of_what_is_trained_in_the_update() -> None:
    sections = {"adapter": {"method": "full"}}
    ours, adamw = (planned(gpus(2), training={"zero": {"stage": 0}, "optimizer": name}, **sections) for name in (NAME, "adamw"))
    parts = [{part.name: part for part in each.memory} for each in (ours, adamw)]
    assert parts[0]["optimizer"].num_bytes == parts[1]["optimizer"].num_bytes == 8 * ours.num_trainable
    assert parts[0]["update"].num_bytes == 4 * ours.num_trainable
    assert parts[0]["update"].moments == ("update",)
    assert ours.checkpoint_bytes == adamw.checkpoint_bytes


@pytest.mark.parametrize(
    "zero", [{"stage": 1}, {"stage": 3}, {"offload_optimizer": "cpu"}, {"overrides": {"steps_per_print": 1}}]
)
def test_deepspeed_is_refused_with_the_optimizer_that_goes_with_it(zero: dict[str, Any]) -> None:
    with pytest.raises(
        PlanError, match=r"masters do not follow, which allows at most stage 0\. Set training\.optimizer to adamw"
    ):
        planned(gpus(2), training={"optimizer": NAME, "zero": zero})


AT_ITS_PLACE = {
    "a schedule": ("training: {optimizer: schedule_free_adamw, lr_scheduler_type: linear}", "lr_scheduler_type", "to constant"),
    "another average": ("training: {optimizer: schedule_free_adamw, averaging: {}}", "training.averaging", "averaging out"),
    "no way between weights": ("training: {optimizer: schedule_free_adamw, adam_beta1: 0}", "adam_beta1", "to 0.9"),
    "what begins later": (
        "training: {optimizer: schedule_free_adamw}\nadapter: {method: full}\n"
        "strategy: {unfreeze: [{last_layers: 1}, {from_fraction: 0.5, last_layers: all}]}",
        "training.optimizer",
        "leave strategy.unfreeze out",
    ),
    "ranks that are pruned": (
        "training: {optimizer: schedule_free_adamw}\nadapter: {method: adalora}",
        "training.optimizer",
        "adapter.method to lora",
    ),
}


@pytest.mark.parametrize("case", AT_ITS_PLACE)
def test_what_does_not_go_with_it_is_refused_at_its_place(case: str, tmp_path: Path) -> None:
    text, key, said = AT_ITS_PLACE[case]
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{base: demo}}\ndata: {{train: demo:train}}\n{text}\n")
    asked, places = load_with_places([path])
    with pytest.raises(UserError) as caught, errors_at(asked, places):
        settle(asked, DEMO, CPU)
    assert said in str(caught.value)
    assert key in str(caught.value).partition("\n")[0]


def test_an_end_of_the_schedule_that_nothing_reads_is_refused() -> None:
    training = {"optimizer": NAME, "min_lr_ratio": 0.1}
    with pytest.raises(UserError, match=f"training.optimizer {NAME} does not read it"):
        config_from({"model": {"base": "demo"}, "data": {"train": "demo:train"}, "training": training})
