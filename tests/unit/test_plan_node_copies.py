"""Whether each node has a copy of sharded weights of its own: chosen by time and room, asked for, or refused with the reason."""

from typing import Any

import pytest

from raytune.config.load import ConfigError, config_from
from raytune.errors import PlanError
from raytune.plan.costs.hardware import load_catalogue
from raytune.plan.costs.memory import NODE_COPY
from raytune.plan.describe import plan_text
from raytune.plan.facts.machine import Machine
from raytune.plan.run_plan import RunPlan
from raytune.training.engines.deepspeed_json import deepspeed_config
from tests.unit.plan_cases import LLAMA_3_8B, LLAMA_3_70B, gpus, planned


def plan_on(name: str, num_nodes: int, shape: Any = LLAMA_3_70B, **sections: Any) -> RunPlan:
    instance = load_catalogue().instance(name)
    machine = Machine.rented(instance, load_catalogue().gpu_of(instance), num_nodes)
    cluster = {"instance": name, "nodes": num_nodes} | sections.pop("cluster", {})
    return planned(machine, shape, cluster=cluster, **sections)


def bytes_of(plan: RunPlan, name: str) -> int:
    return sum(part.num_bytes for part in plan.memory if part.name == name)


LORA: dict[str, Any] = {"method": "lora", "rank": 16}


def test_a_frozen_base_is_gathered_inside_nodes_where_their_link_binds() -> None:
    plan = plan_on("p4de.24xlarge", 4, adapter=LORA)
    without = plan_on("p4de.24xlarge", 4, adapter=LORA, training={"zero": {"copy_per_node": False}})
    assert plan.engine.copy_over == 8
    assert without.engine.copy_over == 1
    assert deepspeed_config(plan)["zero_optimization"]["zero_hpz_partition_size"] == 8
    assert "zero_hpz_partition_size" not in deepspeed_config(without)["zero_optimization"]
    assert plan.step_time is not None
    assert without.step_time is not None
    assert plan.step_time.seconds < 0.98 * without.step_time.seconds
    assert bytes_of(plan, NODE_COPY) == pytest.approx(2 * (LLAMA_3_70B.num_parameters + plan.num_trainable) / 8)
    assert any(reason.startswith("training.zero.copy_per_node is true, in the fastest way that fits") for reason in plan.reasons)
    assert "a copy of the weights in each node" in plan_text(plan)


def test_what_saves_no_time_is_left() -> None:
    plan = plan_on("p5.48xlarge", 2, adapter=LORA)
    assert plan.engine.zero_stage == 3
    assert plan.engine.copy_over == 1, "of 16 H100s on EFA, products bind"
    assert "training.zero.copy_per_node is false: it would not fit, or save no time." in plan.reasons


def test_gathers_go_over_both_fabrics_as_they_are_planned() -> None:
    """A frozen base by hand: passes x bytes x 7/8 over NVLink; gradients and the updated adapter between nodes."""
    plan = plan_on("p4de.24xlarge", 2, adapter=LORA, training={"zero": {"copy_per_node": True}, "gradient_checkpointing": True})
    assert plan.step_time is not None
    base, trained = 2 * LLAMA_3_70B.num_parameters, 2 * plan.num_trainable
    passes = 3 * plan.batch.accumulation
    inside = (passes * (base + trained) - trained) * 7 / 8 / (300e9 * 0.8)
    between = (1 + plan.batch.accumulation) * max(trained / 2 / (50e9 * 0.8), trained * 7 / 8 / (300e9 * 0.8))
    assert plan.step_time.communication_s == pytest.approx(inside + between, rel=1e-6)


OFFLOADED = {"training": {"zero": {"offload_parameters": "cpu", "copy_per_node": True}}}


@pytest.mark.parametrize(
    ("name", "nodes", "sections", "why"),
    [
        ("p5.48xlarge", 1, {}, "all 8 workers are on one node"),
        ("p5.48xlarge", 2, {"cluster": {"workers": 12}}, "12 workers do not fill nodes of 8 GPUs"),
        ("g5.xlarge", 4, {}, "each node has one GPU"),
        (
            "p5.48xlarge",
            2,
            {"training": {"zero": {"offload_parameters": "cpu", "copy_per_node": True}}},
            "offload_parameters is cpu",
        ),
    ],
)
def test_a_copy_that_cannot_be_is_refused_if_asked_for(name: str, nodes: int, sections: dict[str, Any], why: str) -> None:
    asked = {"training": {"zero": {"copy_per_node": True}}} | sections
    with pytest.raises(PlanError, match=f"training.zero.copy_per_node is true, but .*{why}.* Set it to auto or false"):
        plan_on(name, nodes, LLAMA_3_8B, adapter=LORA, **asked)
    if not sections.get("training"):
        assert plan_on(name, nodes, LLAMA_3_8B, adapter={"method": "qlora"}, **sections).engine.copy_over == 1


def test_cpus_and_lower_stages_have_none() -> None:
    with pytest.raises(PlanError, match="workers on CPUs have no places of their own on nodes"):
        planned(training={"zero": {"copy_per_node": True}}, cluster={"workers": 2})
    with pytest.raises(ConfigError, match="copy_per_node needs ZeRO stage 3, got stage 2"):
        config_from({"model": {"base": "demo"}, "training": {"zero": {"copy_per_node": True, "stage": 2}}})
    assert planned(gpus(16, num_nodes=2), LLAMA_3_70B, adapter=LORA).engine.copy_over == 1, "how fast nodes talk is not known"
    asked = planned(gpus(16, num_nodes=2), LLAMA_3_8B, adapter=LORA, training={"zero": {"copy_per_node": True}})
    assert (asked.engine.zero_stage, asked.engine.copy_over) == (3, 8)
