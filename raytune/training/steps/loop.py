"""The loop: a generator of optimizer steps. Evaluating, saving, stopping and reporting are sentences of its caller.

The loss is normalised here and nowhere else: every target token of a step counts by its weight alone, on whichever rank and in
whichever micro-batch it lies, so the curve of a run does not depend on how its global batch is divided.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from raytune.data.batches.batches import Batch
from raytune.errors import TrainingError
from raytune.training.engines.engine import Engine, is_updated_with

LossSum = Callable[[nn.Module, Batch], Tensor]
"""Sum over the targets of a batch of their loss times their weight, as an fp32 scalar that has a gradient."""
NameRows = Callable[[Iterable[int]], str]
"""Rows of the store in words that somebody finds them by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepNumbers:
    """What is known of a step once somebody waited for it."""

    loss: float
    """Mean over the targets of the global batch, each counted by its weight."""
    grad_norm: float
    """Before clipping."""
    updated: bool
    """False: fp16 overflowed, the step was skipped and the loss scale lowered; or its norm was above its limit."""
    loss_scale: float | None
    skipped: tuple["Skipped", ...] = ()
    """Steps since the last read, this one included, whose gradient was above its limit."""
    penalty: float | None = None
    """On weights, before the update, beside the loss; None without one."""
    distillation: float | None = None
    """The teacher's part of the loss; None without one."""
    waited_s: float = field(default=0.0, compare=False)
    """Seconds since the last read in which the rank that waited longest had nothing to do but to wait for its batches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A step whose update was not made."""

    step: int
    grad_norm: float
    norm_limit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """An optimizer step that has been made, or on a GPU: queued."""

    step: int
    """Steps made so far, this one included."""
    num_targets: int
    """Targets of the global batch."""
    weight: float
    """Sum of their weights, which the loss is divided by."""
    learning_rate: float
    loss_sum: Tensor
    """Over the targets of this rank, by their weights."""
    grad_norm: Tensor
    """Of the global gradient before clipping; not finite, or above the limit: nothing was updated."""
    norm_limit: float
    losses: list[Tensor]
    """Sum over the targets of each micro-batch of this rank."""
    rows: list[tuple[int, ...]]
    """Rows of the store in each micro-batch of this rank."""
    part_sum: Tensor | None
    """What a part of the loss adds to `loss_sum`, where one is told by itself."""
    _named: NameRows = field(repr=False)
    _unread: "_Unread" = field(repr=False)

    def read(self, engine: Engine) -> StepNumbers:
        """Wait for the step and sum its loss over the ranks. Every rank calls it, on the same steps, and before it saves.

        Raises:
            TrainingError: on every rank alike, if this step or one since the last read had a loss or gradient that is not finite.
        """
        skipped = self._unread.check(engine)
        own = [self.loss_sum] if self.part_sum is None else [self.loss_sum, self.part_sum.to(self.loss_sum)]
        loss, *parts = (total / self.weight for total in engine.all_reduce_sum(torch.stack(own)).tolist())
        grad_norm = self.grad_norm.item()
        if not math.isfinite(loss):
            raise _divergence(engine, self)
        return StepNumbers(
            loss=loss,
            grad_norm=grad_norm,
            updated=is_updated_with(grad_norm, self.norm_limit),
            loss_scale=engine.loss_scale(),
            skipped=tuple(skipped),
            penalty=engine.penalty(),
            distillation=parts[0] if parts else None,
            waited_s=self._unread.longest_wait_s(engine),
        )

    def rows_of_ranks(self, engine: Engine) -> str:
        """The rows of the step in words. Every rank calls it."""
        rows_of_ranks = engine.gather_objects(self._named([row for rows in self.rows for row in rows]))
        return "; ".join(f"rank {rank}: {rows}" for rank, rows in enumerate(rows_of_ranks))


@dataclass(slots=True)
class _Unread:
    """Steps whose norm nobody has looked at yet. Looking means waiting for a GPU, so it is done for many steps at once."""

    steps: list[StepResult] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    """Found above their limits, and not yet told."""
    waited_s: float = 0.0
    """For batches, by this rank."""

    def look(self, engine: Engine) -> None:
        """Look at the norms of all steps that nobody has looked at."""
        steps, self.steps = self.steps, []
        if not steps:
            return
        # The norm is global and so is a loss in it (`poisoned`): all ranks come to the same verdict and stop together.
        norms = torch.stack([step.grad_norm for step in steps]).tolist()
        for step, norm in zip(steps, norms):
            if not math.isfinite(norm):
                if not _is_overflow(engine, step):
                    raise _divergence(engine, step)
            elif norm > step.norm_limit:
                self.skipped.append(Skipped(step=step.step, grad_norm=norm, norm_limit=step.norm_limit))

    def check(self, engine: Engine) -> list[Skipped]:
        """Look, and give what was skipped since the last time."""
        self.look(engine)
        skipped, self.skipped = self.skipped, []
        return skipped

    def longest_wait_s(self, engine: Engine) -> float:
        """For batches since the last time, by the rank that waited longest."""
        waited = torch.zeros(engine.world_size, dtype=torch.float32, device=engine.device)
        waited[engine.rank], self.waited_s = self.waited_s, 0.0
        return engine.all_reduce_sum(waited).max().item()


def _is_overflow(engine: Engine, step: StepResult) -> bool:
    """Whether fp16's loss scale was too high, which is ordinary: it is lowered and training goes on."""
    scale = engine.loss_scale()
    if scale is None or scale < 1:
        return False
    return math.isfinite(engine.all_reduce_sum(step.loss_sum.clone()).item())


def _divergence(engine: Engine, step: StepResult) -> TrainingError:
    """The error that every rank raises, from what each knows."""
    losses = [loss.item() for loss in step.losses]
    found = [(loss, step._named(rows)) for loss, rows in zip(losses, step.rows) if not math.isfinite(loss)]
    by_rank = {rank: found for rank, found in enumerate(engine.gather_objects(found)) if found}
    if by_rank:
        what = "The loss"
        where = "; ".join(
            f"rank {rank}: {' and '.join(f'{loss} on {rows}' for loss, rows in found)}" for rank, found in by_rank.items()
        )
    else:
        what = "The gradient"
        where = f"every loss is finite; {step.rows_of_ranks(engine)}"
    scale = engine.loss_scale()
    error = TrainingError(
        f"{what} of step {step.step} is not finite ({where}). Learning rate {step.learning_rate:g}"
        f"{f', loss scale {scale:g}' if scale is not None else ''}. The weights were not updated with it. Look at these rows, "
        f"lower training.learning_rate or training.max_grad_norm, or train in bf16 rather than fp16."
    )
    error.bad_step = step.step
    return error


def _numbered(rows: Iterable[int]) -> str:
    return f"rows {', '.join(map(str, rows))}"


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of what is random inside a step (dropout, noise): a function, so that a resumed run draws what the unbroken drew."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:8]) >> 1


def training_steps(
    engine: Engine,
    batches_of: Callable[[int], Sequence[Batch]],
    loss_sum: LossSum,
    learning_rate: Callable[[int], float],
    *,
    start: int,
    stop: int,
    seed: int,
    named: NameRows = _numbered,
    norm_limit: Callable[[], float] = lambda: math.inf,
    part_sum: Callable[[], Tensor | None] = lambda: None,
) -> Iterator[StepResult]:
    """Make optimizer steps, one per iteration.

    Args:
        engine: the model in training.
        batches_of: this rank's micro-batches of a step, the same number on every rank.
        loss_sum: loss of a micro-batch.
        learning_rate: rate of a step, before the factors of parameter groups.
        start: steps already made.
        stop: steps made in the end.
        seed: of dropout and noise.
        named: what an error calls the rows of a micro-batch.
        norm_limit: asked before every update for the largest norm that is updated with; the same on every rank.
        part_sum: asked after every step for what a part of the losses, which is told by itself, has added since the step before.

    Raises:
        TrainingError: on every rank, for a loss or gradient that is not finite; its step has not updated the weights. On a CPU
            the step itself raises, on a GPU the next `StepResult.read`.
    """
    unread = _Unread()
    engine.model.train()
    for step in range(start, stop):
        torch.manual_seed(step_seed(seed, step, engine.rank))
        rate = learning_rate(step)
        losses, rows, num_targets, weight = [], [], 0, 1.0
        asked_at = time.perf_counter()
        batches = batches_of(step)
        if _is_idle(engine.device):
            unread.waited_s += time.perf_counter() - asked_at
        for index, batch in enumerate(batches, 1):
            batch = batch.to(engine.device)
            with engine.autocast():
                loss = loss_sum(engine.module, batch)
            num_targets, weight = batch.num_targets_in_step, batch.step_weight
            engine.backward(loss / weight, is_last=index == len(batches))
            losses.append(loss.detach())
            rows.append(batch.rows)
        limit = norm_limit()
        grad_norm = engine.step(rate, limit)
        result = StepResult(
            step=step + 1,
            num_targets=num_targets,
            weight=weight,
            learning_rate=rate,
            loss_sum=torch.stack(losses).sum(),
            grad_norm=grad_norm,
            norm_limit=limit,
            losses=losses,
            rows=rows,
            part_sum=part_sum(),
            _named=named,
            _unread=unread,
        )
        unread.steps.append(result)
        if engine.device.type == "cpu":
            unread.look(engine)
        yield result


def _is_idle(device: torch.device) -> bool:
    """Whether a device has computed all that it was given; asked, and not waited for."""
    return device.type != "cuda" or torch.cuda.current_stream(device).query()


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationLoss:
    loss: float
    """Mean over all targets of all ranks, each counted by its weight."""
    num_targets: int
    weight: float
    """Sum of their weights."""


def evaluate_loss(engine: Engine, batches: Iterable[Batch], loss_sum: LossSum) -> EvaluationLoss:
    """Mean loss per target over the batches of all ranks. Every rank calls it, with the same number of batches."""
    loss = torch.zeros((), dtype=torch.float64, device=engine.device)
    weight, num_targets = torch.zeros_like(loss), 0
    with evaluating(engine.model), torch.no_grad():
        for batch in batches:
            batch = batch.to(engine.device)
            with engine.autocast():
                loss += loss_sum(engine.module, batch)
            num_targets += batch.num_targets
            weight += batch.num_targets if batch.target_weights is None else batch.target_weights.double().sum()
    sums = engine.all_reduce_sum(torch.stack([loss, weight, torch.full_like(loss, num_targets)]))
    loss_of_all, weight_of_all, targets_of_all = sums.tolist()
    return EvaluationLoss(
        loss=loss_of_all / weight_of_all if weight_of_all else math.nan, num_targets=int(targets_of_all), weight=weight_of_all
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context in which dropout is off."""
    model.eval()
    for module in model.modules():
        # In eval mode, bitsandbytes repacks a 4-bit weight in place for CPU inference, which a shard does not survive.
        # Asked of what it holds itself: what PEFT wraps around rows of tokens would put the whole matrix together.
        if hasattr(module._parameters.get("weight"), "quant_state"):
            module.training = True
    try:
        yield
    finally:
        model.train()
