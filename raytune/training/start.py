"""From a plan to a model in an engine, on this rank."""

import os
from typing import Any

import torch
from torch import Tensor, nn

from raytune.data.batches import Batch, step_batches
from raytune.data.store import Store
from raytune.model.adapters import adapting
from raytune.model.attention import model_inputs
from raytune.model.base_check import check_base
from raytune.model.kept_base import KeptBase
from raytune.model.load import load_model
from raytune.plan.run_plan import RunPlan
from raytune.training.engine import Engine, PlainEngine
from raytune.training.loop import LossSum
from raytune.training.losses import attach_loss
from raytune.training.nvme_room import refuse_small_nvme
from raytune.training.optimizer import build_optimizer


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
    plan: RunPlan, device: torch.device, rank: int, world_size: int, kept: KeptBase | None = None
) -> tuple[Engine, LossSum]:
    """Load the model, or take up the base that is kept, shard it as planned, and make its loss.

    Raises:
        PlanError: on every rank alike, if a node's disk has no room for what is offloaded to it.
    """
    refuse_small_nvme(plan, rank, world_size)
    is_plain = plan.engine.kind == "plain"
    engine = _plain_engine(plan, device, rank, world_size, kept) if is_plain else _zero_engine(plan, device)
    layer = attach_loss(engine.model, plan.loss.chunk_tokens)
    attention, packs = plan.model.attention, plan.model.packs

    def loss_sum(module: nn.Module, batch: Batch) -> Tensor:
        return layer.loss_sum(module, batch, model_inputs(batch, attention, packs=packs))

    return engine, loss_sum


def _look_at_data(model: Any, plan: RunPlan, device: torch.device) -> None:
    """Start an adapter that asks for it from the activations of the first global batch, which is the same on every rank."""
    row = adapting(plan.adapter)
    if not row.starts_from_data(plan.adapter):
        return
    batches = step_batches(
        Store.open(plan.data.train.path),
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


def _plain_engine(plan: RunPlan, device: torch.device, rank: int, world_size: int, kept: KeptBase | None) -> Engine:
    model = load_model(plan.model, plan.adapter, device=device, seed=plan.seed, kept=kept)
    _look_at_data(model, plan, device)
    return PlainEngine(
        model,
        build_optimizer(model, plan.optimization, device=device),
        precision=plan.precision,
        max_grad_norm=plan.optimization.max_grad_norm,
        device=device,
        rank=rank,
        world_size=world_size,
        compile_model=plan.model.compile,
    )


def _zero_engine(plan: RunPlan, device: torch.device) -> Engine:
    from raytune.training.zero_engine import ZeroEngine, check_offload, deepspeed_config, sharded_loading

    check_offload(plan)
    if plan.engine.zero_stage == 3:
        # Weights are sharded as they are loaded, so that rank 0 alone would see a wrong shape, and the others wait for it.
        check_base(plan.model.path, plan.model.revision, plan.model.trust_remote_code)
    with sharded_loading(plan, device) as shard:
        model = load_model(plan.model, plan.adapter, device=device, seed=plan.seed, shard=shard)
    _look_at_data(model, plan, device)
    return ZeroEngine(
        model,
        build_optimizer(model, plan.optimization, device=device),
        deepspeed_config(plan),
        precision=plan.precision,
        device=device,
        compile_model=plan.model.compile,
    )
