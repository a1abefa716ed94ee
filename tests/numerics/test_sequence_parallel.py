"""Workers that share rows = one process with whole rows, however all else is divided."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from raytune.launch.state.result import RunResult
from raytune.plan.run_plan import RunPlan, ZeroStage
from tests.numerics.measured_bytes import measure_all
from tests.numerics.processes import run_on_ranks
from tests.numerics.runs import (
    GLOBAL_BATCH,
    LORA,
    QLORA,
    SAME_SUMS,
    Change,
    Material,
    largest_difference,
    make_material,
    make_plan,
    relative_difference,
    run,
    train,
)
from tests.numerics.saved_models import loss_by_plain_transformers
from tests.numerics.test_plan_bytes import METHODS, WIDE, persisted_activations, planned
from tests.numerics.test_resume_engine import merged
from tests.numerics.test_whole_run import prepared_run, train_rank
from tests.tiny import save_tiny_model
from tests.variants import variants

SLOW = pytest.mark.slow
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"adapter": LORA},
    "qlora": {"adapter": QLORA, "model": {"quantization": {"compute_dtype": "fp32", "quant_storage": "fp32"}}},
    "chunked, recomputed": {"loss": {"chunk_tokens": 16}, "model": {"gradient_checkpointing": True}},
    "penalty": {"optimization": {"l2_sp_strength": 30.0}},
}
"""What is trained, and how."""


def shared(material: Material, *, workers: int = 2, size: int = 2, accumulation: int = 2, **changes: Any) -> RunPlan:
    """A plan whose workers share rows, with the same rows per step."""
    rows = GLOBAL_BATCH // (workers // size) // accumulation
    batch = {"workers": workers, "sequence_parallel": size, "micro_batch_size": rows, "accumulation": accumulation}
    return make_plan(material, workers=workers, batch=batch, **changes)


@pytest.mark.parametrize("stage", variants([3], [0, 1, 2]))
@pytest.mark.parametrize("case", ["full", *(pytest.param(case, marks=SLOW) for case in CASES if case != "full")])
def test_two_workers_that_share_rows_equal_one(case: str, stage: int, material: Material) -> None:
    alone = train(make_plan(material, **CASES[case]))
    first, second = run(shared(material, stage=stage, **CASES[case]))
    assert relative_difference(first.losses, alone.losses) <= SAME_SUMS
    assert first.losses == second.losses
    assert largest_difference(first, alone) <= SAME_SUMS
    assert [numbers.grad_norm for numbers in first.numbers] == pytest.approx(
        [numbers.grad_norm for numbers in alone.numbers], rel=1e-5
    )


@SLOW
@pytest.mark.parametrize("stage", [0, 3])
def test_two_groups_of_two_equal_one(stage: int, material: Material) -> None:
    alone = train(make_plan(material))
    first = run(shared(material, workers=4, stage=stage))[0]
    assert relative_difference(first.losses, alone.losses) <= SAME_SUMS
    assert largest_difference(first, alone) <= SAME_SUMS


@SLOW
@pytest.mark.parametrize("heads", [(4, 1), (4, 4)], ids=["fewer keys than workers", "a key for each query"])
def test_heads_of_keys_are_shared_or_given_to_several(heads: tuple[int, int], material: Material, tmp_path: Path) -> None:
    queries, keys = heads
    model = save_tiny_model(tmp_path, num_attention_heads=queries, num_key_value_heads=keys)
    there = replace(material, model=model)
    alone = train(make_plan(there))
    first, _ = run(shared(there))
    assert relative_difference(first.losses, alone.losses) <= SAME_SUMS
    assert largest_difference(first, alone) <= SAME_SUMS


@SLOW
@pytest.mark.parametrize("stage", [0, 3])
def test_resumed_equals_unbroken(stage: int, material: Material, tmp_path: Path) -> None:
    plan = shared(material, stage=stage)
    unbroken = run(plan)[0]
    run(plan, Change(stop=3, save=tmp_path))
    resumed = run(plan, Change(start=3, load=merged(tmp_path)))[0]
    assert resumed.losses == unbroken.losses[3:]


def test_a_whole_run_records_the_validation_loss_of_what_it_saves(tmp_path: Path) -> None:
    """Evaluation, checkpoints and the final model, with rows that two workers cannot share evenly."""
    changes: dict[str, Any] = {
        "data": {"max_length": 333},
        "adapter": {"method": "full"},
        "training": {"sequence_parallel_size": 2, "max_steps": 3, "zero": {"stage": 2}},
        "cluster": {"workers": 2},
    }
    folder, plan = prepared_run(tmp_path, changes)
    assert (plan.batch.data_parallel, plan.batch.global_batch_size) == (1, 2)
    run_on_ranks(train_rank, 2, plan)
    result = RunResult.read(folder)
    assert loss_by_plain_transformers(plan, result.model_path) == pytest.approx(result.metrics["validation/loss"], rel=2e-5)


@pytest.mark.parametrize("stage", variants([3], [0]))
def test_every_rank_keeps_the_planned_activations_of_its_part_of_a_row(stage: ZeroStage, tmp_path: Path) -> None:
    """Within 2 %, with more workers than heads of keys and values."""
    material = replace(make_material(tmp_path), model=tmp_path / "model")
    config = transformers.LlamaConfig(**WIDE | {"num_key_value_heads": 1})
    transformers.LlamaForCausalLM(config).save_pretrained(material.model)
    cases = []
    for method in ("full", "lora"):
        work, plan = planned(material, stage, METHODS[method])
        batch = plan.batch.model_copy(update={"sequence_parallel": 2})
        cases.append((replace(work, sequence_parallel=2), plan.model_copy(update={"batch": batch})))
    for rank in run_on_ranks(measure_all, 2, [plan for _, plan in cases]):
        for (work, _), measured in zip(cases, rank):
            work = replace(work, num_tokens=measured.num_tokens, num_targets=measured.num_targets)
            assert persisted_activations(work) == pytest.approx(measured.activations, rel=0.02)
