"""What a run writes down while it trains: rank 0's lines of metrics.jsonl. Reading a step is collective, so all take part."""

import resource
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Self

import torch

from raytune.metrics.history import History
from raytune.metrics.points import RollBack
from raytune.metrics.writer import MetricsWriter
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import RunFolder
from raytune.training.engines.engine import Engine
from raytune.training.steps.loop import StepNumbers, StepResult


class Recorder:
    """Turns steps and evaluations into metrics.

    Names: `train/loss` (nats per target of the step's global batch), `train/grad_norm` (before clipping), `train/learning_rate`,
    `train/epoch`, `train/targets_per_s` and `train/tokens_per_s` (over all workers), `train/memory_bytes` (peak of this rank),
    `train/wait_s` (of a step, in which the rank that waits longest has nothing to do but to wait for its batches),
    `train/skipped` (updates that the divergence guard has skipped since the line before), `train/penalty` (on weights, where
    there is one: added to the loss, and not in `train/loss`), `train/distillation` (the teacher's part of `train/loss`, where
    there is one: weight * temperature^2 * KL), `validation/...`; of suites that are measured while training goes on
    `SUITE/METRIC`. Of streamed rows there is no `train/epoch`.

    Args:
        roll_back: the way back that led to `resumed_step`, if one did.
        told: hears on every rank what is measured after a step, as it is written down.
    """

    def __init__(
        self,
        plan: RunPlan,
        engine: Engine,
        folder: RunFolder,
        *,
        attempt: int,
        resumed_step: int,
        roll_back: RollBack | None = None,
        told: Callable[[int, Mapping[str, float]], None] = lambda step, values: None,
    ) -> None:
        self._plan, self._engine, self._told = plan, engine, told
        self._writer = None
        if engine.rank == 0:
            self._writer = MetricsWriter(folder.metrics, attempt=attempt, resumed_step=resumed_step, roll_back=roll_back)
        self._last_step, self._last_s = resumed_step, time.perf_counter()
        self._step_seconds: list[float] = []
        self.metrics: dict[str, float] = History.read(folder.metrics).as_of(resumed_step) if self._writer else {}
        """The newest value of every metric, on rank 0 with those of the steps before this attempt."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._writer:
            self._writer.__exit__(kind, *error)

    def step(self, result: StepResult) -> StepNumbers:
        """Wait for a step and write it down; what is known of it then. Every rank calls it.

        Raises:
            TrainingError: if a loss or gradient since the last call was not finite.
        """
        numbers = result.read(self._engine)
        now = time.perf_counter()
        num_steps = result.step - self._last_step
        steps_per_s = num_steps / (now - self._last_s)
        self._step_seconds.append(1 / steps_per_s)
        self._last_step, self._last_s = result.step, now
        batch, store = self._plan.batch.global_batch_size, self._plan.data.train
        values = {
            "train/loss": numbers.loss,
            "train/grad_norm": numbers.grad_norm,
            "train/learning_rate": result.learning_rate,
            "train/targets_per_s": result.num_targets * steps_per_s,
            "train/tokens_per_s": store.num_tokens / store.num_rows * batch * steps_per_s,
            "train/wait_s": numbers.waited_s / num_steps,
            "train/memory_bytes": float(peak_memory_bytes(self._engine.device)),
        }
        if self._plan.data.stream is None:
            values["train/epoch"] = min(result.step * batch, self._plan.optimization.num_rows) / store.num_rows
        if numbers.loss_scale is not None:
            values |= {"train/loss_scale": numbers.loss_scale, "train/updated": float(numbers.updated)}
        if self._plan.skips_spikes:
            values["train/skipped"] = float(len(numbers.skipped))
        if numbers.penalty is not None:
            values["train/penalty"] = numbers.penalty
        if numbers.distillation is not None:
            values["train/distillation"] = numbers.distillation
        self._write(result.step, values)
        return numbers

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Write down what the model was worth after a step; the time it took counts for no step."""
        self._write(step, values)
        self._last_s = time.perf_counter()

    def late(self, step: int, values: Mapping[str, float]) -> None:
        """Write down on rank 0 what the model was worth after a step that lies behind."""
        self._write(step, values)

    @property
    def median_step_s(self) -> float | None:
        """Seconds of a step of this attempt, the median over its logged intervals; None if it made none."""
        return statistics.median(self._step_seconds) if self._step_seconds else None

    def flush(self) -> None:
        """Bring every line to the storage; due before a checkpoint makes its steps part of the history."""
        if self._writer:
            self._writer.flush()

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        self.metrics |= values
        self._told(step, values)
        if self._writer:
            self._writer.write(step, values)


def peak_memory_bytes(device: torch.device) -> int:
    """Most bytes that this process held: by PyTorch's allocator on a GPU, resident in RAM otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
