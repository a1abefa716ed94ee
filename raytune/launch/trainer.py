"""One attempt: a Ray Train worker group that trains a plan, and what ended it where it failed."""

import threading
from queue import SimpleQueue

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from raytune.launch.attempts import WORKER_DIED, Failure
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import RunFolder
from raytune.storage import list_folder, read_json
from raytune.training.worker import train_worker

INTERRUPT_TIMEOUT_S = 20.0


def fit(plan: RunPlan, attempt: int) -> Failure | None:
    """Train `plan` on a worker group of its own; returns when every worker has ended.

    Ray Train's own retries stay off: it would repeat what cannot succeed, and does not retry a worker lost while starting. Its
    checkpoint index stays empty for the same reason that each attempt has a name of its own: our commits decide where to resume.

    Returns:
        None if the plan was trained to its end, else the first thing that went wrong.
    """
    folder = RunFolder(plan.storage, plan.name)
    cluster = plan.cluster
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"plan": plan.model_dump_json(), "attempt": attempt},
        torch_config=TorchConfig(
            backend="nccl" if cluster.device == "cuda" else "gloo", timeout_s=int(cluster.collective_timeout_s)
        ),
        scaling_config=ScalingConfig(
            num_workers=plan.batch.workers,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker={"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker},
            placement_strategy=cluster.placement.upper(),
        ),
        run_config=RunConfig(
            name=f"attempt-{attempt}",
            storage_path=folder.ray,
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
        ),
    )
    error = _ended_with(trainer)
    return None if error is None else _first_failure(folder, attempt, error)


def _ended_with(trainer: TorchTrainer) -> Exception | None:
    """What `fit` raised: TrainingFailedError, or whatever Ray raises when its controller or a bucket is lost.

    It runs in a thread of its own, because in the main thread Ray takes over Ctrl-C and ends this process without a word.
    """
    outcome: SimpleQueue[Exception | None] = SimpleQueue()

    def run() -> None:
        try:
            trainer.fit()
            outcome.put(None)
        except BaseException as error:
            outcome.put(error if isinstance(error, Exception) else RuntimeError(f"Ray ended with {error!r}"))

    thread = threading.Thread(target=run, name="fit", daemon=True)
    thread.start()
    try:
        return outcome.get()
    except BaseException:
        # Controller and workers live as long as their driver is connected, on whichever cluster.
        ray.shutdown()
        thread.join(timeout=INTERRUPT_TIMEOUT_S)
        raise


def _first_failure(folder: RunFolder, attempt: int, error: Exception) -> Failure:
    """The earliest of the workers' own records; a rank that Ray lost without one comes before the survivors it took along."""
    prefix = f"attempt-{attempt}."
    records = sorted(
        (read_json(f"{folder.failures}/{name}") for name in list_folder(folder.failures) if name.startswith(prefix)),
        key=lambda record: record["time"],
    )
    ranks = tuple(record["rank"] for record in records)
    lost = [rank for rank in getattr(error, "worker_failures", {}) if rank not in ranks]
    if lost or not records:
        cause = error.worker_failures[lost[0]] if lost else getattr(error, "controller_failure", error)  # pyright: ignore[reportAttributeAccessIssue]
        return Failure(
            attempt=attempt,
            rank=lost[0] if lost else None,
            node=None,
            kind=WORKER_DIED,
            message=_in_one_line(str(cause)),
            traceback=str(error),
            collateral=ranks,
        )
    first = records[0]
    return Failure(
        attempt=attempt,
        rank=first["rank"],
        node=first["node"],
        kind=first["kind"],
        message=first["message"],
        traceback=first["traceback"],
        collateral=ranks[1:],
    )


def _in_one_line(message: str) -> str:
    """Ray's report of a dead process without its addresses and advice."""
    for line in message.splitlines():
        if "Worker exit detail:" in line:
            return "the process died: " + line.split("Worker exit detail:")[1].split("Some common causes")[0].strip()
    return message.strip().splitlines()[0] if message.strip() else "the process died without a message"
