"""Whether Liger's kernels are used is decided from the model, the machines and their packages, and said."""

from dataclasses import replace
from typing import Any

import pytest

from raytune.errors import PlanError
from raytune.plan.choosing.setting import settle
from raytune.plan.costs.hardware import load_catalogue
from raytune.plan.describe import plan_text
from raytune.plan.facts.machine import Machine
from raytune.plan.model.architectures import model_shape
from raytune.plan.run_plan import RunPlan
from tests.unit.plan_cases import CPU, DEMO, LLAMA_3_8B, config, gpus, planned

WITH_LIGER = replace(gpus(1), packages=frozenset({"liger-kernel"}))
GPT_2 = model_shape({"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 100}, "x")


def said(plan: RunPlan) -> list[str]:
    return [reason for reason in plan.reasons if reason.startswith("training.liger")]


def test_they_are_used_where_they_are_installed_and_the_family_was_held_against_transformers() -> None:
    plan = planned(WITH_LIGER, LLAMA_3_8B)
    assert plan.model.liger
    assert said(plan) == ["training.liger is true: fused kernels for RoPE, RMSNorm, SwiGLU of a llama model."]
    assert "Liger's" in plan_text(plan)
    assert not planned(WITH_LIGER, LLAMA_3_8B, training={"liger": False}).model.liger


def test_cpus_have_none_without_a_word() -> None:
    plan = planned(replace(CPU, packages=WITH_LIGER.packages))
    assert not plan.model.liger
    assert not said(plan)


@pytest.mark.parametrize(
    ("machine", "shape", "sections", "why"),
    [
        (replace(gpus(1), packages=frozenset()), LLAMA_3_8B, {}, "the workers' Python does not have it"),
        (gpus(1), LLAMA_3_8B, {}, "whether nodes have it is not known yet"),
        (WITH_LIGER, GPT_2, {}, "no kernels for a gpt2 model"),
        (WITH_LIGER, replace(LLAMA_3_8B, model_type="mixtral"), {}, "for a mixtral model were not held against transformers'"),
        (WITH_LIGER, LLAMA_3_8B, {"training": {"compile": True, "zero": {"stage": 0}}}, "training.compile is true"),
        (
            replace(gpus(2), packages=WITH_LIGER.packages),
            LLAMA_3_8B,
            {"training": {"sequence_parallel_size": 2}, "adapter": {"method": "lora"}},
            "not tried on parts of rows",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_where_they_are_not_used_the_plan_says_why(machine: Machine, shape: Any, sections: dict[str, Any], why: str) -> None:
    plan = planned(machine, shape, **sections)
    assert not plan.model.liger
    (reason,) = said(plan)
    assert reason.startswith("training.liger is false: ")
    assert why in reason


def test_machines_that_are_not_there_yet_are_not_taken_to_have_them() -> None:
    instance = load_catalogue().instance("p5.48xlarge")
    machine = Machine.rented(instance, load_catalogue().gpu_of(instance), 1)
    (reason,) = said(planned(machine, LLAMA_3_8B, cluster={"instance": instance.name}))
    assert "whether nodes have it is not known yet" in reason


def test_asked_for_they_are_refused_where_there_are_none() -> None:
    with pytest.raises(PlanError, match="no kernels for a gpt2 model and would do nothing"):
        settle(config(training={"liger": True}), GPT_2, gpus(1))
    with pytest.raises(PlanError, match="written in Triton"):
        settle(config(training={"liger": True}), DEMO, CPU)
    (reason,) = said(planned(gpus(1), replace(LLAMA_3_8B, model_type="mixtral"), training={"liger": True}))
    assert "were not held against transformers' here" in reason
