"""Planned bytes against what a sharded engine holds."""

from pathlib import Path

import pytest

from raytune.config.adapter import LoraAdapter
from raytune.plan.adapter_size import trained_size
from raytune.plan.memory import Workload, memory_parts
from raytune.plan.shapes import read_model_shape
from tests.numerics.runs import LORA, Change, make_material, make_plan, run


def test_a_sharded_engine_holds_the_planned_weights_and_optimizer(tmp_path: Path) -> None:
    material = make_material(tmp_path)
    shape = read_model_shape(str(material.model))
    adapter = LoraAdapter.model_validate(LORA)
    trained = trained_size(adapter, shape)
    work = Workload(
        shape=shape,
        adapter=adapter,
        trained=trained,
        engine="zero",
        zero_stage=3,
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
        stage=3,
        precision="bf16",
        adapter=LORA,
        model={"path": str(material.model), "dtype": "bf16", "compute_dtype": "bf16"},
        num_parameters=shape.num_parameters,
        num_trainable=trained.num_trainable,
    )
    planned = {part.name: part.num_bytes for part in memory_parts(work)}
    for rank in run(plan, Change(stop=2)):
        # Norms stay whole at stage 3, and Adam counts its steps: under a thousandth here.
        assert planned["weights"] == pytest.approx(rank.held.weights, rel=1e-3)
        assert planned["optimizer"] == pytest.approx(rank.held.optimizer, rel=1e-3)
