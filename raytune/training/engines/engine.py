"""What the loop needs of an engine, and what all engines do alike.

An engine owns the arithmetic around the model: precision, gradients over the ranks, clipping, the update, and its share of a
checkpoint. It never looks at a batch.
"""

import gc
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from raytune.model.adapters.adapting import constant_matrices
from raytune.model.adapters.beside_updates import BesideUpdates
from raytune.plan.run_plan import RunPlan
from raytune.training.engines.state_files import Write, fill_with_tensors, write_now

AVERAGE_FILE = "average.safetensors"
METHOD_FILE = "method.safetensors"
"""State of what a method does beside updates; the same on every rank."""

INITIAL_LOSS_SCALE = 2.0**16
STEPS_BEFORE_GROWTH = 2000
"""Steps without overflow after which fp16's loss scale is doubled; an overflow halves it at once."""


class Engine(Protocol):
    """One rank's view of a model in training."""

    rank: int
    world_size: int
    device: torch.device
    model: nn.Module
    """The model as it was loaded; its parameter names are those of an exported model."""
    module: nn.Module
    """What a forward pass calls."""

    def autocast(self) -> AbstractContextManager:
        """Context of a forward pass: products in the run's precision."""
        ...

    def backward(self, loss: Tensor, *, is_last: bool = False) -> None:
        """Add the gradients of `loss`, this rank's share of the step's loss. A loss that is not finite makes them NaN.

        Args:
            is_last: of the step, so that what is complete may go to the other ranks at once; the same on every rank.
        """
        ...

    def step(self, learning_rate: float, norm_limit: float = math.inf) -> Tensor:
        """Update the weights and clear the gradients.

        Args:
            norm_limit: largest norm that is updated with; the same on every rank.

        Returns:
            Norm of the gradient over all ranks before clipping, the same on every rank. If it is not finite or above the limit,
            nothing was updated, neither weights nor the optimizer's state.
        """
        ...

    def loss_scale(self) -> float | None:
        """What fp16 multiplies the loss by at present; None in other precisions."""
        ...

    def penalty(self) -> float | None:
        """What the penalty on weights added to the loss of the last step; None without one. Every rank calls it."""
        ...

    def sum_squared_gradients(self, losses: Iterable[Tensor]) -> dict[str, Tensor]:
        """Square the gradient of each loss by itself, and sum over all losses of all ranks. Nothing is updated.

        Args:
            losses: made one after the other; as many on every rank.

        Returns:
            This rank's shares of the sums, in fp32, by names of their own; whole where the engine holds whole weights.
        """
        ...

    def weigh(self, importance: Mapping[str, Tensor]) -> None:
        """Let the penalty count what each weight has moved by its importance, in shares as `sum_squared_gradients` gives them."""

    def average(self, share: float) -> None:
        """Draw the average of the trained weights to what they are now, by a share of the way; between steps, on every rank.

        Args:
            share: 1 the first time (plan.averaging).
        """
        ...

    def averaged(self) -> AbstractContextManager:
        """Context in which the weights are their average, or that of an optimizer which makes one itself, and nothing is trained
        or saved; without an average, as they are. Every rank enters it, between steps."""
        ...

    def gathered(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager:
        """Context in which `parameters` are whole on every rank. Every rank enters it."""
        ...

    def trainable_state(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor | None]]:
        """Name and whole value of each trained parameter, one after the other: a model larger than a device passes through.

        Every rank iterates; the value is on the CPU of rank 0, cast to `dtype` if given, and None on the others.
        """
        ...

    def model_state(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor | None]]:
        """As `trainable_state`, of every parameter of the model, frozen ones as well."""
        ...

    def save(self, folder: Path, write: Write = write_now) -> None:
        """Write this rank's share of the training state into `folder`, local and its own or shared. Every rank calls it.

        Args:
            write: takes each file as the state is now, and may write it when this has returned.
        """
        ...

    def load(self, folder: Path) -> None:
        """Continue from what all ranks saved, once together in `folder`, whatever was trained since. Every rank calls it, between
        steps.

        Raises:
            CheckpointError: if it was saved by another kind of engine or number of workers, or does not fit the model.
        """
        ...

    def train_more(self, optimizer: torch.optim.Optimizer, plan: RunPlan) -> None:
        """Train from now on what requires a gradient now, which is all that did and more; between steps, on every rank.

        What was trained keeps its optimizer state, weights that are updated in fp32 among it.

        Args:
            optimizer: over all that is trained; each group has parameters of one age (plan.phases).
            plan: in the phase that begins.
        """
        ...

    def held_bytes(self) -> "HeldBytes":
        """Bytes that this rank holds now."""
        ...

    def release(self) -> None:
        """Let go of the model and of everything that was made to train it; the memory is free if nobody else refers to them.

        Afterwards `rank`, `world_size`, `device` and the collectives are all that is left of the engine.
        """
        ...

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        ...

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, in order of rank, on every rank. For rare and small things."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldBytes:
    """Bytes of tensors on one rank, wherever they lie."""

    weights: int
    """Weights that forward passes read, frozen ones included."""
    gradients: int
    """Between backward and step."""
    optimizer: int
    """Optimizer state, and fp32 master weights that exist beside the weights."""
    penalty: int = 0
    """What weights are held to, and by how much each is."""
    average: int = 0
    """Of the weights, beside them."""


def save_method(beside: BesideUpdates | None, folder: Path, write: Write) -> None:
    """Write what a method needs to go on exactly; rank 0."""
    if beside:
        state = {name: value.detach().cpu().contiguous() for name, value in beside.state().items()}
        write(folder / METHOD_FILE, state, fill_with_tensors)


def load_method(beside: BesideUpdates | None, folder: Path) -> None:
    if beside:
        beside.load_state(load_file(folder / METHOD_FILE))


def constant_bytes(model: nn.Module) -> int:
    """Bytes of what is no parameter and lies whole on every rank: scales of 4-bit weights, matrices of methods."""
    states = [getattr(parameter, "quant_state", None) for parameter in model.parameters()]
    nested = [getattr(state, "state2", None) for state in states]
    scales = num_bytes(getattr(state, "absmax", None) for state in (*states, *nested))
    return scales + num_bytes(constant_matrices(model))


def poisoned(loss: Tensor) -> Tensor:
    """`loss`, whose gradient is NaN if it is not finite: so it cannot get lost on the way to the norm, which every rank sees."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def is_updated_with(norm: float, norm_limit: float) -> bool:
    """Whether a step with a gradient of this norm updates the weights."""
    return math.isfinite(norm) and norm <= norm_limit


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)


def gather_objects(value: Any, world_size: int) -> list[Any]:
    if world_size == 1:
        return [value]
    values: list[Any] = [None] * world_size
    dist.all_gather_object(values, value)
    return values


def free_memory(device: torch.device) -> None:
    """Give back the memory of tensors that nobody refers to; models and their layers refer to each other."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def num_bytes(values: Iterable[Any]) -> int:
    """Bytes of the tensors among `values`."""
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))
