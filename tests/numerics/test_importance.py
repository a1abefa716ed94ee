"""EWC = plain torch: importance is the mean squared gradient of documents, however weights and documents are divided, and the
penalty on the way by it is added as if it stood in the loss."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from raytune.data.batches import lone_batches
from raytune.data.order import rows_at
from raytune.data.store import Store
from raytune.errors import TrainingError
from raytune.plan.memory import memory_parts
from raytune.plan.run_plan import RunPlan, StorePlan, ZeroStage
from raytune.plan.scoring import Weights, scoring_plan
from raytune.run_folder import MANIFEST, RunFolder
from raytune.training.importance import estimated, hold_by_importance, undisturbed
from raytune.training.start import Started, Worker
from tests.numerics.measured_bytes import measure_updates
from tests.numerics.oracles import document_loss, documents
from tests.numerics.processes import run_on_ranks
from tests.numerics.runs import (
    NUM_STEPS,
    SAME_SUMS,
    Change,
    Material,
    Outcome,
    largest_difference,
    outcome,
    relative_difference,
    run,
    start,
    steps_of,
    train,
)
from tests.numerics.strategies import plain_training, strategy_plan
from tests.numerics.test_freezing_bytes import planned, wide  # noqa: F401
from tests.numerics.test_whole_run import finished
from tests.peak import held_bytes, peak_bytes
from tests.tiny import save_tiny_model, store_plan, tiny_store
from tests.unit.plan_cases import CPU

NUM_DOCUMENTS = 7
"""Of 12; a number that neither two nor three ranks share evenly."""
STRENGTH = 20.0
EWC: dict[str, Any] = {"ewc": {"strength": STRENGTH, "data": "demo:validation"}}
ABOVE: dict[str, Any] = {"freeze": {"embeddings": True, "first_layers": 1}}
TRAINED_ABOVE = ("model.layers.1.", "model.norm.")


@pytest.fixture(scope="module")
def general(tmp_path_factory: pytest.TempPathFactory) -> StorePlan:
    folder = tmp_path_factory.mktemp("general")
    return store_plan(tiny_store(folder, "demo:validation", max_rows=12, max_length=288, packing="none"), "general")


@pytest.fixture(scope="module")
def odd(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Material:
    """Weights whose numbers two ranks cannot share evenly, so that shards are filled up, and a tied head."""
    folder = tmp_path_factory.mktemp("odd")
    shape = {"hidden_size": 33, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8}
    return replace(material, model=save_tiny_model(folder, **shape))


def ewc_plan(material: Material, general: StorePlan, strategy: dict[str, Any] = EWC, **changes: Any) -> RunPlan:
    plan = strategy_plan(material, strategy, **changes)
    optimization = plan.optimization.model_copy(update={"ewc_documents": NUM_DOCUMENTS})
    return plan.model_copy(
        update={"data": plan.data.model_copy(update={"ewc": general}), "optimization": optimization, "name": "held"}
    )


def started(plan: RunPlan) -> tuple[Started, Any]:
    engine, loss, batches_of = start(plan)
    worker = Worker(rank=engine.rank, world_size=engine.world_size, device_index=0, attempt=1, report=lambda values: None)
    folder = RunFolder(plan.storage, plan.name)
    return Started(plan=plan, worker=worker, folder=folder, engine=engine, loss=loss), batches_of  # pyright: ignore


def plain_importance(plan: RunPlan, is_trained: Any = lambda name: True) -> dict[str, Tensor]:
    """The mean of squared gradients, a document at a time, by transformers and autograd."""
    model: Any = AutoModelForCausalLM.from_pretrained(plan.model.path, dtype=torch.float32)
    assert plan.data.ewc is not None
    store, count = Store.open(plan.data.ewc.path), plan.optimization.ewc_documents
    trained = {name: parameter for name, parameter in model.named_parameters() if is_trained(name)}
    sums = {name: torch.zeros_like(parameter, dtype=torch.float64) for name, parameter in trained.items()}
    for row in rows_at(torch.arange(count).numpy(), store.num_rows, plan.seed).tolist():
        (batch,) = lone_batches(store, [row], rank=0, world=1)
        ((ids, labels),) = documents(batch)
        gradients = torch.autograd.grad(document_loss(model, ids, labels), list(trained.values()))
        for name, gradient in zip(trained, gradients, strict=True):
            sums[name] += gradient.double().square()
    return {name: (total / count).float() for name, total in sums.items()}


def whole_importance(plan: RunPlan) -> dict[str, Tensor]:
    """What an engine estimates, put together by what puts weights together."""
    began, _ = started(plan)
    shares, engine = estimated(began), began.engine
    if plan.engine.kind == "plain":
        return shares
    from deepspeed.utils import safe_get_full_fp32_param

    own: Any = engine
    for share, master in zip(shares.values(), own._masters().values(), strict=True):
        master.data.copy_(share)
    trained = [(name, parameter) for name, parameter in engine.model.named_parameters() if parameter.requires_grad]
    return {name: safe_get_full_fp32_param(parameter) for name, parameter in trained}  # pyright: ignore[reportReturnType]


def assert_alike(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = SAME_SUMS) -> None:
    """Relative to the largest of each parameter: sums of fp32 numbers, where small ones come of large ones that cancel."""
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert value.max() > 0, name
        assert (ours[name] - value).abs().max() <= tolerance * value.max(), name


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("workers", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_importance_is_the_mean_squared_gradient_of_documents(
    workers: int, stage: int, odd: Material, general: StorePlan
) -> None:
    if workers == 3:
        plan = ewc_plan(odd, general, stage=stage).model_copy(update={"batch": {"workers": 3}})
    else:
        plan = ewc_plan(odd, general, workers=workers, stage=stage)
    expected = plain_importance(plan)
    for shares in run_on_ranks(whole_importance, workers, plan):
        assert_alike(shares, expected)
