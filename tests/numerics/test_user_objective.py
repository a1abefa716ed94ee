"""A loss of the user's = plain torch with that loss, however rows are cut into chunks and divided, and its bytes are planned."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from raytune.config.sections.strategy import ObjectiveSection
from raytune.errors import UserError
from raytune.plan.run_plan import ObjectivePlan, RunPlan
from raytune.plan.scoring import Weights, scoring_plan
from raytune.plan.strategies.objective import objective_of
from raytune.run_folder import RunFolder
from raytune.training.losses.losses import attach_loss
from raytune.training.losses.objectives import TokenTargets
from raytune.training.losses.user_objective import objective_from, tried
from tests.numerics.runs import LORA, SAME_SUMS, Change, Material, largest_difference, relative_difference, run, start, train
from tests.numerics.strategies import FULL, plain_training, strategy_plan
from tests.numerics.test_losses import assert_same_gradients, build, gradients, inputs_of, make_batch
from tests.numerics.test_target_weights import PROJECTIONS
from tests.peak import held_bytes, peak_bytes
from tests.unit.plan_cases import CPU, config

FOCAL = """
import torch
import torch.nn.functional as F


def focal(logits, target_ids, gamma=2.0):
    cross_entropy = F.cross_entropy(logits, target_ids, reduction="none")
    return (1 - (-cross_entropy).exp()) ** gamma * cross_entropy


def plain(logits, target_ids):
    return -torch.log_softmax(logits, -1).gather(1, target_ids[:, None])[:, 0]
"""
VOCABULARY = 97


def written(folder: Path, text: str, name: str, **options: Any) -> dict[str, Any]:
    """`strategy` with a loss from a file of this text."""
    (folder / "losses.py").write_text(text)
    return {"objective": {"function": f"{folder}/losses.py:{name}", "options": options}}


def planned(folder: Path, text: str, name: str, **options: Any) -> ObjectivePlan:
    plan = objective_of(config(strategy=written(folder, text, name, **options)))
    assert plan is not None
    return plan


def focal_of_document(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """By its formula (Lin et al. 2017): - (1 - p)^gamma log p."""
    logits = model(input_ids=ids, use_cache=False).logits[0, -ids.shape[1] : -1]
    is_target = labels[0, 1:] != -100
    p = logits[is_target].softmax(-1).gather(1, labels[0, 1:][is_target, None])
    return -((1 - p) ** 1.5 * p.log()).sum()


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("adapter", "chunk_tokens"),
    [(FULL, None), (LORA, 7), pytest.param(FULL, 7, marks=SLOW), pytest.param(LORA, None, marks=SLOW)],
)
def test_steps_equal_plain_torch(adapter: dict[str, Any], chunk_tokens: int | None, material: Material, tmp_path: Path) -> None:
    strategy = written(tmp_path, FOCAL, "focal", gamma=1.5)
    plan = strategy_plan(material, strategy, adapter, checkpointing=chunk_tokens is not None, loss={"chunk_tokens": chunk_tokens})
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=PROJECTIONS) if adapter is LORA else None
    losses, weights = plain_training(plan, lambda name: True, lora=lora, loss_of=focal_of_document)
    ours = train(plan)
    assert relative_difference(ours.losses, losses) <= SAME_SUMS
    assert max((ours.weights[name] - weights[name]).abs().max() for name in weights) <= 2 * SAME_SUMS
    assert relative_difference(ours.losses, train(strategy_plan(material, {}, adapter)).losses) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_on_two_ranks_equals_one_plain_process(stage: int, material: Material, tmp_path: Path) -> None:
    strategy = written(tmp_path, FOCAL, "focal", gamma=1.5)
    alone = train(strategy_plan(material, strategy))
    sharded = run(strategy_plan(material, strategy, workers=2, stage=stage, loss={"chunk_tokens": 50}))
    assert sharded[0].numbers == sharded[1].numbers
    assert relative_difference(sharded[0].losses, alone.losses) <= SAME_SUMS
    assert largest_difference(sharded[0], alone) <= 3 * SAME_SUMS


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=SLOW)])
def test_resumed_equals_unbroken_though_the_file_is_gone(stage: int, material: Material, tmp_path: Path) -> None:
    plan = strategy_plan(material, written(tmp_path, FOCAL, "focal"), stage=stage)
    (tmp_path / "losses.py").unlink()
    unbroken = run(plan)[0]
    run(plan, Change(stop=3, save=tmp_path))
    resumed = run(plan, Change(start=3, load=tmp_path / "rank-0"))[0]
    assert resumed.numbers == unbroken.numbers[3:]
    assert largest_difference(resumed, unbroken) == 0


@pytest.mark.parametrize("how", ["fp32", "bf16 weights", "bf16 autocast"])
@pytest.mark.parametrize("chunk_tokens", [None, 7])
def test_cross_entropy_as_a_users_function_is_cross_entropy(how: str, chunk_tokens: int | None, tmp_path: Path) -> None:
    model, theirs = build("saved head"), objective_from(planned(tmp_path, FOCAL, "plain"))
    if how == "bf16 weights":
        model.bfloat16()
    weights = torch.linspace(0.1, 3, 23)
    for batch in (make_batch(23), replace(make_batch(23), target_weights=weights), make_batch(0)):
        found: list[tuple[Tensor, dict[str, Tensor]]] = []
        for objective in (None, theirs):
            with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in how):
                loss = attach_loss(model, chunk_tokens, objective).loss_sum(model, batch, inputs_of(batch))
            found.append((loss.detach(), gradients(model, loss)))
        (expected, expected_gradients), (loss, its_gradients) = found
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        # In 16 bits, a gradient that was rounded from fp32 may fall to either side.
        assert_same_gradients(its_gradients, expected_gradients, atol=1e-7 if how == "fp32" else 2e-3)


CLASS = """
from dataclasses import dataclass
import torch.nn.functional as F


@dataclass(frozen=True)
class Scaled:
    factor: float

    def losses(self, logits, targets):
        return self.factor * F.cross_entropy(logits, targets.ids_C, reduction="none")

    def loss(self, logits, targets):
        weights = 1 if targets.weights_C is None else targets.weights_C
        return (self.losses(logits, targets) * weights).sum()

    def loss_and_gradient(self, logits, targets, *, with_gradient):
        if not with_gradient:
            return self.loss(logits, targets), None
        one_hot = F.one_hot(targets.ids_C, logits.shape[1])
        weights = 1 if targets.weights_C is None else targets.weights_C[:, None]
        return self.loss(logits, targets), self.factor * (logits.softmax(-1) - one_hot) * weights
"""


def test_a_class_is_an_objective_itself_and_its_methods_have_to_agree(tmp_path: Path) -> None:
    assert tried(planned(tmp_path, CLASS, "Scaled", factor=2.0), VOCABULARY) is not None
    wrong = CLASS.replace("self.factor * (logits.softmax", "(logits.softmax")
    with pytest.raises(UserError, match="methods that do not agree"):
        tried(planned(tmp_path, wrong, "Scaled", factor=2.0), VOCABULARY)
    with pytest.raises(UserError, match="cannot be made with"):
        tried(planned(tmp_path, CLASS, "Scaled"), VOCABULARY)


def test_held_out_rows_are_measured_by_cross_entropy(material: Material, tmp_path: Path) -> None:
    def losses_of(plan: RunPlan) -> list[Tensor]:
        engine, loss, batches_of = start(plan)
        measure: Callable[..., Tensor] = loss.cross_entropy  # pyright: ignore[reportFunctionMemberAccess]
        with torch.no_grad():
            return [of(engine.module, batches_of(0)[0]) for of in (loss, measure)]

    plan = strategy_plan(material, written(tmp_path, FOCAL, "focal"))
    minimised, measured = losses_of(plan)
    usual, _ = losses_of(strategy_plan(material, {}))
    assert torch.equal(measured, usual)
    assert minimised < 0.995 * measured
    assert scoring_plan(plan, CPU, Weights(folder=RunFolder("s", "r"), step=None)).optimization.objective is None


@pytest.mark.parametrize("name", ["focal", "plain"])
def test_the_bytes_of_a_loss_are_counted(name: str, tmp_path: Path) -> None:
    plan = tried(planned(tmp_path, FOCAL, name), VOCABULARY)
    assert plan is not None
    assert plan.is_tried
    objective, device = objective_from(plan), torch.device("cpu")
    logits, targets = torch.zeros(9000, VOCABULARY), TokenTargets(torch.zeros(9000, dtype=torch.long))
    objective.loss_and_gradient(logits, targets, with_gradient=True)
    before = held_bytes(device)
    took = peak_bytes(device, lambda: objective.loss_and_gradient(logits, targets, with_gradient=True)) - before
    assert plan.bytes_per_logit * logits.numel() == pytest.approx(took, rel=0.02)


def test_a_section_says_what_a_name_alone_says() -> None:
    assert config(strategy={"objective": "a.py:f"}).strategy.objective == ObjectiveSection(function="a.py:f")
    assert config(strategy={"objective": "cross_entropy"}).strategy.objective is None
