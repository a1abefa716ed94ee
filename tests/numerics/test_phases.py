"""Gradual unfreezing = plain torch that sets `requires_grad` as it goes, and what each phase runs, holds and saves."""

import gc
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from raytune.config.load import config_from
from raytune.config.sections.training import SCHEDULE_FREE, Optimizer
from raytune.data.batches.batches import step_batches
from raytune.data.store.store import Store
from raytune.launch.cluster.host import this_machine
from raytune.launch.state.result import RunResult
from raytune.model.parts.layers import layers_of
from raytune.plan.choosing.stages import WITHOUT_SHARDS
from raytune.plan.costs.memory import memory_parts
from raytune.plan.costs.workload import Workload
from raytune.plan.run_plan import RunPlan
from raytune.plan.scoring import Weights, scoring_plan
from raytune.plan.strategies.phases import in_phase, phase_of_state
from raytune.run_folder import RunFolder
from raytune.training.checkpoints.commit import committed
from raytune.training.engines.engine import Engine, HeldBytes
from raytune.training.run import Worker, train
from raytune.training.start.start import prepare_process, start_engine
from raytune.training.steps.loop import StepNumbers
from raytune.training.steps.phases import Phases
from tests.numerics.oracles import document_loss, documents
from tests.numerics.processes import run_on_ranks
from tests.numerics.runs import (
    SAME_SUMS,
    Change,
    Material,
    Outcome,
    batches_of_rank,
    largest_difference,
    outcome,
    rank_and_world,
    relative_difference,
    steps_of,
)
from tests.numerics.saved_models import loss_by_plain_transformers
from tests.numerics.strategies import FULL, settled, strategy_plan
from tests.numerics.test_release import bytes_of_tensors
from tests.numerics.test_score import score_here
from tests.numerics.test_whole_run import prepared_run
from tests.tiny import save_tiny_model
from tests.variants import variants

NUM_STEPS = 5
UNFREEZE: list[dict[str, Any]] = [
    {"last_layers": 0},
    {"from_step": 2, "last_layers": 1, "learning_rate": 2e-3, "warmup_steps": 1},
    {"from_epoch": 1, "last_layers": "all", "learning_rate": 5e-4},  # an epoch has four of the five steps
]
BORDERS, PEAKS, WARM_UP = (2, 4), (1e-3, 2e-3, 5e-4), (0, 1, 0)
LOWEST = (3, 2, 0)


@pytest.fixture(scope="module")
def untied(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Material:
    """Three layers under a head of its own."""
    folder = tmp_path_factory.mktemp("untied")
    return replace(material, model=save_tiny_model(folder, tied=False, num_hidden_layers=3))


def phased_plan(material: Material, **changes: Any) -> RunPlan:
    optimization = {"num_steps": NUM_STEPS} | changes.pop("optimization", {})
    return strategy_plan(material, changes.pop("strategy", {"unfreeze": UNFREEZE}), optimization=optimization, **changes)


def phase_of(step: int) -> int:
    """Of a step, counted from 0."""
    return sum(step >= border for border in BORDERS)


def is_trained(name: str, phase: int) -> bool:
    return phase == 2 or name in ("lm_head.weight", "model.norm.weight") or (phase == 1 and "layers.2." in name)


# --- against plain torch


def plain_phases(plan: RunPlan) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of every step and the weights left, by one AdamW over all parameters, which skips those without a gradient."""
    model: Any = AutoModelForCausalLM.from_pretrained(plan.model.path, dtype=torch.float32).train()
    settings, parameters = plan.optimization, dict(model.named_parameters())
    groups = [{"params": [p], "weight_decay": settings.weight_decay * (p.dim() > 1)} for p in parameters.values()]
    optimizer = torch.optim.AdamW(groups, eps=settings.epsilon)
    store, losses = Store.open(plan.data.train.path), []
    for step in range(NUM_STEPS):
        phase = phase_of(step)
        for name, parameter in parameters.items():
            parameter.requires_grad_(is_trained(name, phase))
        share = step / 2 if step < 2 else (NUM_STEPS - step) / (NUM_STEPS - 2)
        in_its_warm_up = phase > 0 and step - BORDERS[phase - 1] < WARM_UP[phase]
        for group in optimizer.param_groups:
            group["lr"] = 0.0 if in_its_warm_up else PEAKS[phase] * share
        batches = step_batches(
            store, step=step, rank=0, world=1, micro_batch_size=8, accumulation=1, num_rows_in_run=10**6, seed=plan.seed
        )
        num_targets = sum(batch.target_ids.numel() for batch in batches)
        loss = sum(document_loss(model, ids, labels) for batch in batches for ids, labels in documents(batch)) / num_targets
        assert isinstance(loss, Tensor)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: parameter.detach() for name, parameter in parameters.items()}


def start_in(plan: RunPlan, num_made: int = 0) -> tuple[Engine, Any]:
    """An engine in the phase that left the state after so many steps, and the loss."""
    rank, world = rank_and_world()
    started = in_phase(plan, phase_of_state(num_made, plan.optimization.phases))
    return start_engine(started, prepare_process(plan, rank), rank, world)


def train_phases(plan: RunPlan, change: Change | None = None) -> Outcome:
    """Train on this rank as `training.run` does, from the first phase or from a state."""
    change = change or Change()
    engine, loss_sum = start_in(plan)
    phases = Phases(plan, engine)
    if change.load is not None:
        phases.reach_state(change.start)
        engine.load(change.load)
    phases.reach_step(change.start)
    numbers: list[StepNumbers] = []
    for result in steps_of(plan, engine, loss_sum, batches_of_rank(plan), change):
        numbers.append(result.read(engine))
        if change.save is not None and result.step == change.stop:
            engine.save(change.save / f"rank-{engine.rank}")
        phases.reach_step(result.step)
    return outcome(engine, numbers)


def run_phases(plan: RunPlan, change: Change | None = None) -> list[Outcome]:
    return run_on_ranks(train_phases, plan.batch.workers, plan, change or Change())


def test_every_step_of_all_phases_equals_plain_torch(untied: Material) -> None:
    plan = phased_plan(untied)
    losses, weights = plain_phases(plan)
    ours = train_phases(plan)
    assert relative_difference(ours.losses, losses) <= SAME_SUMS
    assert ours.weights.keys() == weights.keys()
    assert max((ours.weights[name] - weights[name]).abs().max() for name in weights) <= 2 * SAME_SUMS


# --- divided and resumed, and what passes run and what is held


@dataclass(frozen=True, kw_only=True)
class Seen:
    """On one rank, of a run over all phases and of those that went on from its checkpoints."""

    whole: Outcome
    resumed: dict[int, Outcome]
    """By the step that they went on from."""
    reached: list[set[int]]
    """Layers whose output got a gradient, of each step."""
    saved: dict[int, int]
    """Bytes of each checkpoint."""


def watch_layers(model: nn.Module, reached: set[int]) -> None:
    """Note the layers whose output gets a gradient."""
    found = layers_of(model)
    assert found is not None

    def watch(index: int, layer: nn.Module) -> None:
        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            stream = output if isinstance(output, torch.Tensor) else output[0]
            if stream.requires_grad:
                stream.register_hook(lambda _gradient: reached.add(index))

        layer.register_forward_hook(look)

    for index, layer in enumerate(found[1]):
        watch(index, layer)


def see(plan: RunPlan, folder: Path, resumes_at: tuple[int, ...]) -> Seen:
    """Train all phases and save after every step; then go on from some of these, each time with another engine."""
    engine, loss_sum = start_in(plan)
    phases, now = Phases(plan, engine), set[int]()
    watch_layers(engine.model, now)
    numbers, reached = [], []
    for result in steps_of(plan, engine, loss_sum, batches_of_rank(plan)):
        numbers.append(result.read(engine))
        reached.append({*now})
        now.clear()
        engine.save(folder / str(result.step))
        phases.reach_step(result.step)
    whole = outcome(engine, numbers)
    if dist.is_initialized():
        dist.barrier()
    steps = range(1, NUM_STEPS + 1)
    saved = {step: sum(file.stat().st_size for file in (folder / str(step)).rglob("*") if file.is_file()) for step in steps}
    resumed = {step: train_phases(plan, Change(start=step, load=folder / str(step))) for step in resumes_at}
    return Seen(whole=whole, resumed=resumed, reached=reached, saved=saved)


def assert_resumes(seen: Seen) -> None:
    for step, resumed in seen.resumed.items():
        assert resumed.losses == seen.whole.losses[step:], step
        assert largest_difference(resumed, seen.whole) == 0, step


def assert_reaches(seen: Seen) -> None:
    for step, layers in enumerate(seen.reached):
        assert layers == {*range(LOWEST[phase_of(step)], 3)}, step


def test_a_run_resumed_within_each_phase_and_at_borders_equals_the_unbroken_one(untied: Material, tmp_path: Path) -> None:
    plan = phased_plan(untied)
    seen = see(plan, tmp_path, (1, 2, 3, 4))
    assert_resumes(seen)
    assert_reaches(seen)
    assert [needs.lowest_layer for needs in plan.phase_needs] == [*LOWEST]
    for step, size in seen.saved.items():
        num_trained = plan.phase_needs[phase_of(step - 1)].num_trainable
        assert size == pytest.approx(12 * num_trained, rel=0.04), "names and shapes besides"


def test_recomputation_follows_the_phases(untied: Material, tmp_path: Path) -> None:
    seen = see(phased_plan(untied, checkpointing=True), tmp_path, ())
    assert_reaches(seen)
    assert seen.whole.losses == train_phases(phased_plan(untied)).losses


RESUMES = {1: (), 2: (1, 2, 4), 3: (2, 3)}


@pytest.mark.parametrize("stage", variants([3], [1, 2]))
def test_every_stage_on_two_ranks_equals_one_plain_process(stage: int, untied: Material, tmp_path: Path) -> None:
    """At stage 3 with checkpointing, which is reentrant there."""
    alone = train_phases(phased_plan(untied))
    plan = phased_plan(untied, workers=2, stage=stage, checkpointing=stage == 3)
    first, second = run_on_ranks(see, 2, plan, tmp_path, RESUMES[stage])
    assert first.whole.numbers == second.whole.numbers
    assert relative_difference(first.whole.losses, alone.losses) <= SAME_SUMS
    # Measured of groups with rates of their own: 2.3e-6.
    assert largest_difference(first.whole, alone) <= 3 * SAME_SUMS
    assert_resumes(first)
    assert_reaches(first)


SAVED_AT = 3


def resume_each(plans: list[RunPlan], folder: Path) -> list[tuple[Outcome, Outcome]]:
    """Of each plan the unbroken run, and one that went on in the second phase."""
    found = []
    for number, plan in enumerate(plans):
        whole = train_phases(plan)
        train_phases(plan, Change(stop=SAVED_AT, save=folder / str(number)))
        found.append((whole, train_phases(plan, Change(start=SAVED_AT, load=folder / str(number) / "rank-0"))))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_every_optimizer_keeps_its_state_over_borders(stage: int, untied: Material, tmp_path: Path) -> None:
    optimizers = [name for name in get_args(Optimizer) if name not in SCHEDULE_FREE and not (stage and name in WITHOUT_SHARDS)]
    plans = [phased_plan(untied, stage=stage, optimization={"optimizer": name}) for name in optimizers]
    for whole, resumed in run_on_ranks(resume_each, 1, plans, tmp_path)[0]:
        assert resumed.losses == whole.losses[SAVED_AT:]
        assert largest_difference(resumed, whole) == 0


@pytest.mark.slow
def test_a_compiled_model_is_compiled_anew_for_each_phase(untied: Material) -> None:
    losses = train_phases(phased_plan(untied, model={"compile": True})).losses
    assert relative_difference(losses, train_phases(phased_plan(untied)).losses) <= SAME_SUMS


# --- planned bytes


@dataclass(frozen=True, kw_only=True)
class Held:
    """On one rank, in the last step of each phase and after them."""

    phases: list[HeldBytes]
    left: int
    """Bytes of tensors after the last phase has begun and made a step."""
    left_alone: int
    """The same of an engine that began in that phase."""


def hold(plan: RunPlan) -> Held:
    def one_run(num_made: int) -> tuple[list[HeldBytes], int]:
        gc.collect()  # the run before
        engine, loss_sum = start_in(plan, num_made)
        phases, held = Phases(plan, engine, phase_of(max(0, num_made - 1))), []
        make_step = engine.step

        def step(learning_rate: float, norm_limit: float) -> Tensor:
            gradients = engine.held_bytes().gradients  # before the update, which clears them
            norm = make_step(learning_rate, norm_limit)
            held.append(replace(engine.held_bytes(), gradients=gradients))
            return norm

        engine.step = step
        for result in steps_of(plan, engine, loss_sum, batches_of_rank(plan), Change(start=num_made and num_made - 1)):
            result.read(engine)
            phases.reach_step(result.step)
        gc.collect()
        left = bytes_of_tensors()
        del engine.step
        engine.release()
        return held, left

    held, left = one_run(0)
    return Held(phases=[held[step - 1] for step in (*BORDERS, NUM_STEPS)], left=left, left_alone=one_run(NUM_STEPS)[1])


def hold_all(plans: list[RunPlan]) -> list[Held]:
    return [hold(plan) for plan in plans]


@pytest.mark.slow
def test_each_phase_holds_the_planned_bytes_and_nothing_of_the_one_before(
    material: Material, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Within 2 %, on two ranks."""
    model = save_tiny_model(
        tmp_path_factory.mktemp("wide"), tied=False, num_hidden_layers=3, hidden_size=128, intermediate_size=352
    )
    wide = replace(material, model=model)
    setting, shape = settled(model, {"unfreeze": UNFREEZE}, FULL)
    stages = (0, 2, 3)
    plans = [
        phased_plan(
            wide,
            workers=2,
            stage=stage,
            precision="bf16",
            model={"dtype": "bf16" if stage else "fp32", "compute_dtype": "bf16"},
            num_parameters=shape.num_parameters,
        )
        for stage in stages
    ]
    for rank in run_on_ranks(hold_all, 2, plans):
        for stage, held in zip(stages, rank, strict=True):
            for trained, measured in zip(setting.phases, held.phases, strict=True):
                work = Workload(
                    shape=shape,
                    trained=trained,
                    engine="zero" if stage else "plain",
                    zero_stage=stage,
                    workers=2,
                    offload_optimizer="none",
                    offload_parameters="none",
                    precision="bf16",
                    optimizer="adamw",
                    attention="varlen",
                    has_checkpointing=False,
                    accumulation=2,
                    num_tokens=1,
                    num_targets=1,
                    chunk_tokens=None,
                    is_on_gpu=False,
                )
                parts = {part.name: part.num_bytes for part in memory_parts(work)}
                for name in ("weights", "gradients", "optimizer"):
                    assert parts[name] == pytest.approx(getattr(measured, name), rel=0.02), (name, stage)
            assert held.left < 1.01 * held.left_alone, stage


# --- whole runs

LAST_LAYER_THEN_ALL = [{"last_layers": 1}, {"from_fraction": 0.5, "last_layers": "all", "learning_rate": 1e-3}]


class Stopped(Exception):
    """Ends a run in a test."""


def whole_run(storage: Path, material: Material) -> tuple[RunFolder, RunPlan]:
    changes: dict[str, Any] = {
        "model": {"base": str(material.model)},
        "adapter": FULL,
        "data": {"train": {"path": "demo:train", "max_rows": 20}},
        "strategy": {"unfreeze": LAST_LAYER_THEN_ALL},
        "training": {"max_steps": 4, "learning_rate": 2e-3, "warmup_steps": 0},
        "evaluation": {"every_steps": 2},
        "checkpoint": {"every_steps": 2, "keep_last": 3, "mode": "max"},  # the loss falls: the earlier of two is "best"
    }
    return prepared_run(storage, changes)


def train_here(plan: RunPlan, stop_at: int | None = None, attempt: int = 1) -> None:
    def report(metrics: dict[str, float]) -> None:
        if metrics["step"] == stop_at:
            raise Stopped

    rank, world = rank_and_world()
    train(plan, Worker(rank=rank, world_size=world, device_index=rank, attempt=attempt, report=report))


def test_a_whole_run_stopped_at_a_border_leaves_the_best_of_an_earlier_phase(untied: Material, tmp_path: Path) -> None:
    """Its weights below the layers of that phase are the base's, though they were trained since."""
    folder, plan = whole_run(tmp_path / "unbroken", untied)
    train_here(plan)
    result = RunResult.read(folder)
    losses = dict(result.history.series("validation/loss"))
    assert losses[2] > losses[4]
    assert result.best_step == 2
    assert loss_by_plain_transformers(plan, result.model_path) == pytest.approx(losses[2], rel=2e-5)
    base, tuned = (load_file(Path(path) / "model.safetensors") for path in (plan.model.path, result.model_path))
    changed = {name for name, value in base.items() if not torch.equal(value, tuned[name].to(value.dtype))}
    assert changed == {name for name in base if is_trained(name, 1)}
    measured = {name: (planned, held) for name, planned, held in result.planned_and_measured}
    for name in ("weights", "optimizer"):
        planned, held = measured[name]
        assert planned == pytest.approx(held, rel=0.02), "of the last phase: the best checkpoint is loaded later"
    for step in (2, 4):
        assert scored_loss(plan, Weights(folder=folder, step=step)) == pytest.approx(losses[step], rel=2e-5)

    folder, plan = whole_run(tmp_path / "stopped", untied)
    with pytest.raises(Stopped):
        train_here(plan, stop_at=2)
    until_committed(folder, 2)
    train_here(plan, attempt=2)
    resumed = RunResult.read(folder).history
    for name in ("train/loss", "validation/loss", "train/learning_rate"):
        assert resumed.series(name) == result.history.series(name)


def scored_loss(plan: RunPlan, weights: Weights) -> float:
    """Mean loss of the validation rows under a checkpoint."""
    scoring = scoring_plan(plan, this_machine(config_from({}).cluster), weights)
    data = plan.data.model_copy(update={"train": plan.data.validation[0], "validation": []})
    rows = score_here(scoring.model_copy(update={"storage": weights.folder.scores, "name": "here", "data": data}), weights)
    return sum(row.loss * row.targets for row in rows) / sum(row.targets for row in rows)


def until_committed(folder: RunFolder, step: int) -> None:
    """Wait for the thread of a save."""
    for _ in range(600):
        if any(commit.step == step for commit in committed(folder)):
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not committed")
