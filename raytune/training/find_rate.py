"""The learning-rate range test on every rank: a run's own steps from its start, each with the next rate of a range.

Engine, rows, their order, what is random in a step and the factors of parameter groups are those of the run; only the rate is
not. The loss of a step is measured before its update, so it shows the rates of the steps before it.
"""

import math
from collections.abc import Mapping
from typing import Any

from raytune.errors import TrainingError
from raytune.metrics.json_numbers import encode_number
from raytune.plan.rates.rate_range import RateRange, reason_to_stop
from raytune.storage import write_json
from raytune.training.run import batches_of_run
from raytune.training.start.importance import hold_for_once
from raytune.training.start.rows import training_rows
from raytune.training.start.start import Started
from raytune.training.steps.loop import training_steps
from raytune.training.steps.recorder import Recorder


def find_rate(started: Started, request: Mapping[str, Any]) -> None:
    """Try the rates of a range to its end, or until the loss explodes; rank 0 writes the losses into the plan's folder.

    Every rank calls it, and all end after the same step. No weights are saved. A loss that is not finite is the last one, as NaN,
    and `failure` says where it was.

    Args:
        request: `range`, a `RateRange` as JSON.

    Raises:
        TrainingError: on every rank alike, if the loss is not finite before any rate was tried.
    """
    plan, worker, engine, tried = started.plan, started.worker, started.engine, RateRange.model_validate(request["range"])
    hold_for_once(started)
    losses: list[float] = []
    failure: str | None = None
    with (
        training_rows(plan) as rows,
        Recorder(plan, engine, started.folder, attempt=worker.attempt, resumed_step=0) as recorder,
    ):
        try:
            for result in training_steps(
                engine,
                batches_of_run(plan, rows, worker),
                started.loss,
                tried.rate,
                start=0,
                stop=tried.num_steps,
                seed=plan.seed,
                named=rows.named,
                part_sum=started.loss.take_divergence,
            ):
                worker.check()
                recorder.step(result)
                # Rank 0's sum counts, so that no rank goes on alone where another one's was rounded otherwise.
                losses.append(engine.gather_objects(recorder.metrics["train/loss"])[0])
                if reason_to_stop(losses, tried):
                    break
        except TrainingError as error:
            if not losses:
                raise TrainingError(f"{error} No rate was tried before it: rows, base or precision are the cause.") from error
            losses.append(math.nan)  # what ends a run is an answer here
            failure = str(error)
    if engine.rank == 0:
        write_json(started.folder.tried_losses, {"losses": [encode_number(loss) for loss in losses], "failure": failure})
