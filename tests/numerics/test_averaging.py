"""The average of the weights = one made of the weights that plain torch had after each step, however these are divided."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from raytune.plan.costs.memory import checkpoint_bytes, memory_parts
from raytune.plan.run_plan import RunPlan, ZeroStage
from raytune.plan.strategies.averaging import share_after
from raytune.training.steps.phases import Phases
from tests.numerics.oracles import PROJECTIONS
from tests.numerics.processes import run_on_ranks
from tests.numerics.runs import (
    LORA,
    NUM_STEPS,
    QLORA,
    SAME_SUMS,
    Change,
    Material,
    Outcome,
    largest_difference,
    outcome,
    start,
    steps_of,
)
from tests.numerics.saved_models import loss_by_plain_transformers
from tests.numerics.strategies import FULL, plain_training, strategy_plan
from tests.numerics.test_freezing_bytes import planned, wide  # noqa: F401
from tests.numerics.test_penalty import UNFREEZE, odd  # noqa: F401
from tests.numerics.test_whole_run import finished
from tests.tiny import save_tiny_model

EMA = {"decay": 0.6, "first_step": 1, "every_steps": 1}
LAST = {"decay": 1.0, "first_step": 2, "every_steps": 2}
"""Of four steps: the weights after steps 2 and 4."""
KINDS = {"ema": EMA, "last": LAST}


@dataclass(frozen=True, kw_only=True)
class Averaged:
    """What a rank saw of a run with an average."""

    run: Outcome
    average: dict[str, Tensor]
    """Of what was trained, on rank 0."""
    after: dict[str, Tensor]
    """The weights when they were back in place of the average."""


def averaged_plan(material: Material, averaging: Mapping[str, Any], adapter: dict[str, Any] = FULL, **changes: Any) -> RunPlan:
    optimization = {"averaging": dict(averaging)} | changes.pop("optimization", {})
    return strategy_plan(material, changes.pop("strategy", {}), adapter, optimization=optimization, **changes)


def train_averaged(plan: RunPlan, change: Change | None = None) -> Averaged:
    change = change or Change()
    engine, loss_sum, batches_of = start(plan)
    phases = Phases(plan, engine)
    if change.load:
        phases.reach_state(change.start)
        engine.load(change.load)
    phases.reach_step(change.start)
    numbers = []
    for result in steps_of(plan, engine, loss_sum, batches_of, change):
        if (share := share_after(result.step, plan.optimization.averaging)) is not None:
            engine.average(share)
        numbers.append(result.read(engine))
        if result.step < (change.stop or NUM_STEPS):
            phases.reach_step(result.step)
    if change.save:
        engine.save(change.save)
    run_ = outcome(engine, numbers)
    with engine.averaged():
        average = weights_of(engine)
    averaged = Averaged(run=run_, average=average, after=weights_of(engine))
    engine.release()
    return averaged


def weights_of(engine: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in engine.trainable_state() if value is not None}


def train_each(runs: list[tuple[RunPlan, Change]]) -> list[Averaged]:
    """One after the other in one process, since most of a short run is to start one."""
    return [train_averaged(plan, change) for plan, change in runs]


def plain_average(plan: RunPlan, kind: str, **arguments: Any) -> dict[str, Tensor]:
    """The weighted mean of the weights after each step, as the kind is defined."""
    seen: list[dict[str, Tensor]] = []
    plain_training(
        plan,
        lambda name: True,
        after_step=lambda trained: seen.append({name: value.detach().double() for name, value in trained.items()}),
        **arguments,
    )
    last = len(seen) - 1
    counts = [0.6 ** (last - index) for index in range(len(seen))] if kind == "ema" else [0, 1, 0, 1]
    return {
        name: sum(count * weights[name] for count, weights in zip(counts, seen, strict=True)) / sum(counts) for name in seen[0]
    }


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    assert len(one) > 5
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


@pytest.mark.parametrize("kind", KINDS)
def test_the_average_is_that_of_the_weights_of_plain_torch(kind: str, material: Material) -> None:
    plan = averaged_plan(material, KINDS[kind])
    ours = train_averaged(plan)
    assert difference(ours.average, plain_average(plan, kind)) <= 2 * SAME_SUMS
    assert difference(ours.average, ours.run.weights) > 1e-4


def test_the_average_of_updates_is_that_of_plain_peft(material: Material) -> None:
    plan = averaged_plan(material, EMA, LORA)
    ours = train_averaged(plan).average
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=PROJECTIONS)
    assert difference(ours, plain_average(plan, "ema", lora=lora)) <= 2 * SAME_SUMS


Ways = list[tuple[str, int]]
WAYS: list[Any] = [
    pytest.param([("ema", 3)], id="some"),
    pytest.param(
        [("last", 0), ("ema", 0), ("ema", 1), ("ema", 2), ("last", 2), ("last", 3)], id="others", marks=pytest.mark.slow
    ),
]
"""Kind and stage, stage 3 last: it replaces torch's linear function for the rest of a process."""


@pytest.mark.parametrize("ways", WAYS)
def test_every_stage_on_two_ranks_averages_as_one_process(ways: Ways, odd: Material) -> None:  # noqa: F811
    alone = {kind: train_averaged(averaged_plan(odd, KINDS[kind])) for kind in {kind for kind, _ in ways}}
    plans = [averaged_plan(odd, KINDS[kind], workers=2, stage=stage) for kind, stage in ways]
    ranks = run_on_ranks(train_each, 2, [(plan, Change()) for plan in plans])
    for (kind, stage), shared in zip(ways, ranks[0], strict=True):
        assert difference(shared.average, alone[kind].average) <= 3 * SAME_SUMS, (kind, stage)
        assert difference(shared.after, shared.run.weights) == 0, (kind, stage)


@pytest.mark.parametrize("ways", WAYS)
def test_training_is_as_without_an_average_and_resumed_equals_unbroken(ways: Ways, material: Material, tmp_path: Path) -> None:
    """Bit for bit, and nothing is held without one."""
    runs: list[tuple[RunPlan, Change]] = []
    for kind, stage in ways:
        plan, folder = averaged_plan(material, KINDS[kind], stage=stage), tmp_path / f"{kind}-{stage}"
        bare = plan.model_copy(update={"optimization": plan.optimization.model_copy(update={"averaging": None})})
        runs += [(bare, Change()), (plan, Change()), (plan, Change(stop=3, save=folder)), (plan, Change(start=3, load=folder))]
    found = run_on_ranks(train_each, 1, runs)[0]
    for (kind, stage), bare, averaged, resumed in zip(ways, found[::4], found[1::4], found[3::4], strict=True):
        assert bare.run.numbers == averaged.run.numbers, (kind, stage)
        assert largest_difference(bare.run, averaged.run) == 0, (kind, stage)
        assert replace(averaged.run.held, average=0) == bare.run.held, (kind, stage)
        assert averaged.run.held.average > 0 == bare.run.held.average, (kind, stage)
        assert difference(resumed.average, averaged.average) == 0, (kind, stage)
        assert largest_difference(resumed.run, averaged.run) == 0, (kind, stage)


def goes_back(plan: RunPlan, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The average after a step, and after the engine went back there from later ones; with none before the first."""
    engine, loss_sum, batches_of = start(plan)
    engine.save(folder / "none")
    found = []
    for load, first, stop in ((None, 0, 2), (None, 2, 4), (folder / "two", 2, 3), (folder / "none", 0, 2)):
        if load:
            engine.load(load)
        for result in steps_of(plan, engine, loss_sum, batches_of, Change(start=first, stop=stop)):
            engine.average(share_after(result.step, plan.optimization.averaging) or 0.0)
            result.read(engine)
        if stop == 2 and not load:
            engine.save(folder / "two")
        with engine.averaged():
            found.append(weights_of(engine))
    return found[0], found[3]


@pytest.mark.parametrize("stage", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_an_engine_that_goes_back_has_the_average_of_then(stage: int, material: Material, tmp_path: Path) -> None:
    once, again = run_on_ranks(goes_back, 1, averaged_plan(material, EMA, stage=stage), tmp_path)[0]
    assert difference(once, again) == 0


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3])
def test_in_16_bits_the_average_is_of_fp32_masters(stage: int, material: Material) -> None:
    """An average of 16 bits would hardly move: its weights are the nearest ones to that of the masters."""
    model = {"dtype": "bf16", "compute_dtype": "bf16"}
    plan = averaged_plan(material, EMA, stage=stage, precision="bf16", model=model, accumulation=1)
    average, masters = run_on_ranks(averages_of_masters, 1, plan)[0]
    assert difference(average, {name: value.bfloat16() for name, value in masters.items()}) == 0
    assert max((average[name].float() - value).abs().max() for name, value in masters.items()) > 0


def averages_of_masters(plan: RunPlan) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The average as the engine shows it, and one made here of the masters after each step."""
    from deepspeed.utils import safe_get_full_fp32_param

    engine, loss_sum, batches_of = start(plan)
    mean: dict[str, Tensor] = {}
    total = 0.0
    for result in steps_of(plan, engine, loss_sum, batches_of):
        engine.average(share_after(result.step, plan.optimization.averaging) or 0.0)
        result.read(engine)
        total = 0.6 * total + 1
        for name, parameter in engine.model.named_parameters():
            master = safe_get_full_fp32_param(parameter)
            assert master is not None
            before = mean.get(name, torch.zeros_like(master, dtype=torch.float64))
            mean[name] = before + (master - before) / total
    with engine.averaged():
        return weights_of(engine), {name: value.float() for name, value in mean.items()}


@pytest.mark.slow
def test_what_a_later_phase_trains_counts_as_the_base_had_it_until_then(material: Material, tmp_path: Path) -> None:
    """And the average of what an earlier phase trains goes on."""
    model = save_tiny_model(tmp_path / "m", tied=False)
    plans = [averaged_plan(replace(material, model=model), EMA, strategy=UNFREEZE, stage=stage) for stage in (0, 2, 3)]
    states = weights_by_step(plans[0])
    counts = [0.6 ** (NUM_STEPS - 1 - index) for index in range(NUM_STEPS)]
    runs: list[tuple[RunPlan, Change]] = []
    for plan in plans:
        folder = tmp_path / str(plan.engine.zero_stage)
        runs += [(plan, Change()), (plan, Change(stop=3, save=folder)), (plan, Change(start=3, load=folder))]
    found = run_on_ranks(train_each, 1, runs)[0]
    for plan, unbroken, resumed in zip(plans, found[::3], found[2::3], strict=True):
        expected = {
            name: sum(count * weights[name].double() for count, weights in zip(counts, states)) / sum(counts)
            for name in unbroken.average
        }
        assert len(unbroken.average) > 20
        assert difference(unbroken.average, expected) <= 2 * SAME_SUMS, plan.engine
        assert difference(resumed.average, unbroken.average) == 0, plan.engine


def weights_by_step(plan: RunPlan) -> list[dict[str, Tensor]]:
    """Of the whole model, after each step."""
    engine, loss_sum, batches_of = start(plan)
    phases, states = Phases(plan, engine), []
    for result in steps_of(plan, engine, loss_sum, batches_of):
        result.read(engine)
        states.append({name: value.clone() for name, value in engine.model_state() if value is not None})
        if result.step < NUM_STEPS:
            phases.reach_step(result.step)
    engine.release()
    return states


def test_qlora_averages_its_updates_and_leaves_the_base(material: Material) -> None:
    averaged = train_averaged(averaged_plan(material, LAST, QLORA))
    assert all("lora_" in name for name in averaged.average)
    assert difference(averaged.average, averaged.after) > 1e-5


def test_the_saved_model_is_the_average_that_was_validated(tmp_path: Path) -> None:
    averaged = finished(tmp_path, {"training": {"averaging": {"decay": 0.7}}})
    bare = finished(tmp_path / "bare", {})
    losses = [result.metrics["validation/loss"] for result in (averaged, bare)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    assert averaged.history.series("train/loss") == bare.history.series("train/loss")
    # Two orders of fp32 additions, over a few hundred targets.
    assert loss_by_plain_transformers(averaged.plan, averaged.model_path) == pytest.approx(losses[0], rel=2e-5)
    assert averaged.held_bytes[0]["average"] == 4 * averaged.plan.num_trainable


CASES: list[tuple[str, ZeroStage, str]] = [
    ("upper half", 0, "bf16"),
    ("upper half", 1, "bf16"),
    ("updates above", 2, "bf16"),
    ("upper half", 3, "bf16"),
    ("head", 3, "fp32"),
]


def held(plans: list[RunPlan]) -> list[int]:
    found = []
    for plan in plans:
        engine, loss_sum, batches_of = start(plan)
        for result in steps_of(plan, engine, loss_sum, batches_of, Change(stop=1)):
            result.read(engine)
        engine.average(1.0)
        found.append(engine.held_bytes().average)
        engine.release()
    return found


@pytest.mark.slow
def test_every_rank_holds_the_planned_bytes(wide: Material) -> None:  # noqa: F811
    cases = [planned(wide, *case) for case in CASES]
    for rank in run_on_ranks(held, 2, [plan for _, plan in cases]):
        for case, (work, _), measured in zip(CASES, cases, rank, strict=True):
            parts = {part.name: part.num_bytes for part in memory_parts(replace(work, averages_every=1))}
            assert parts["average of the weights"] == pytest.approx(measured, rel=0.02), case


@pytest.mark.parametrize("stage", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_checkpoint_with_an_average_has_the_planned_size(stage: ZeroStage, wide: Material, tmp_path: Path) -> None:  # noqa: F811
    """Within 2 %, and some KiB of names and shapes."""
    work, plan = planned(wide, "upper half", stage, "fp32")
    plan = plan.model_copy(update={"optimization": averaged_plan(wide, EMA).optimization})
    run_on_ranks(_save_once, 2, plan, tmp_path)
    saved = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert checkpoint_bytes(replace(work, averages_every=1)) == pytest.approx(saved, rel=0.02, abs=60_000)


def _save_once(plan: RunPlan, folder: Path) -> None:
    train_averaged(plan, Change(stop=1, save=folder / str(torch.distributed.get_rank())))
