"""The Ray side of one worker: from the plan's JSON to its task, and a record of whatever ends it."""

import os
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import ray.train
import ray.train.torch

from raytune.missing import TAKEN_ALONG, left_out, missing_package
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import RunFolder
from raytune.storage import write_json
from raytune.training.output import output_kept
from raytune.training.whereabouts import findable


def work(config: dict) -> None:
    """Do a task on this rank; what Ray Train calls once per worker and attempt.

    Args:
        config: `{"plan": RunPlan as JSON, "attempt": number of this try, "task": one of `tasks.TASKS`, "request": of the task}`.
    """
    plan = RunPlan.model_validate_json(config["plan"])
    context = ray.train.get_context()
    with recorded(plan, config["attempt"], context.get_world_rank()):
        with left_out(*TAKEN_ALONG):
            from raytune.training.start.start import Worker
            from raytune.training.tasks import perform

            if plan.engine.kind != "plain":
                import raytune.training.engines.zero_engine  # noqa: F401

        worker = Worker(
            rank=context.get_world_rank(),
            world_size=context.get_world_size(),
            device_index=_device_index(plan),
            attempt=config["attempt"],
            report=ray.train.report,
        )
        perform(config["task"], plan, worker, config["request"])


@contextmanager
def recorded(plan: RunPlan, attempt: int, rank: int) -> Iterator[None]:
    """Context in which a rank works: without noise, its output kept, and with a record of whatever ends it."""
    _quiet()
    with output_kept(RunFolder(plan.storage, plan.name), attempt, rank), _failure_recorded(plan, attempt, rank), findable():
        yield


@contextmanager
def _failure_recorded(plan: RunPlan, attempt: int, rank: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        # Survivors of a dead rank fail too, a moment later: the driver shows the earliest record first.
        with suppress(Exception):  # what made the run fail may be the storage itself
            write_json(
                RunFolder(plan.storage, plan.name).failure(attempt, rank),
                {
                    "rank": rank,
                    "node": os.uname().nodename,
                    "time": time.time(),
                    "kind": type(error).__name__,
                    "message": missing_package(error) if isinstance(error, ModuleNotFoundError) else str(error),
                    "traceback": traceback.format_exc(),
                },
            )
        raise


def _device_index(plan: RunPlan) -> int:
    """Index of this worker's device among those of its node that the process sees: Ray shows each worker all of them."""
    if plan.cluster.device == "cpu":
        return ray.train.get_context().get_local_rank()
    return ray.train.torch.get_device().index


def _quiet() -> None:
    """Silence what repeats on every step and rank and says nothing about the run."""
    # torch 2.13 deprecates collectives that DeepSpeed 0.19 still calls.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed")
