"""Short runs of real plans, which the tests divide, shard, interrupt and compare."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raytune.data.batches.batches import Batch, step_batches
from raytune.data.batches.slices import Seat
from raytune.data.files.demo import INSTRUCTION
from raytune.data.store.store import Store
from raytune.errors import TrainingError
from raytune.plan.run_plan import RunPlan, StorePlan
from raytune.training.engines.engine import Engine, HeldBytes
from raytune.training.start.start import prepare_process, start_engine
from raytune.training.steps.loop import LossSum, StepNumbers, StepResult, training_steps
from raytune.training.steps.schedule import learning_rate
from tests.numerics.processes import run_on_ranks
from tests.tiny import save_tiny_model, store_plan, tiny_model, tiny_plan, tiny_rows, tiny_store

NUM_STEPS = 4
GLOBAL_BATCH = 8
LORA = {"method": "lora", "rank": 4, "alpha": 8}
QLORA = {"method": "qlora", "rank": 4, "alpha": 8}

# Losses and weights of two runs that add the same fp32 numbers in another order.
SAME_SUMS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Material:
    model: Path
    with_dropout: Path
    other_with_dropout: Path
    """The same with other weights."""
    store: StorePlan


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a rank saw of a run."""

    numbers: list[StepNumbers]
    weights: dict[str, Tensor]
    """What was trained, on rank 0; empty on others."""
    held: HeldBytes
    """After the last step."""
    dtypes: set[torch.dtype]

    @property
    def losses(self) -> list[float]:
        return [numbers.loss for numbers in self.numbers]


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a run does besides training. Picklable, since it travels to the ranks."""

    start: int = 0
    stop: int | None = None
    """None: the plan's last step."""
    load: Path | None = None
    save: Path | None = None
    """Folder that gets the state after the last step, in a folder per rank."""
    num_rows_in_run: int = 10**6


@dataclass(frozen=True, kw_only=True)
class Spoil:
    """Make a number not finite, in one step on one rank."""

    step: int
    rank: int
    what: Literal["loss", "gradient"]


def make_material(folder: Path) -> Material:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in short_rows(40)))
    return Material(
        model=save_tiny_model(folder / "model"),
        with_dropout=save_tiny_model(folder / "with_dropout", attention_dropout=0.1),
        other_with_dropout=save_tiny_model(folder / "other_with_dropout", seed=1, attention_dropout=0.1),
        store=store_plan(tiny_store(folder / "stores", str(rows), max_rows=None, max_length=144)),
    )


def with_long_rows(material: Material, folder: Path) -> Material:
    """The same with twice as many tokens in a row, where what is kept of them has to be more than little."""
    return replace(material, store=store_plan(tiny_store(folder / "stores", max_rows=40, max_length=288)))


def short_rows(num_rows: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of some 70 tokens, half of the demo's: an order, and the city that it goes to."""
    rows = []
    for row in tiny_rows(num_rows, seed):
        order, answer = (message["content"] for message in row["messages"])
        city = {"role": "assistant", "content": json.loads(answer)["city"]}
        rows.append({"messages": [{"role": "user", "content": order.removesuffix(f" {INSTRUCTION}")}, city]})
    return rows


def make_plan(material: Material, *, workers: int = 1, stage: int = 0, accumulation: int = 2, **changes: Any) -> RunPlan:
    """A plan with warm-up, weight decay and a clip that bites; the same global batch however it is divided.

    Args:
        changes: as for `tiny_plan`.
    """
    num_parameters = sum(parameter.numel() for parameter in tiny_model().parameters())
    fields: dict[str, Any] = {
        "model": {"path": str(material.model)},
        "data": {"train": material.store},
        "batch": {
            "workers": workers,
            "accumulation": accumulation,
            "micro_batch_size": GLOBAL_BATCH // workers // accumulation,
        },
        "engine": {"kind": "zero" if stage else "plain", "zero_stage": stage},
        # epsilon: Adam divides by |gradient| + epsilon; where gradients are almost 0, their rounding would become a full step.
        "optimization": {
            "num_steps": NUM_STEPS,
            "schedule": "linear",
            "warmup_steps": 2,
            "weight_decay": 0.1,
            "max_grad_norm": 0.5,
            "epsilon": 1e-6,
        },
        "num_parameters": num_parameters,
        "num_trainable": num_parameters,
    }
    for key, change in changes.items():
        fields[key] = fields[key] | change if isinstance(fields.get(key), dict) else change
    return tiny_plan(**fields)


def run(plan: RunPlan, change: Change | None = None) -> list[Any]:
    """Train on as many ranks as the plan has workers; what each rank returned, or the RaytuneError it raised."""
    return run_on_ranks(train, plan.batch.workers, plan, change or Change())


def train(plan: RunPlan, change: Change | None = None) -> Outcome:
    """Train on this rank: of the process group, or alone without one."""
    change = change or Change()
    engine, loss_sum, batches_of = start(plan, num_rows_in_run=change.num_rows_in_run)
    if change.load is not None:
        engine.load(change.load)
    numbers = [result.read(engine) for result in steps_of(plan, engine, loss_sum, batches_of, change)]
    if change.save is not None:
        engine.save(change.save / f"rank-{engine.rank}")
    return outcome(engine, numbers)


def train_spoiled(plan: RunPlan, spoil: Spoil) -> tuple[str, Outcome]:
    """Train until the run stops itself; what it said and what it left. The message is empty if it went on to the end."""
    return until_stopped(plan, *start(plan), spoil)


def until_stopped(
    plan: RunPlan, engine: Engine, loss_sum: LossSum, batches_of: Callable[[int], Sequence[Batch]], spoil: Spoil
) -> tuple[str, Outcome]:
    now = -1

    def watched_batches(step: int) -> Sequence[Batch]:
        nonlocal now
        now = step
        return batches_of(step)

    def spoiled_loss(module: nn.Module, batch: Batch) -> Tensor:
        loss = loss_sum(module, batch)
        if (now, engine.rank) != (spoil.step, spoil.rank):
            return loss
        if spoil.what == "gradient":
            loss.register_hook(lambda gradient: gradient * math.nan)
            return loss
        return loss * math.inf

    numbers: list[StepNumbers] = []
    try:
        numbers.extend(result.read(engine) for result in steps_of(plan, engine, spoiled_loss, watched_batches))
    except TrainingError as error:
        return str(error), outcome(engine, numbers)
    return "", outcome(engine, numbers)


def steps_of(
    plan: RunPlan, engine: Engine, loss_sum: LossSum, batches_of: Callable[[int], Sequence[Batch]], change: Change | None = None
) -> Iterator[StepResult]:
    change = change or Change()
    return training_steps(
        engine,
        batches_of,
        loss_sum,
        lambda step: learning_rate(step, plan.optimization),
        start=change.start,
        stop=change.stop or plan.optimization.num_steps,
        seed=plan.seed,
    )


def start(plan: RunPlan, *, num_rows_in_run: int = 10**6) -> tuple[Engine, LossSum, Callable[[int], Sequence[Batch]]]:
    rank, world = rank_and_world()
    engine, loss_sum = start_engine(plan, prepare_process(plan, rank), rank, world)
    return engine, loss_sum, batches_of_rank(plan, num_rows_in_run=num_rows_in_run)


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def batches_of_rank(plan: RunPlan, *, num_rows_in_run: int = 10**6) -> Callable[[int], Sequence[Batch]]:
    seat = Seat.of(plan.batch, *rank_and_world())
    store = Store.open(plan.data.train.path)

    def batches_of(step: int) -> list[Batch]:
        batches = step_batches(
            store,
            step=step,
            rank=seat.group,
            world=seat.num_groups,
            micro_batch_size=plan.batch.micro_batch_size,
            accumulation=plan.batch.accumulation,
            num_rows_in_run=num_rows_in_run,
            seed=plan.seed,
        )
        return [seat.own(batch) for batch in batches]

    return batches_of


def outcome(engine: Engine, numbers: list[StepNumbers]) -> Outcome:
    held = engine.held_bytes()
    weights = {name: value.clone() for name, value in engine.trainable_state() if value is not None}
    return Outcome(
        numbers=numbers, weights=weights, held=held, dtypes={parameter.dtype for parameter in engine.model.parameters()}
    )


def largest_difference(one: Outcome, other: Outcome) -> float:
    """Between the weights of two runs of the same model."""
    assert one.weights.keys() == other.weights.keys()
    return max((one.weights[name] - other.weights[name]).abs().max().item() for name in one.weights)


def relative_difference(losses: Sequence[float], other: Sequence[float]) -> float:
    assert len(losses) == len(other)
    return max(abs(one - two) / abs(two) for one, two in zip(losses, other))
