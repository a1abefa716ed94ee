"""L2-SP = plain torch with the penalty added to the loss, however the weights are divided, and its bytes are planned."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from raytune.plan.costs.memory import memory_parts
from raytune.plan.costs.workload import Workload
from raytune.plan.run_plan import RunPlan, ZeroStage
from raytune.plan.scoring import Weights, scoring_plan
from raytune.run_folder import RunFolder
from raytune.training.steps.loop import StepNumbers
from raytune.training.steps.phases import Phases
from tests.numerics.measured_bytes import measure_updates
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
from tests.tiny import save_tiny_model
from tests.unit.plan_cases import CPU
from tests.variants import variants

STRENGTH = 30.0
"""The penalty's gradient is then about as large as the loss's, once weights have moved for some steps."""
L2_SP: dict[str, Any] = {"l2_sp": {"strength": STRENGTH}}
ABOVE: dict[str, Any] = {"freeze": {"embeddings": True, "first_layers": 1}}
TRAINED_ABOVE = ("model.layers.1.", "model.norm.")
UNFREEZE: dict[str, Any] = {"unfreeze": [{"last_layers": 0}, {"from_step": 2, "last_layers": "all"}]}


@pytest.fixture(scope="module")
def odd(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Material:
    """Weights whose numbers two ranks cannot share evenly, so that shards are filled up."""
    folder = tmp_path_factory.mktemp("odd")
    return replace(
        material,
        model=save_tiny_model(folder, tied=False, hidden_size=33, num_attention_heads=3, num_key_value_heads=1, head_dim=8),
    )


class PlainPenalty:
    """strength / 2 * sum (w - w0)^2, of which autograd makes the gradient."""

    def __init__(self, model: Path, strength: float) -> None:
        base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self._base = {name: parameter.detach() for name, parameter in base.named_parameters()}
        self._strength = strength
        self.values: list[float] = []

    def __call__(self, trained: dict[str, nn.Parameter]) -> Tensor:
        squares = [(parameter - self._base[name]).square().sum() for name, parameter in trained.items()]
        value = self._strength / 2 * torch.stack(squares).sum()
        self.values.append(value.item())
        return value


@pytest.mark.parametrize("freeze", [{}, ABOVE], ids=["all", "above frozen layers"])
def test_steps_equal_plain_torch_with_the_penalty_in_the_loss(freeze: dict[str, Any], material: Material) -> None:
    plan = strategy_plan(material, L2_SP | freeze)
    penalty = PlainPenalty(material.model, STRENGTH)
    losses, weights = plain_training(plan, lambda name: not freeze or name.startswith(TRAINED_ABOVE), penalty=penalty)
    ours = train(plan)
    assert relative_difference(ours.losses, losses) <= SAME_SUMS
    assert penalties(ours) == pytest.approx(penalty.values, rel=1e-5, abs=1e-9)
    assert ours.weights.keys() == weights.keys()
    assert max((ours.weights[name] - weights[name]).abs().max() for name in weights) <= 2 * SAME_SUMS
    assert largest_difference(ours, train(strategy_plan(material, freeze))) > 1e-4


def penalties(run_: Outcome) -> list[float]:
    return [numbers.penalty or 0.0 for numbers in run_.numbers]


@pytest.mark.parametrize("stage", variants([3], [0, 1, 2]))
def test_every_stage_on_two_ranks_equals_one_plain_process(stage: int, odd: Material) -> None:
    alone = train(strategy_plan(odd, L2_SP))
    sharded = run(strategy_plan(odd, L2_SP, workers=2, stage=stage))
    assert sharded[0].numbers == sharded[1].numbers
    assert relative_difference(sharded[0].losses, alone.losses) <= SAME_SUMS
    assert penalties(sharded[0]) == pytest.approx(penalties(alone), rel=1e-4, abs=1e-9)
    assert [one.grad_norm for one in sharded[0].numbers] == pytest.approx([one.grad_norm for one in alone.numbers], rel=1e-5)
    assert largest_difference(sharded[0], alone) <= 3 * SAME_SUMS


@pytest.mark.parametrize("stage", variants([3], [0, 1, 2]))
def test_resumed_equals_unbroken(stage: int, material: Material, tmp_path: Path) -> None:
    """So weights are held to those of the base, and not to those of the checkpoint."""
    plan = strategy_plan(material, L2_SP, stage=stage)
    unbroken = run(plan)[0]
    run(plan, Change(stop=3, save=tmp_path))
    resumed = run(plan, Change(start=3, load=tmp_path / "rank-0"))[0]
    assert resumed.numbers == unbroken.numbers[3:]
    assert largest_difference(resumed, unbroken) == 0


@pytest.mark.parametrize("stage", variants([3], [0, 2]))
def test_strength_0_is_none(stage: int, material: Material) -> None:
    none, zero = (run(strategy_plan(material, strategy, stage=stage))[0] for strategy in ({}, {"l2_sp": {"strength": 0}}))
    assert zero.numbers == none.numbers
    assert zero.numbers[0].penalty is None
    assert zero.held == none.held
    assert largest_difference(zero, none) == 0


def train_in_phases(
    plan: RunPlan, load: Path | None = None, save: Path | None = None, *, first: int = 0, stop: int = NUM_STEPS
) -> Outcome:
    engine, loss_sum, batches_of = start(plan)
    phases = Phases(plan, engine)
    if load:
        phases.reach_state(first)
        engine.load(load)
    phases.reach_step(first)
    numbers: list[StepNumbers] = []
    for result in steps_of(plan, engine, loss_sum, batches_of, Change(start=first, stop=stop)):
        numbers.append(result.read(engine))
        if result.step < stop:
            phases.reach_step(result.step)
    if save:
        engine.save(save)
    return outcome(engine, numbers)


@pytest.mark.parametrize("stage", variants([3], [0, 2]))
def test_what_a_later_phase_trains_is_held_to_the_base_as_well(stage: int, material: Material, tmp_path: Path) -> None:
    plan = strategy_plan(replace(material, model=save_tiny_model(tmp_path / "m", tied=False)), L2_SP | UNFREEZE, stage=stage)
    penalty = PlainPenalty(Path(plan.model.path), STRENGTH)
    unbroken = run_on_ranks(train_in_phases, 1, plan)[0]
    before = run_on_ranks(_until_3, 1, plan, tmp_path / "state")[0]
    resumed = run_on_ranks(_from_3, 1, plan, tmp_path / "state")[0]
    assert resumed.numbers == unbroken.numbers[3:]
    assert largest_difference(resumed, unbroken) == 0
    # The last step's penalty is that of the weights before it; one more step would show those after it.
    expected = penalty({name: nn.Parameter(value) for name, value in before.weights.items()}).item()
    assert unbroken.numbers[3].penalty == pytest.approx(expected, rel=1e-5)
    assert len(before.weights) > 20


def _until_3(plan: RunPlan, save: Path) -> Outcome:
    return train_in_phases(plan, save=save, stop=3)


def _from_3(plan: RunPlan, load: Path) -> Outcome:
    return train_in_phases(plan, load=load, first=3)


def dtypes_added_to(plan: RunPlan) -> tuple[set[torch.dtype], Outcome]:
    """Dtypes of the gradients that the penalty's is added to, and the run."""
    engine, loss_sum, batches_of = start(plan)
    penalty = engine._penalty  # pyright: ignore[reportAttributeAccessIssue]
    add, dtypes = penalty.add_gradient, set()

    def watched(gradient: Tensor, *arguments: Any, **named: Any) -> None:
        dtypes.add(gradient.dtype)
        add(gradient, *arguments, **named)

    penalty.add_gradient = watched
    return dtypes, outcome(engine, [result.read(engine) for result in steps_of(plan, engine, loss_sum, batches_of)])


@pytest.mark.parametrize("stage", variants([3], [1, 2]))
def test_under_16_bits_the_penalty_is_added_in_fp32_and_updated_with(stage: int, material: Material) -> None:
    """16 bits would lose a small penalty in a large gradient."""
    model = {"dtype": "bf16", "compute_dtype": "bf16"}
    sections: dict[str, Any] = {"stage": stage, "accumulation": 1, "precision": "bf16", "model": model}
    dtypes, held = run_on_ranks(dtypes_added_to, 1, strategy_plan(material, {"l2_sp": {"strength": 0.03}}, **sections))[0]
    free = run(strategy_plan(material, {}, **sections))[0]
    assert dtypes == {torch.float32}
    assert held.numbers[0].grad_norm == pytest.approx(free.numbers[0].grad_norm, rel=1e-6)
    assert any(one.grad_norm != other.grad_norm for one, other in zip(held.numbers[1:], free.numbers[1:]))


CASES: list[tuple[str, ZeroStage, str]] = [
    ("upper half", 0, "bf16"),
    ("upper half", 1, "bf16"),
    ("upper half", 2, "bf16"),
    ("head", 3, "fp32"),
]


def held_to_base(material: Material, way: str, stage: ZeroStage, precision: str) -> tuple[Any, RunPlan]:
    work, plan = planned(material, way, stage, precision)
    plan = plan.model_copy(update={"optimization": plan.optimization.model_copy(update={"l2_sp_strength": 0.1})})
    return replace(work, holds_weights=True), plan


@pytest.mark.slow
def test_every_rank_holds_and_takes_the_planned_bytes(wide: Material) -> None:  # noqa: F811
    """What is held within 2 %; what an update takes besides is at least that, and at most what is planned, within 2 % of all."""
    cases = [held_to_base(wide, *case) for case in CASES]
    without = [planned(wide, *case) for case in CASES]
    ranks = run_on_ranks(measure_updates, 2, [plan for _, plan in [*without, *cases]])
    for index, (case, (work, _)) in enumerate(zip(CASES, cases)):
        bare, held = ([rank[index + begin] for rank in ranks] for begin in (0, len(CASES)))
        bytes_held = held[0].held.penalty
        assert memory_of(work)["weights of the base"] == pytest.approx(bytes_held, rel=0.02), case
        more = update_bytes(work) - update_bytes(replace(work, holds_weights=False))
        measured = max(one.num_bytes - other.num_bytes for one, other in zip(held, bare))
        assert 0.98 * bytes_held <= measured <= more + 0.02 * bare[0].num_bytes, case


def memory_of(work: Workload) -> dict[str, int]:
    return {part.name: part.num_bytes for part in memory_parts(work)}


def update_bytes(work: Workload) -> int:
    return sum(part.num_bytes for part in memory_parts(work) if "update" in part.moments)


def test_a_run_records_its_penalty_and_is_scored_without_one(tmp_path: Path) -> None:
    result = finished(tmp_path, {"adapter": {"method": "full"}, "strategy": {"l2_sp": {"strength": STRENGTH}}})
    recorded = dict(result.history.series("train/penalty"))
    assert recorded[1] == 0, "nothing has moved before the first update"
    assert recorded[6] > 1e-4
    assert {rank["penalty"] for rank in result.held_bytes} == {4 * result.plan.num_trainable}
    weights = Weights(folder=RunFolder(result.plan.storage, result.plan.name), step=None)
    assert scoring_plan(result.plan, CPU, weights).optimization.l2_sp_strength == 0
