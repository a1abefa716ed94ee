"""Bytes that a rank holds of a run, part by part, for every way to run that the plan knows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raytune.config.sections.training import Optimizer
from raytune.data.batches.batches import Batch
from raytune.model.adapters import adapting
from raytune.plan.costs.workload import Workload
from raytune.plan.model.shapes import ModelShape
from raytune.plan.model.trained import Trained
from raytune.plan.run_plan import RunPlan
from raytune.training.engines.engine import HeldBytes
from raytune.training.start.start import prepare_process, start_engine
from tests.numerics.runs import batches_of_rank, rank_and_world
from tests.peak import held_bytes, peak_bytes


@dataclass(frozen=True, kw_only=True)
class Measured:
    """On one rank."""

    weights: int
    gradients: int
    """Between backward pass and update."""
    optimizer: int
    activations: int
    """What autograd keeps of the layers at the end of a forward pass."""
    num_tokens: int
    num_targets: int
    num_virtual_keys: int


def of_one_process(shape: ModelShape, trained: Trained, optimizer: Optimizer = "adamw") -> Workload:
    """What decides the bytes that a process alone holds between steps, without DeepSpeed and in fp32."""
    return Workload(
        shape=shape,
        trained=trained,
        engine="plain",
        zero_stage=0,
        workers=1,
        offload_optimizer="none",
        offload_parameters="none",
        precision="fp32",
        optimizer=optimizer,
        attention="varlen",
        has_checkpointing=False,
        accumulation=2,
        num_tokens=1,
        num_targets=1,
        chunk_tokens=None,
        is_on_gpu=False,
    )


def measure_all(plans: Sequence[RunPlan]) -> list[Measured]:
    """A step of each plan on this rank, one after the other."""
    return [measure(plan) for plan in plans]


def measure(plan: RunPlan) -> Measured:
    """One step of two micro-batches, of which the second meets what the first left behind."""
    rank, world = rank_and_world()
    engine, loss_sum = start_engine(plan, prepare_process(plan, rank), rank, world)
    batches = [batch.to(engine.device) for batch in batches_of_rank(plan)(0)]
    kept = gradients = 0
    for index, batch in enumerate(batches):
        with Keeping(engine.model) as keeping, engine.autocast():
            loss = loss_sum(engine.module, batch)
        kept = keeping.num_bytes
        engine.backward(loss / 1000)
        gradients = engine.held_bytes().gradients
        if (index + 1) % plan.batch.accumulation == 0:
            engine.step(1e-4)
    held = engine.held_bytes()
    return Measured(
        weights=held.weights,
        gradients=gradients,
        optimizer=held.optimizer,
        activations=kept,
        **counts(plan, batches[-1]),
    )


def counts(plan: RunPlan, batch: Batch) -> dict[str, int]:
    """Of a batch as the model sees it."""
    seen = adapting(plan.adapter).in_front(plan.adapter, batch)
    virtual_keys = seen.num_virtual_keys * (len(seen.cumulative_lengths) - 1)
    return {"num_tokens": seen.num_tokens, "num_targets": seen.num_targets, "num_virtual_keys": virtual_keys}


@dataclass(frozen=True, kw_only=True)
class Peak:
    """On one rank."""

    num_bytes: int
    """Of all tensors at the fullest moment of a step."""
    num_tokens: int
    num_targets: int
    num_virtual_keys: int


@dataclass(frozen=True, kw_only=True)
class Update:
    """On one rank."""

    held: HeldBytes
    """Before the first step."""
    num_bytes: int
    """Of all tensors at the fullest moment of an update."""


def measure_updates(plans: Sequence[RunPlan]) -> list[Update]:
    """Of the second step of each plan on this rank, one plan after the other."""
    return [measure_update(plan) for plan in plans]


def measure_update(plan: RunPlan) -> Update:
    rank, world = rank_and_world()
    device = prepare_process(plan, rank)
    others = held_bytes(device)
    engine, loss_sum = start_engine(plan, device, rank, world)
    held = engine.held_bytes()
    batches = batches_of_rank(plan)(0)
    peak = 0
    for _ in range(2):
        for batch in batches:
            with engine.autocast():
                loss = loss_sum(engine.module, batch.to(device))
            engine.backward(loss / 1000)
            del loss
        peak = peak_bytes(device, lambda: engine.step(1e-4)) - others
    engine.release()
    return Update(held=held, num_bytes=peak)


def measure_peaks(plans: Sequence[RunPlan]) -> list[Peak]:
    """Of the second step of each plan on this rank, one plan after the other."""
    return [measure_peak(plan) for plan in plans]


def measure_peak(plan: RunPlan) -> Peak:
    rank, world = rank_and_world()
    device = prepare_process(plan, rank)
    others = held_bytes(device)
    engine, loss_sum = start_engine(plan, device, rank, world)
    batches = batches_of_rank(plan)(0)

    def step() -> None:
        for batch in batches:
            with engine.autocast():
                loss = loss_sum(engine.module, batch.to(device))
            engine.backward(loss / 1000)
            del loss
        engine.step(1e-4)

    step()
    peak = peak_bytes(device, step) - others
    engine.release()
    return Peak(num_bytes=peak, **counts(plan, batches[-1]))


class Keeping:
    """Counts the bytes of what autograd keeps between the first layer's input and the last one's output, but for weights and
    constants."""

    def __init__(self, model: torch.nn.Module) -> None:
        layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
        self._first, self._last = layers[0], layers[-1]
        self._held = [*model.parameters(), *model.buffers()]
        self._kept: dict[int, Tensor] = {}
        self._inside = False

    def __enter__(self) -> "Keeping":
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self._hooks.__enter__()
        self._handles = [
            self._first.register_forward_pre_hook(self._begin, with_kwargs=True),
            self._last.register_forward_hook(self._end),
        ]
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        for handle in self._handles:
            handle.remove()
        self.num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in self._kept.values())
        self._kept.clear()

    def _begin(self, *_: Any) -> None:
        self._inside = True

    def _end(self, *_: Any) -> None:
        self._inside = False

    def _keep(self, tensor: Tensor) -> Tensor:
        pointer = _pointer(tensor)
        # At stage 3 a weight lies elsewhere each time it is gathered, and what is kept of it is its name.
        if self._inside and pointer not in self._kept and all(pointer != _pointer(one) for one in self._held):
            self._kept[pointer] = tensor
        return tensor


def _pointer(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
