"""From a plan to a model in an engine, on this rank: what every task of a worker begins with."""

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from raytune.data.batches.batches import Batch, step_batches
from raytune.errors import RaytuneError
from raytune.model.adapters import adapting
from raytune.model.adapters.beside_updates import BesideUpdates
from raytune.model.attention.attention import model_inputs
from raytune.model.attention.sequence_parallel import SharedRows
from raytune.model.files.base_check import check_base
from raytune.model.inference import load_saved
from raytune.model.kept_base import KeptBase
from raytune.model.load import load_model, load_teacher
from raytune.model.parts.sharded_base import ShardedBase
from raytune.plan.run_plan import RunPlan
from raytune.plan.strategies.phases import in_phase, phase_of_state
from raytune.run_folder import RunFolder
from raytune.storage import download_folder, is_local, local_path
from raytune.training.checkpoints.peers import Peers, gather_in_own_group
from raytune.training.engines.deepspeed_json import deepspeed_config
from raytune.training.engines.engine import Engine
from raytune.training.engines.optimizer import build_optimizer
from raytune.training.engines.penalty import penalty_of
from raytune.training.engines.plain_engine import PlainEngine
from raytune.training.losses.losses import LossLayer, attach_loss
from raytune.training.losses.objectives import TokenLoss
from raytune.training.losses.teacher import Teacher, base_beneath
from raytune.training.losses.user_objective import objective_from
from raytune.training.start.fetched_base import PATIENCE_S, fetch_base
from raytune.training.start.nvme_room import refuse_small_nvme
from raytune.training.start.rows import training_rows

Look = Callable[[nn.Module], None]
"""Starts an adapter from data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """Who this process is among the workers of an attempt."""

    rank: int
    world_size: int
    device_index: int
    """Of its device among those that this process sees; on a CPU, its number on the node."""
    attempt: int
    report: Callable[[dict[str, float]], None]
    """Tells whoever waits for news (a sweep, for one). Every rank calls it the same number of times, seconds apart."""
    check: Callable[[], None] = lambda: None
    """Called after every step; what it raises ends the run in order. For a process that nobody else can end."""
    kept: KeptBase | None = None
    """Where a process that trains one run after the other keeps the base."""


class BatchLoss:
    """The loss of a model on a batch, with the attention that the plan chose. Called, it gives what is minimised, summed over the
    targets."""

    def __init__(self, plan: RunPlan, model: nn.Module, shared: SharedRows | None = None, teacher: Teacher | None = None) -> None:
        """
        Args:
            shared: with whom this rank shares rows.
            teacher: whom the model learns from beside its rows.
        """
        objective = plan.optimization.objective
        self._layer: LossLayer | None = attach_loss(model, plan.loss.chunk_tokens)
        self._objective = objective_from(objective) if objective else None
        self._model, self._shared, self._teacher = plan.model, shared, teacher
        self._in_front = partial(adapting(plan.adapter).in_front, plan.adapter)
        self._divergence: Tensor | None = None

    def __call__(self, module: nn.Module, batch: Batch) -> Tensor:
        """See `LossLayer.loss_sum`."""
        if self._teacher:
            lesson = self._teacher.teach(module, batch)
            loss = self._sum(module, batch, lesson.extras, lesson.objective)
            divergence = lesson.divergence_sum(batch.target_weights).to(loss.device)
            self._divergence = divergence if self._divergence is None else self._divergence + divergence
            return loss
        return self._sum(module, batch, objective=self._objective)

    def take_divergence(self) -> Tensor | None:
        """The teacher's part of the sums since the last call; None without a teacher."""
        divergence, self._divergence = self._divergence, None
        return divergence

    def cross_entropy(self, module: nn.Module, batch: Batch) -> Tensor:
        """The same sum of cross-entropy, whatever is minimised: what losses of runs are compared by."""
        return self._sum(module, batch)

    def of_each_target(self, module: nn.Module, batch: Batch) -> Tensor:
        """The cross-entropy of each target; see `LossLayer.losses`."""
        assert self._layer is not None, "released"
        seen = self._in_front(batch)
        return self._layer.losses(module, seen, self._inputs(seen))

    def release(self) -> None:
        """Let go of the model, which the engine is then all that holds, and of its teacher."""
        self._layer = self._teacher = None

    def _sum(
        self,
        module: nn.Module,
        batch: Batch,
        extras: Mapping[str, Tensor] | None = None,
        objective: TokenLoss | None = None,
    ) -> Tensor:
        assert self._layer is not None, "released"
        seen = self._in_front(batch)
        return self._layer.loss_sum(module, seen, self._inputs(seen), extras, objective)

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        inputs = model_inputs(batch, self._model.attention, packs=self._model.packs)
        return inputs if self._shared is None else inputs | {"shared_rows": self._shared}


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A worker whose model is in its engine."""

    plan: RunPlan
    worker: Worker
    folder: RunFolder
    """Of the plan."""
    engine: Engine
    loss: BatchLoss

    def of_state(self, num_made: int, num_made_by_engine: int) -> "Started":
        """With an engine that can load what the run left after so many steps: this one where its phase left that, else one made
        anew, with the base's weights where nothing was trained yet; this one is released then. Every rank calls it.
        """
        plan, phases = self.plan, self.plan.optimization.phases
        index = phase_of_state(num_made, phases)
        if index == phase_of_state(num_made_by_engine, phases):
            return self
        rank, world_size, device = self.engine.rank, self.engine.world_size, self.engine.device
        self.loss.release()
        self.engine.release()
        alone = in_phase(plan, index).model_copy(update={"distillation": None})
        engine, loss = start_engine(alone, device, rank, world_size, looks_at_data=False)
        return replace(self, engine=engine, loss=loss)


def start(
    plan: RunPlan, worker: Worker, saved_model: str | None = None, *, looks_at_data: bool = True, num_made: int = 0
) -> Started:
    """Bring the base here, set the process up, and start the engine. Every rank calls it.

    Args:
        saved_model: folder or URL of a model that a run saved, which is loaded in place of the untrained one.
        looks_at_data: whether an adapter may start from the rows of the plan; not where other weights are loaded over its start.
        num_made: steps after which the state was left that is to be loaded; the engine is in the phase that left it.

    Raises:
        RaytuneError: the same on every rank where it concerns all of them.
    """
    folder = RunFolder(plan.storage, plan.name)
    fetch_base(plan, folder, worker.rank, worker.world_size)
    device = prepare_process(plan, worker.device_index)
    with ExitStack() as stack:
        saved = None
        if saved_model is not None:
            saved = local_path(saved_model) if is_local(saved_model) else Path(stack.enter_context(TemporaryDirectory()))
            if not is_local(saved_model):
                peers = Peers(worker.rank, gather_in_own_group(worker.world_size, PATIENCE_S), RaytuneError)
                peers.together(lambda: download_folder(saved_model, saved))
        engine, loss = start_engine(
            in_phase(plan, phase_of_state(num_made, plan.optimization.phases)),
            device,
            worker.rank,
            worker.world_size,
            worker.kept,
            saved,
            looks_at_data=looks_at_data and saved is None,
        )
    return Started(plan=plan, worker=worker, folder=folder, engine=engine, loss=loss)


def prepare_process(plan: RunPlan, device_index: int) -> torch.device:
    """Set what holds for the whole process, and return the device it trains on.

    Args:
        device_index: of a GPU among those that this process sees; on a CPU, any number of its own on this node.
    """
    torch.set_num_threads(plan.cluster.threads_per_worker)
    os.environ["LOCAL_RANK"] = str(device_index)  # DeepSpeed looks for its device here
    torch.backends.cuda.matmul.allow_tf32 = plan.tf32
    torch.backends.cudnn.allow_tf32 = plan.tf32
    torch.manual_seed(plan.seed)
    if plan.cluster.device == "cuda":
        torch.cuda.set_device(device_index)
        torch.cuda.reset_peak_memory_stats()  # of a run before this one in the process
        return torch.device("cuda", device_index)
    os.environ["DS_ACCELERATOR"] = "cpu"
    return torch.device("cpu")


def start_engine(
    plan: RunPlan,
    device: torch.device,
    rank: int,
    world_size: int,
    kept: KeptBase | None = None,
    saved: Path | None = None,
    *,
    looks_at_data: bool = True,
) -> tuple[Engine, BatchLoss]:
    """Load the model, or take up the base that is kept, shard it as planned, and make its loss.

    Args:
        saved: folder of a model that a run saved, which is loaded in place of the untrained one.
        looks_at_data: as for `start`.

    Raises:
        PlanError: on every rank alike, if a node's disk has no room for what is offloaded to it.
    """
    refuse_small_nvme(plan, rank, world_size)
    look = partial(_look_at_data, plan=plan, device=device) if looks_at_data else None
    is_plain = plan.engine.kind == "plain"
    engine = (
        _plain_engine(plan, device, rank, world_size, kept, saved, look) if is_plain else _zero_engine(plan, device, saved, look)
    )
    size, timeout_s = plan.batch.sequence_parallel, plan.cluster.collective_timeout_s
    shared = SharedRows.of(size, rank, world_size, timeout_s)
    return engine, BatchLoss(plan, engine.model, shared, _teacher(plan, engine, device))


def _teacher(plan: RunPlan, engine: Engine, device: torch.device) -> Teacher | None:
    """The teacher of a plan, on this rank: whole, or divided among the ranks as the weights in training are."""
    if plan.distillation is None:
        return None
    seen = plan.distillation.teacher
    if seen is None:
        return base_beneath(plan.distillation, plan.model, engine.model)
    if plan.engine.zero_stage < 3:
        model = load_teacher(seen, device)
        return Teacher(plan.distillation, seen, model, model)
    from raytune.training.engines.zero_loading import sharded_loading, without_training

    check_base(seen.path, seen.revision, seen.trust_remote_code)
    with sharded_loading(plan, device):
        model = load_teacher(seen, device)
    return Teacher(plan.distillation, seen, model, without_training(model, plan))


def _look_at_data(model: Any, plan: RunPlan, device: torch.device) -> None:
    """Start an adapter that asks for it from the activations of the first global batch, which is the same on every rank."""
    row = adapting(plan.adapter)
    if not row.starts_from_data(plan.adapter):
        return
    with training_rows(plan) as rows:
        batches = step_batches(
            rows,
            step=0,
            rank=0,
            world=1,
            micro_batch_size=plan.batch.micro_batch_size,
            accumulation=plan.batch.workers * plan.batch.accumulation,
            num_rows_in_run=plan.optimization.num_rows,
            seed=plan.seed,
        )
    row.start_from_data(
        model, (model_inputs(batch.to(device), plan.model.attention, packs=plan.model.packs) for batch in batches)
    )


def _beside_updates(plan: RunPlan, model: Any) -> BesideUpdates | None:
    """What the plan's method does in each step beside updates, on this model."""
    return adapting(plan.adapter).beside_updates(model, plan.adapter, plan.optimization.num_steps)


def _plain_engine(
    plan: RunPlan, device: torch.device, rank: int, world_size: int, kept: KeptBase | None, saved: Path | None, look: Look | None
) -> Engine:
    base = ShardedBase() if plan.engine.shards_base and world_size > 1 else None
    if saved is None:
        kept = None if base else kept
        model = load_model(plan.model, plan.adapter, device=device, seed=plan.seed, shares=base, kept=kept)
    else:
        model = load_saved(plan, saved, device=device, shares=base)
    if base:
        base.begin(model)
    if look:
        look(model)
    return PlainEngine(
        model,
        build_optimizer(model, plan.optimization, device=device),
        precision=plan.precision,
        max_grad_norm=plan.optimization.max_grad_norm,
        device=device,
        rank=rank,
        world_size=world_size,
        bucket_bytes=4 * plan.engine.buckets.reduce_elements,
        # Ranks that share rows exchange heads meanwhile, and those that divide a base bring its layers: two of which one has no
        # gradient for some weight would wait for each other in another order, for ever.
        overlaps=plan.batch.sequence_parallel == 1 and not base,
        compile_model=plan.model.compile,
        beside=_beside_updates(plan, model),
        penalty=penalty_of(plan.optimization),
        base=base,
    )


def _zero_engine(plan: RunPlan, device: torch.device, saved: Path | None, look: Look | None) -> Engine:
    from raytune.training.engines.zero_engine import ZeroEngine
    from raytune.training.engines.zero_loading import check_offload, sharded_loading

    check_offload(plan)
    if plan.engine.zero_stage == 3:
        # Weights are sharded as they are loaded, so that rank 0 alone would see a wrong shape, and the others wait for it.
        check_base(plan.model.path, plan.model.revision, plan.model.trust_remote_code)
    with sharded_loading(plan, device) as shares:
        if saved is None:
            model = load_model(plan.model, plan.adapter, device=device, seed=plan.seed, shares=shares)
        else:
            model = load_saved(plan, saved, device=device, shares=shares)
    if look:
        look(model)
    return ZeroEngine(
        model,
        build_optimizer(model, plan.optimization, device=device),
        deepspeed_config(plan),
        precision=plan.precision,
        device=device,
        compile_model=plan.model.compile,
        beside=_beside_updates(plan, model),
        penalty=penalty_of(plan.optimization),
    )
