"""One attempt: a Ray Train worker group that does a task for a plan, and what ended it where it failed."""

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

import ray
from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.callback import RayTrainCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytune.launch.attempts.attempts import Failure
from raytune.launch.attempts.causes import first_failure
from raytune.launch.attempts.worker_group import Controller, FixedGroup, RunOf, release_placement_groups
from raytune.launch.cluster.forking import load_for_ranks
from raytune.launch.cluster.loopback import LoopbackTorchConfig
from raytune.launch.cluster.ray_storage import ray_storage
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import RunFolder
from raytune.training.worker import work

INTERRUPT_TIMEOUT_S = 20.0
CHECK_EVERY_S = 0.5


def fit(
    plan: RunPlan, attempt: int, check: Callable[[], None], task: str = "train", request: Mapping[str, Any] | None = None
) -> Failure | None:
    """Train `plan`, or do another task for it, on a worker group of its own; returns when every worker has ended.

    Ray Train's own retries stay off: it would repeat what cannot succeed, and does not retry a worker lost while starting. Its
    checkpoint index stays empty for the same reason that each attempt has a name of its own: our commits decide where to resume.

    Args:
        check: called all the time; what it raises ends the workers, and is raised here.
        task, request: what each worker does: a name in `training.tasks.TASKS`, and what that is asked.

    Returns:
        None if the task was done to its end, else the first thing that went wrong.
    """
    folder = RunFolder(plan.storage, plan.name)
    cluster = plan.cluster
    trainer = _Trainer(
        work,
        train_loop_config={"plan": plan.model_dump_json(), "attempt": attempt, "task": task, "request": dict(request or {})},
        torch_config=LoopbackTorchConfig(
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
            **ray_storage(folder.ray),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            callbacks=[RunOf(folder, attempt)],  # pyright: ignore[reportArgumentType]  (Ray takes its own kinds too)
        ),
    )
    if plan.engine.kind != "plain":
        load_for_ranks("raytune.training.engines.zero_engine")
    try:
        error = _ended_with(trainer, check)
    finally:
        release_placement_groups(folder)
    return None if error is None else first_failure(folder, attempt, error)


class _Trainer(TorchTrainer):
    """A trainer whose controller another thread can end. Ray 2.60 ends it for a Ctrl-C in the main thread only, and the process
    with it."""

    _controller: Any = None
    _is_ended = False

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        # Each of the two would start an actor, a process of some seconds. One hands out Ray's data sets, of which a run has none;
        # the other asks the dashboard, which a cluster need not have, whether to free the placement groups of a controller that
        # died: `release_placement_groups` does that, and Ray itself where the driver died too.
        needless = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, needless)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        # As in Ray, but that the handle is kept, and that controller and scaling policy are ours.
        arguments["scaling_policy"] = FixedGroup(self.scaling_config)  # pyright: ignore[reportArgumentType]
        self._controller = (
            ray.remote(Controller)
            .options(
                num_cpus=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False),
                runtime_env={"env_vars": {RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR: "0"} | get_env_vars_to_propagate()},
            )
            .remote(**arguments)
        )
        if self._is_ended:
            self.end()
        ray.get(self._controller.run.remote())
        return ray.get(self._controller.get_result.remote())

    def end(self) -> None:
        """End workers and controller, whoever opened the connection to the cluster: it may serve others too."""
        self._is_ended = True
        if self._controller is None:
            return
        with suppress(RayError):  # it answers by ending
            ray.get(self._controller.abort.remote(), timeout=INTERRUPT_TIMEOUT_S)
        with suppress(RayError, ValueError):
            ray.kill(self._controller)


def _ended_with(trainer: _Trainer, check: Callable[[], None]) -> Exception | None:
    """What `fit` raised: TrainingFailedError, or whatever Ray raises when its controller or a bucket is lost.

    It runs in a thread of its own, because a signal that arrives while the main thread is inside Ray may be lost or end it.
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
        while True:
            with suppress(Empty):
                return outcome.get(timeout=CHECK_EVERY_S)
            check()
    except BaseException:
        trainer.end()
        thread.join(timeout=INTERRUPT_TIMEOUT_S)
        raise
