"""A range test measures what plain torch measures with the same rates, however the batch is divided."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from raytune.data.batches.batches import step_batches
from raytune.data.store.store import Store
from raytune.plan.rates.rate_range import RateRange
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import RunFolder
from raytune.storage import read_json
from raytune.training.start.start import Worker
from raytune.training.tasks import perform
from tests.numerics.oracles import document_loss, documents
from tests.numerics.processes import run_on_ranks
from tests.numerics.runs import Material, make_material, make_plan, rank_and_world
from tests.variants import variants

TRIED = RateRange(low=1e-5, high=1e-2, num_steps=8)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return make_material(tmp_path_factory.mktemp("material"))


def found(plan: RunPlan) -> list[float]:
    rank, world = rank_and_world()
    worker = Worker(rank=rank, world_size=world, device_index=0, attempt=1, report=lambda metrics: None)
    perform("find_rate", plan, worker, {"range": TRIED.model_dump()})
    return read_json(RunFolder(plan.storage, plan.name).tried_losses)["losses"] if rank == 0 else []


def plan_of(material: Material, folder: Path, **division: Any) -> RunPlan:
    return make_plan(material, storage=str(folder), optimization={"num_steps": TRIED.num_steps, "num_rows": 10**6}, **division)


def plain(plan: RunPlan) -> list[float]:
    """Its own ramp, an optimizer whose rate is set by hand, a document at a time."""
    model: Any = AutoModelForCausalLM.from_pretrained(plan.model.path, dtype=torch.float32).train()
    settings = plan.optimization
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, eps=settings.epsilon)
    store, losses = Store.open(plan.data.train.path), []
    for step in range(8):
        for group in optimizer.param_groups:
            group["lr"] = 10 ** (-5 + 3 * step / 7)
        (batch,) = step_batches(
            store, step=step, rank=0, world=1, micro_batch_size=8, accumulation=1, num_rows_in_run=10**6, seed=plan.seed
        )
        loss = sum(document_loss(model, ids, labels) for ids, labels in documents(batch)) / batch.target_ids.numel()
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_one_worker_measures_what_plain_torch_does_and_passes_the_rows_again(own: Material, tmp_path: Path) -> None:
    plan = plan_of(own, tmp_path)
    assert TRIED.num_steps * plan.batch.global_batch_size > plan.data.train.num_rows
    # fp32 sums of losses near 5 in another order: 1e-6 of the loss.
    assert found(plan) == pytest.approx(plain(plan), rel=1e-6)


@pytest.mark.parametrize("stage", variants([3], [0, 1, 2]))
def test_two_workers_measure_what_one_does(own: Material, tmp_path: Path, stage: int) -> None:
    alone = found(plan_of(own, tmp_path / "alone"))
    shared = run_on_ranks(found, 2, plan_of(own, tmp_path / "shared", workers=2, stage=stage))[0]
    assert shared == pytest.approx(alone, rel=1e-6)
