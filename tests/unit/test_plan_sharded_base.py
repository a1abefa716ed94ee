"""When the layers of a base are divided among workers, what is refused, and what a plan says of it."""

from dataclasses import replace
from typing import Any

import pytest

from raytune.errors import PlanError, UserError
from raytune.plan.costs.memory import bytes_in
from raytune.plan.describe import plan_text
from raytune.plan.identity.division import Division, Layout
from raytune.plan.run_plan import RunPlan
from raytune.plan.scoring import Weights, scoring_plan
from raytune.run_folder import RunFolder
from raytune.units import GIB
from tests.unit.plan_cases import CPU, LLAMA_3_8B, config, gpus, planned

LORA = {"method": "lora"}
ON_TWO: dict[str, Any] = {"adapter": LORA, "cluster": {"workers": 2}}
ASKED = {"shard_base": True}


def host(gib: int) -> Any:
    return replace(CPU, host_memory_bytes=gib * GIB)


def part(plan: RunPlan, name: str) -> int:
    return sum(one.num_bytes for one in plan.memory if one.name == name)


def test_it_is_chosen_on_cpus_where_the_base_does_not_fit_whole() -> None:
    roomy, tight = (planned(host(gib), LLAMA_3_8B, **ON_TWO) for gib in (160, 64))
    assert (roomy.engine.shards_base, tight.engine.shards_base) == (False, True)
    assert (tight.engine.kind, tight.engine.zero_stage) == ("plain", 0)
    assert part(tight, "weights") < 0.6 * part(roomy, "weights")
    assert any(reason.startswith("training.shard_base is true: the frozen base does not fit whole") for reason in tight.reasons)
    assert "PyTorch, layers of the base divided among the workers" in plan_text(tight)
    assert planned(host(64), LLAMA_3_8B, training={"shard_base": False}, **ON_TWO).engine.zero_stage == 3


def test_on_gpus_it_is_there_for_whoever_asks() -> None:
    sections: dict[str, Any] = {"adapter": LORA, "cluster": {"workers": 8}}
    assert planned(gpus(8, 12), LLAMA_3_8B, **sections).engine.zero_stage == 3
    asked = planned(gpus(8, 12), LLAMA_3_8B, training=ASKED, **sections)
    assert (asked.engine.zero_stage, asked.engine.shards_base) == (0, True)
    assert bytes_in(asked.memory, "device") < 12 * GIB


def test_an_optimizer_that_needs_whole_matrices_goes_with_it() -> None:
    assert planned(training=ASKED | {"optimizer": "muon"}, **ON_TWO).engine.shards_base


def test_one_worker_has_nobody_to_divide_with() -> None:
    alone = planned(adapter=LORA, training=ASKED, cluster={"workers": 1})
    assert not alone.engine.shards_base
    assert any("one worker has nobody to divide the base with" in reason for reason in alone.reasons)


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"adapter": {"method": "full"}}, "adapter.method full trains the base itself"),
        ({"adapter": {"method": "layernorm"}}, r"trained in its layers \(model.layers.0.input_layernorm\)"),
        ({"adapter": LORA | {"modules_to_save": ["up_proj"], "target_modules": "attention"}}, "trained in its layers"),
        ({"adapter": LORA | {"init": "pissa"}}, "adapter.init is pissa, which looks at whole weights"),
        ({"adapter": LORA, "model": {"quantization": "int8"}}, "int8, whose weights cannot be sharded"),
        ({"training": {"compile": True}}, "training.compile is true"),
        ({"model": {"trust_remote_code": True}}, "model.trust_remote_code is true"),
    ],
)
def test_what_cannot_be_done_with_it_is_refused_and_not_chosen(sections: dict[str, Any], why: str) -> None:
    both = {"adapter": LORA, "cluster": {"workers": 2}} | sections
    training = sections.get("training", {})
    with pytest.raises(PlanError, match=f"training.shard_base is true, but .*{why}.*Set training.shard_base to auto"):
        planned(**both | {"training": training | ASKED})
    assert not planned(**both | {"training": training}).engine.shards_base


@pytest.mark.parametrize(
    ("training", "what"),
    [
        ({"zero": {"stage": 3}}, "training.zero.stage is 3"),
        ({"zero": {"offload_optimizer": "cpu"}}, "training.zero.offload_optimizer is cpu"),
        ({"zero": {"overrides": {"zero_optimization": {"round_robin_gradients": True}}}}, "training.zero.overrides"),
    ],
)
def test_deepspeed_beside_it_is_refused(training: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=f"{what}.*but training.shard_base is true.*Set training.shard_base to auto"):
        planned(training=training | ASKED, **ON_TWO)


def test_it_divides_a_run_and_is_none_of_its_identity_nor_of_its_checkpoints() -> None:
    whole, sharded = planned(**ON_TWO), planned(training=ASKED, **ON_TWO)
    assert Division.of(whole).changes_to(Division.of(sharded)) == "shards_base False -> True"
    saved, own = (Layout(zero_stage=one.engine.zero_stage, world_size=2, precision="fp32") for one in (whole, sharded))
    assert own.loads(saved)
    assert whole.checkpoint_bytes == sharded.checkpoint_bytes
    assert config(training={"shard_base": "auto"}).training.shard_base == "auto"


def test_rows_are_scored_under_a_base_that_is_divided_as_in_training() -> None:
    sharded = planned(training=ASKED, **ON_TWO)
    plan = scoring_plan(sharded, CPU, Weights(folder=RunFolder("/runs", "one"), step=None))
    assert plan.engine.shards_base
    assert plan.batch.workers == 2


def test_where_nothing_else_fits_it_is_named_as_a_way_out() -> None:
    training = {"shard_base": False, "zero": {"stage": 0}}
    with pytest.raises(PlanError, match=r"What would fit: .*training\.shard_base=auto"):
        planned(host(64), LLAMA_3_8B, training=training, **ON_TWO)
