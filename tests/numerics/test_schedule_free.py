"""Schedule-free AdamW in a run = the package's in plain torch and the formulas of the paper; looked at, resumed, on two ranks."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from schedulefree import AdamWScheduleFree
from torch import Tensor, nn

from raytune.config.sections.training import Optimizer
from raytune.plan.costs.memory import memory_parts
from raytune.plan.run_plan import RunPlan
from raytune.training.engines.engine import set_learning_rate
from raytune.training.engines.optimizer import build_optimizer
from raytune.training.engines.schedule_free import at_average
from raytune.training.steps.loop import StepNumbers
from raytune.training.steps.schedule import learning_rate
from tests.numerics.measured_bytes import measure_update, of_one_process
from tests.numerics.oracles import PROJECTIONS
from tests.numerics.processes import run_on_ranks
from tests.numerics.runs import LORA, QLORA, SAME_SUMS, Change, Material, relative_difference, start, steps_of
from tests.numerics.saved_models import loss_by_plain_transformers
from tests.numerics.strategies import FULL, plain_training, settled, strategy_plan
from tests.numerics.test_averaging import difference, weights_of
from tests.numerics.test_whole_run import finished
from tests.tiny import tiny_plan
from tests.variants import variants

SETTINGS = {"optimizer": "schedule_free_adamw", "schedule": "constant"}


def plan(material: Material, adapter: dict[str, Any] = FULL, **changes: Any) -> RunPlan:
    optimization = SETTINGS | changes.pop("optimization", {})
    return strategy_plan(material, changes.pop("strategy", {}), adapter, optimization=optimization, **changes)


@dataclass(frozen=True, kw_only=True)
class Trained:
    numbers: list[StepNumbers]
    weights: dict[str, Tensor]
    """That gradients would be taken at next."""
    average: dict[str, Tensor]


def train(plan: RunPlan, change: Change | None = None, *, looks: bool = False) -> Trained:
    """Train on this rank.

    Args:
        looks: whether the average is put in place after each step, as an evaluation does, also before the state is saved.
    """
    change = change or Change()
    engine, loss_sum, batches_of = start(plan)
    if change.load:
        engine.load(change.load)
    numbers = []
    for result in steps_of(plan, engine, loss_sum, batches_of, change):
        numbers.append(result.read(engine))
        if looks:
            with engine.averaged():
                pass
    if change.save:
        engine.save(change.save)
    weights = weights_of(engine)
    with engine.averaged():
        average = weights_of(engine)
    assert all(torch.equal(value, weights[name]) for name, value in weights_of(engine).items())
    return Trained(numbers=numbers, weights=weights, average=average)


WAYS: dict[str, tuple[dict[str, Any], Callable[[str], float]]] = {
    "full": (FULL, lambda name: 1.0),
    "lora": (LORA, lambda name: 1.0),
    "lora+": (LORA | {"lora_plus_ratio": 8.0}, lambda name: 8.0 if "lora_B" in name else 1.0),
}
"""The method, and how much faster than others a parameter learns."""


@pytest.mark.parametrize("way", WAYS)
def test_a_run_equals_the_package_in_plain_torch(way: str, material: Material) -> None:
    """With a warm-up, decayed and other weights, a clip that bites, and rates of groups."""
    adapter, rate = WAYS[way]
    asked = plan(material, adapter)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=PROJECTIONS) if adapter is not FULL else None
    made: list[AdamWScheduleFree] = []

    def optimizer_of(groups: list[dict[str, Any]], epsilon: float) -> torch.optim.Optimizer:
        made.append(AdamWScheduleFree(groups, eps=epsilon))
        made[0].train()
        return made[0]

    losses, weights = plain_training(asked, lambda name: True, rate, lora=lora, optimizer_of=optimizer_of)
    ours = train(asked)
    assert relative_difference([one.loss for one in ours.numbers], losses) <= SAME_SUMS
    assert difference(ours.weights, weights) <= SAME_SUMS
    made[0].eval()  # in place
    assert difference(ours.average, weights) <= SAME_SUMS
    assert difference(ours.average, ours.weights) > 1e-5


@pytest.mark.parametrize("beta1", [0.9, 0.5])
@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_updates_are_the_formulas_of_the_paper(beta1: float, warmup_steps: int) -> None:
    """Defazio et al. 2024, algorithm 1, in float64 with both sequences apart: gradients at y = (1 - beta) z + beta x, z by Adam
    without momentum, x the mean of all z, each by the square of the highest rate until it. As in the package, the second moment
    is freed of its start where it is divided by, not in the rate."""
    rates = [0.01 * min(1.0, step / warmup_steps) if warmup_steps else 0.01 for step in range(7)]
    start_at, curvature, target = ([1.0, -2.0, 0.5], [1.0, 3.0, 0.2], [0.0, 1.0, 2.0])
    layer = nn.Linear(3, 1, bias=False)
    layer.weight.data.copy_(torch.tensor([start_at]))
    layer.get_output_embeddings = lambda: None  # pyright: ignore[reportAttributeAccessIssue]
    settings = SETTINGS | {"beta1": beta1, "beta2": 0.95, "weight_decay": 0.1, "epsilon": 1e-8}
    asked = tiny_plan(optimization=settings | {"learning_rate": 0.01, "warmup_steps": warmup_steps, "num_steps": 7}).optimization
    optimizer = build_optimizer(layer, asked, torch.device("cpu"))
    z, x, moment, total = [*start_at], [*start_at], [0.0] * 3, 0.0
    for step, rate in enumerate(rates):
        assert learning_rate(step, asked) == pytest.approx(rate)
        set_learning_rate(optimizer, learning_rate(step, asked))
        layer.weight.grad = torch.tensor([curvature]) * (layer.weight.detach() - torch.tensor([target]))
        optimizer.step()
        counts = max(rates[: step + 1]) ** 2
        total += counts
        share = counts / total if total else 0.0
        for index in range(3):
            y = (1 - beta1) * z[index] + beta1 * x[index]
            gradient = curvature[index] * (y - target[index])
            moment[index] = 0.95 * moment[index] + 0.05 * gradient**2
            divided = gradient / (math.sqrt(moment[index] / (1 - 0.95 ** (step + 1))) + 1e-8)
            z[index] -= rate * (divided + 0.1 * y)
            x[index] = (1 - share) * x[index] + share * z[index]
        trained_at = [(1 - beta1) * a + beta1 * b for a, b in zip(z, x)]
        assert layer.weight[0].tolist() == pytest.approx(trained_at, abs=1e-6)
        with at_average(optimizer):
            assert layer.weight[0].tolist() == pytest.approx(x, abs=1e-6)


def test_a_warm_up_is_that_of_the_package_after_a_step_at_rate_0() -> None:
    """As by its own `warmup_steps`, whose first step has the rate that our second one has."""
    asked = tiny_plan(optimization=SETTINGS | {"learning_rate": 0.01, "warmup_steps": 4, "num_steps": 9}).optimization
    weight = nn.Parameter(torch.ones(2))
    theirs = AdamWScheduleFree([weight], lr=0.01, warmup_steps=4)
    theirs.train()
    for step in range(8):
        weight.grad = torch.ones(2)
        theirs.step()
        assert learning_rate(step + 1, asked) == pytest.approx(theirs.param_groups[0]["scheduled_lr"])
    assert learning_rate(0, asked) == 0


@pytest.mark.parametrize("adapter", [FULL, QLORA], ids=["full", "qlora"])
def test_looking_at_the_average_changes_nothing_and_resumed_equals_unbroken(
    adapter: dict[str, Any], material: Material, tmp_path: Path
) -> None:
    """Bit for bit, resumed right after an evaluation too."""
    asked = plan(material, adapter)
    unbroken, looked_at = train(asked), train(asked, looks=True)
    train(asked, Change(stop=3, save=tmp_path), looks=True)
    resumed = train(asked, Change(start=3, load=tmp_path))
    for other in (looked_at, resumed):
        assert other.numbers == unbroken.numbers[-len(other.numbers) :]
        assert difference(other.weights, unbroken.weights) == 0
        assert difference(other.average, unbroken.average) == 0


def test_two_ranks_equal_one(material: Material) -> None:
    alone = train(plan(material))
    shared = run_on_ranks(train, 2, plan(material, workers=2))[0]
    assert relative_difference([one.loss for one in shared.numbers], [one.loss for one in alone.numbers]) <= SAME_SUMS
    assert difference(shared.average, alone.average) <= SAME_SUMS


def test_an_engine_that_goes_back_has_counts_and_average_of_then(material: Material, tmp_path: Path) -> None:
    asked = plan(material)
    engine, loss_sum, batches_of = start(asked)
    engine.save(tmp_path / "0")
    found: list[dict[str, Tensor]] = []
    for load, first, stop in ((None, 0, 2), (None, 2, 4), (2, 2, 4), (0, 0, 2)):
        if load is not None:
            engine.load(tmp_path / str(load))
        for result in steps_of(asked, engine, loss_sum, batches_of, Change(start=first, stop=stop)):
            result.read(engine)
        if load is None:
            engine.save(tmp_path / str(stop))
        with engine.averaged():
            found.append(weights_of(engine))
    assert difference(found[2], found[1]) == 0
    assert difference(found[3], found[0]) == 0
    assert difference(found[0], found[1]) > 1e-5


@pytest.mark.parametrize("adapter", variants([LORA | {"rank": 64}], [FULL]), ids=["lora", "full"])
def test_a_rank_holds_the_planned_bytes_of_state_and_of_an_update(adapter: dict[str, Any], material: Material) -> None:
    """Within 2 %."""
    setting, shape = settled(material.model, {}, adapter)
    names: tuple[Optimizer, ...] = ("schedule_free_adamw", "adamw")
    planned, measured = [], []
    for name in names:
        parts = memory_parts(of_one_process(shape, setting.trained, optimizer=name))
        planned.append(sum(part.num_bytes for part in parts if part.name in ("optimizer", "update")))
        measured.append(measure_update(plan(material, adapter, optimization={"optimizer": name})).num_bytes)
    assert planned[0] - planned[1] == 4 * setting.trained.num_trainable
    assert measured[0] - measured[1] == pytest.approx(planned[0] - planned[1], rel=0.02)


def test_the_saved_model_is_the_average_that_was_validated(tmp_path: Path) -> None:
    tuned = finished(tmp_path, {"training": {"optimizer": "schedule_free_adamw"}})
    # Two orders of fp32 additions, over a few hundred targets.
    assert loss_by_plain_transformers(tuned.plan, tuned.model_path) == pytest.approx(tuned.metrics["validation/loss"], rel=2e-5)
    assert tuned.plan.optimization.schedule == "constant"
