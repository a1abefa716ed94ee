"""Planned bytes against what a sharded engine holds, and against what it saves."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from raytune.config.adapter import Adapter
from raytune.plan.adapter_size import trained_size
from raytune.plan.memory import Workload, checkpoint_bytes, memory_parts
from raytune.plan.run_plan import RunPlan, ZeroStage
from raytune.plan.shapes import read_model_shape
from tests.numerics.runs import LORA, Change, Material, make_material, make_plan, run
from tests.tiny import save_tiny_model


def planned(material: Material, stage: ZeroStage, adapter: dict[str, Any]) -> tuple[Workload, RunPlan]:
    """A bf16 run on two workers."""
    shape = read_model_shape(str(material.model))
    section: Adapter = TypeAdapter(Adapter).validate_python(adapter)
    trained = trained_size(section, shape)
    work = Workload(
        shape=shape,
        adapter=section,
        trained=trained,
        engine="zero",
        zero_stage=stage,
        workers=2,
        offload_optimizer="none",
        offload_parameters="none",
        precision="bf16",
        optimizer="adamw",
        attention="varlen",
        has_checkpointing=False,
        accumulation=2,
        num_tokens=1152,
        num_targets=1152,
        chunk_tokens=None,
        is_on_gpu=False,
    )
    plan = make_plan(
        material,
        workers=2,
        stage=stage,
        precision="bf16",
        adapter=adapter,
        model={"path": str(material.model), "dtype": "bf16", "compute_dtype": "bf16"},
        num_parameters=shape.num_parameters,
        num_trainable=trained.num_trainable,
    )
    return work, plan


def test_a_sharded_engine_holds_the_planned_weights_and_optimizer(tmp_path: Path) -> None:
    work, plan = planned(make_material(tmp_path), 3, LORA)
    parts = {part.name: part.num_bytes for part in memory_parts(work)}
    for rank in run(plan, Change(stop=2)):
        # Norms stay whole at stage 3, and Adam counts its steps: under a thousandth here.
        assert parts["weights"] == pytest.approx(rank.held.weights, rel=1e-3)
        assert parts["optimizer"] == pytest.approx(rank.held.optimizer, rel=1e-3)


@pytest.mark.parametrize(("stage", "adapter"), [(2, LORA | {"rank": 64}), (3, {"method": "full"})], ids=["2, lora", "3, full"])
def test_a_sharded_checkpoint_has_the_planned_size(stage: ZeroStage, adapter: dict[str, Any], tmp_path: Path) -> None:
    """Within 2 %: some 30 KiB of names and shapes per file."""
    wide = save_tiny_model(tmp_path / "wide", hidden_size=256, intermediate_size=512)
    work, plan = planned(replace(make_material(tmp_path), model=wide), stage, adapter)
    run(plan, Change(stop=1, save=tmp_path / "saved"))
    saved = sum(file.stat().st_size for file in (tmp_path / "saved").rglob("*") if file.is_file())
    assert checkpoint_bytes(work) == pytest.approx(saved, rel=0.02)
