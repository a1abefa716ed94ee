"""Short runs of real plans, which the tests divide, shard, interrupt and compare."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from raytune.data.batches import Batch, step_batches
from raytune.data.store import Store
from raytune.plan.run_plan import RunPlan, StorePlan
from raytune.training.engine import Engine, HeldBytes
from raytune.training.loop import StepNumbers, training_steps
from raytune.training.schedule import learning_rate
from raytune.training.start import prepare_process, start_engine
from tests.numerics.processes import run_on_ranks
from tests.tiny import save_tiny_model, store_plan, tiny_model, tiny_plan, tiny_store

NUM_STEPS = 6
GLOBAL_BATCH = 8
LORA = {"method": "lora", "rank": 4, "alpha": 8}
QLORA = {"method": "qlora", "rank": 4, "alpha": 8}

# Losses and weights of two runs that add the same fp32 numbers in another order.
SAME_SUMS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Material:
    model: Path
    with_dropout: Path
    store: StorePlan


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a rank saw of a run."""

    numbers: list[StepNumbers]
    weights: dict[str, Tensor]
    """What was trained, on rank 0; empty on others."""
    held: HeldBytes
    """After the last step, or between backward and step where a run was asked to stop there."""
    dtypes: set[torch.dtype]

    @property
    def losses(self) -> list[float]:
        return [numbers.loss for numbers in self.numbers]


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a run does besides training. Picklable, since it travels to the ranks."""

    start: int = 0
    stop: int = NUM_STEPS
    load: Path | None = None
    save: Path | None = None
    """Folder that gets the state after the last step, in a folder per rank."""
    spoil: "Spoil | None" = None
    num_rows_in_run: int = 10**6


@dataclass(frozen=True, kw_only=True)
class Spoil:
    """Make a number not finite, in one step on one rank."""

    step: int
    rank: int
    what: str = field(metadata={"values": ("loss", "gradient")})


def make_material(folder: Path) -> Material:
    return Material(
        model=save_tiny_model(folder / "model"),
        with_dropout=save_tiny_model(folder / "with_dropout", attention_dropout=0.1),
        store=store_plan(tiny_store(folder / "stores", max_rows=40)),
    )


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
        # epsilon: Adam divides by |gradient| + epsilon, and would blow the rounding of gradients that are almost 0 up to a full step.
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
    return tiny_plan(**_merged(fields, changes))


def run(plan: RunPlan, change: Change | None = None) -> list[Any]:
    """Train on as many ranks as the plan has workers; what each rank returned, or the RaytuneError it raised."""
    return run_on_ranks(train, plan.batch.workers, plan, change or Change())


def train(plan: RunPlan, change: Change | None = None) -> Outcome:
    """Train on this rank: of the process group, or alone without one."""
    change = change or Change()
    engine, loss_sum, batches_of = start(plan, num_rows_in_run=change.num_rows_in_run)
    if change.load is not None:
        engine.load(change.load)
    numbers = []
    for result in training_steps(
        engine,
        batches_of,
        loss_sum if change.spoil is None else _spoiled(loss_sum, change.spoil, engine, _Steps(batches_of)),
        lambda step: learning_rate(step, plan.optimization),
        start=change.start,
        stop=change.stop,
        seed=plan.seed,
    ):
        numbers.append(result.read(engine))
    if change.save is not None:
        engine.save(change.save / f"rank-{engine.rank}")
    return outcome(engine, numbers)


def start(plan: RunPlan, *, num_rows_in_run: int = 10**6) -> tuple[Engine, Callable[..., Tensor], Callable[[int], Sequence[Batch]]]:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    engine, loss_sum = start_engine(plan, prepare_process(plan, rank), rank, world)
    store = Store.open(plan.data.train.path)

    def batches_of(step: int) -> list[Batch]:
        return step_batches(
            store,
            step=step,
            rank=rank,
            world=world,
            micro_batch_size=plan.batch.micro_batch_size,
            accumulation=plan.batch.accumulation,
            num_rows_in_run=num_rows_in_run,
            seed=plan.seed,
        )

    return engine, loss_sum, batches_of


def outcome(engine: Engine, numbers: list[StepNumbers]) -> Outcome:
    held = engine.held_bytes()
    weights = {name: value.clone() for name, value in engine.trainable_state() if value is not None}
    return Outcome(numbers=numbers, weights=weights, held=held, dtypes={parameter.dtype for parameter in engine.model.parameters()})
