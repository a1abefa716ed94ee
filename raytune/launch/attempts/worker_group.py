"""Ray Train's controller and worker group, as far as they do more here.

They write into the run folder what they hold of the cluster as soon as they hold it, and which rank is where; free it when a
start fails; leave alone a rank that does not answer because it is at work; and when a rank is lost, ask the others where they
are.
"""

from contextlib import suppress
from dataclasses import asdict
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group.poll import PollTask, WorkerStatus
from ray.train.v2._internal.util import time_monotonic
from ray.util.placement_group import PlacementGroup, PlacementGroupID, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytune.errors import RaytuneError
from raytune.launch.attempts.liveness import is_at_work
from raytune.launch.attempts.no_barrier import without_barrier
from raytune.launch.attempts.places import Place, write_places
from raytune.run_folder import RunFolder
from raytune.storage import list_folder, remove_folder, write_json
from raytune.training.whereabouts import whereabouts

LOOK_TIMEOUT_S = 25.0
"""For a look at a process that does not answer, by another process of its node, which may have to start for that."""
ASK_TIMEOUT_S = 5.0


class RunOf(WorkerGroupCallback):
    """Tells a worker group whose it is; Ray hands callbacks on to it."""

    def __init__(self, folder: RunFolder, attempt: int) -> None:
        self.folder, self.attempt = folder, attempt


class _Group(WorkerGroup):
    @property
    def _run(self) -> RunOf:
        return next(callback for callback in self._callbacks if isinstance(callback, RunOf))

    def _start(self) -> None:
        try:
            super()._start()
        except BaseException:
            if self.has_started():  # what fails later than this, the process group for one, Ray does not clean up after
                self._worker_group_state.shutdown()  # pyright: ignore[reportOptionalMemberAccess]
                self._clear_state()
            raise

    def _create_placement_group(self, *arguments: Any, **named: Any) -> Any:
        handle = super()._create_placement_group(*arguments, **named)
        # Ray frees a placement group when the job of its creator ends; before that, where a controller dies with its driver, only
        # a helper does that asks the dashboard, which a cluster need not have (https://github.com/ray-project/ray/pull/58515).
        try:
            write_json(f"{self._run.folder.placement_groups}/{handle.placement_group.id.hex()}.json", {})
        except BaseException:
            handle.shutdown()
            raise
        return handle

    def _init_train_context(self, workers: Any, sync_actor: Any) -> None:
        super()._init_train_context(workers, sync_actor)
        places = {
            worker.distributed_context.world_rank: Place(
                host=worker.metadata.hostname,
                address=worker.metadata.node_ip,
                node_id=worker.metadata.node_id,
                pid=worker.metadata.pid,
            )
            for worker in workers
        }
        write_places(self._run.folder, self._run.attempt, places)

    def _poll_workers_and_collect_errors(self, timeout: float | None) -> list[WorkerStatus]:
        statuses = super()._poll_workers_and_collect_errors(timeout)
        for rank, status in enumerate(statuses):
            if isinstance(status.error, WorkerHealthCheckTimeoutError) and _is_at_work(self.get_workers()[rank].metadata):
                statuses[rank] = WorkerStatus(running=True)
                task = self._world_rank_to_ongoing_poll[rank].task
                self._world_rank_to_ongoing_poll[rank] = PollTask(start_time=time_monotonic(), task=task)
        return statuses

    def shutdown(self) -> None:
        status = self.get_latest_poll_status()
        if self.has_started() and status is not None and status.errors:
            self._ask_around()
        super().shutdown()

    def _ask_around(self) -> None:
        """Write down where each rank is that still answers; null: it does, and trains no more."""
        asked: dict[Any, int] = {worker.execute_async(whereabouts): rank for rank, worker in enumerate(self.get_workers())}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ASK_TIMEOUT_S)
        found = {}
        for task in answered:
            with suppress(RayError):  # the lost ones
                where = ray.get(task)
                found[str(asked[task])] = None if where is None else asdict(where)
        with suppress(RaytuneError):  # what made the run fail may be the storage itself
            write_json(self._run.folder.whereabouts(self._run.attempt), found)


class Controller(TrainController):
    worker_group_cls = _Group

    def __init__(self, *arguments: Any, **named: Any) -> None:
        without_barrier()
        super().__init__(*arguments, **named)


class FixedGroup(FixedScalingPolicy):
    """A worker group of one size, whose placement group is all that an autoscaler is asked for.

    Ray's own policy asks a second time, through an actor that data sets and runs share: a process for what is known.
    """

    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    async def before_controller_shutdown(self) -> None:
        pass

    def before_controller_abort(self) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


def _is_at_work(metadata: Any) -> bool:
    """Whether a worker's process is at work, as far as its node says so in time."""
    on_its_node = NodeAffinitySchedulingStrategy(metadata.node_id, soft=False)
    look = ray.remote(num_cpus=0, max_retries=0)(is_at_work).options(scheduling_strategy=on_its_node).remote(metadata.pid)
    try:
        return ray.get(look, timeout=LOOK_TIMEOUT_S)
    except RayError:  # a time-out is one too
        return False


def release_placement_groups(folder: RunFolder) -> None:
    """Free what worker groups of a run still hold; its controllers must have ended."""
    for name in list_folder(folder.placement_groups):
        group = PlacementGroupID(bytes.fromhex(name.removesuffix(".json")))
        remove_placement_group(PlacementGroup(group))
        remove_folder(f"{folder.placement_groups}/{name}", folder.placement_groups)
