"""Resumed = uninterrupted, bit for bit, in the middle of an epoch and with dropout; and what refuses to be resumed."""

import shutil
from pathlib import Path
from typing import Any, get_args

import pytest

from raytune.config.sections.training import Optimizer
from raytune.errors import CheckpointError, UnfitCheckpointError
from raytune.plan.run_plan import RunPlan
from tests.numerics.runs import (
    LORA,
    SAME_SUMS,
    Change,
    Material,
    Outcome,
    largest_difference,
    make_plan,
    relative_difference,
    run,
    train,
)
from tests.variants import variants

HALF, WHOLE = 2, 3
"""Steps."""


def merged(folder: Path) -> Path:
    """The files of all ranks in one folder, as a committed checkpoint offers them."""
    for number, rank in enumerate(sorted(folder.glob("rank-*"))):
        for file in (path for path in rank.rglob("*") if path.is_file()):
            target = folder / "all" / file.relative_to(rank)
            assert not target.exists(), f"rank {number} wrote {file.name} too"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    return folder / "all"


def outcomes(plan: RunPlan, change: Change) -> list[Any]:
    return [train(plan, change)] if plan.batch.workers == 1 else run(plan, change)


def assert_resumes_exactly(plan: RunPlan, resumed_plan: RunPlan, folder: Path) -> None:
    unbroken = outcomes(plan, Change(stop=WHOLE))
    first = outcomes(plan, Change(stop=HALF, save=folder))
    second = outcomes(resumed_plan, Change(start=HALF, stop=WHOLE, load=merged(folder)))
    for whole, one, two in zip(unbroken, first, second, strict=True):
        assert one.numbers + two.numbers == whole.numbers
    assert largest_difference(second[0], unbroken[0]) == 0


@pytest.mark.parametrize("precision", variants(["bf16"], ["fp32"]))
@pytest.mark.parametrize(("workers", "stage"), variants([(1, 0), (2, 3)], [(2, 0), (2, 1), (2, 2)]))
def test_a_resumed_run_equals_the_unbroken_one(
    workers: int, stage: int, precision: str, material: Material, tmp_path: Path
) -> None:
    dtype = precision if stage else "fp32"

    def plan(model: Path) -> RunPlan:
        described = {"path": str(model), "dtype": dtype, "compute_dtype": precision}
        return make_plan(material, workers=workers, stage=stage, precision=precision, model=described)

    # The resumed run starts from other weights: all of them have to come out of the checkpoint.
    assert_resumes_exactly(plan(material.with_dropout), plan(material.other_with_dropout), tmp_path)


@pytest.mark.parametrize(("workers", "stage"), variants([(1, 0), (2, 3)], [(2, 2)]))
def test_a_resumed_adapter_equals_the_unbroken_one(workers: int, stage: int, material: Material, tmp_path: Path) -> None:
    adapter = LORA | {"dropout": 0.1}
    plan = make_plan(material, workers=workers, stage=stage, adapter=adapter)
    assert_resumes_exactly(plan, plan, tmp_path)
    largest_file = max(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert largest_file < 4 * plan.num_parameters  # no file holds the base


@pytest.mark.parametrize("optimizer", get_args(Optimizer))
def test_every_optimizer_resumes_exactly(optimizer: str, material: Material, tmp_path: Path) -> None:
    plan = make_plan(material)
    plan = plan.model_copy(update={"optimization": plan.optimization.model_copy(update={"optimizer": optimizer})})
    assert_resumes_exactly(plan, plan, tmp_path)


def test_the_loss_scale_of_fp16_is_resumed(material: Material, tmp_path: Path) -> None:
    plan = make_plan(material, precision="fp16", model={"compute_dtype": "fp16"})
    assert_resumes_exactly(plan, plan, tmp_path)


def test_replicated_state_fits_another_number_of_workers(material: Material, tmp_path: Path) -> None:
    train(make_plan(material), Change(stop=HALF, save=tmp_path))
    unbroken: Outcome = train(make_plan(material))
    resumed = run(make_plan(material, workers=2), Change(start=HALF, load=merged(tmp_path)))[0]
    assert relative_difference(resumed.losses, unbroken.losses[HALF:]) <= SAME_SUMS


def test_shards_refuse_another_number_of_workers_and_another_stage(material: Material, tmp_path: Path) -> None:
    run(make_plan(material, workers=2, stage=2), Change(stop=1, save=tmp_path))
    folder = merged(tmp_path)
    saved = "saved by 2 workers at ZeRO stage 2 in fp32"
    for workers, stage, own in ((4, 2, "4 workers at ZeRO stage 2"), (2, 3, "2 workers at ZeRO stage 3"), (2, 0, "ZeRO stage 0")):
        for error in run(make_plan(material, workers=workers, stage=stage), Change(start=1, load=folder)):
            assert isinstance(error, UnfitCheckpointError)  # which no second attempt is made after
            assert saved in str(error)
            assert f"this run has {own}" in str(error) or stage == 0


def test_a_state_of_another_model_is_refused_with_the_first_difference(material: Material, tmp_path: Path) -> None:
    train(make_plan(material, adapter=LORA), Change(stop=1, save=tmp_path))
    with pytest.raises(CheckpointError, match=r"down_proj.lora_A.default.weight \(\[4, 64\] saved, \[8, 64\] in the model\)"):
        train(make_plan(material, adapter=LORA | {"rank": 8}), Change(load=merged(tmp_path)))


def test_an_empty_folder_is_refused(material: Material, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no training state"):
        train(make_plan(material), Change(load=tmp_path))
