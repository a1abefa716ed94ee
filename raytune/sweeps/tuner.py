"""Ray Tune at work on a sweep: from a plan and a ledger to trials that have ended."""

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from ray import tune
from ray.exceptions import RayError
from ray.tune.error import TuneError
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.logger import JsonLoggerCallback
from ray.tune.stopper import NoopStopper, Stopper

from raytune.errors import ClusterError, RaytuneError
from raytune.launch.attempts.worker_group import release_placement_groups
from raytune.launch.cluster.ray_storage import ray_storage
from raytune.launch.state.record import RunRecord
from raytune.plan.run_plan import ClusterPlan
from raytune.run_folder import SweepFolder
from raytune.storage import remove_folder, write_bytes
from raytune.sweeps.board import Board
from raytune.sweeps.ledger import Ended, Ledger, end_of
from raytune.sweeps.schedule import make_scheduler
from raytune.sweeps.search import TRIAL, TrialSearch
from raytune.sweeps.sweep_plan import SweepPlan
from raytune.sweeps.trainable import TrialActor

HEAD_NODE = "node:__internal_head__"
"""Resource of which every head node has one: a driver that is placed by it takes no CPU that a worker waits for."""
SHARE = 0.001
"""Of that resource, for a trial: so many that several sweeps may use a cluster at once."""
CHECK_EVERY_S = 0.5
STOP_TIMEOUT_S = 30.0
ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the one that ResultGrid reads is asked for; TensorBoard's is slow to import
    "RAY_AIR_NEW_OUTPUT": "0",
}


def run_trials(
    plan: SweepPlan,
    folder: SweepFolder,
    cluster: ClusterPlan,
    search: TrialSearch,
    ledger: Ledger,
    board: Board,
    check: Callable[[], None],
) -> None:
    """Run trials until the search has no more and all have ended.

    Args:
        cluster: of any trial: what its workers get.
        check: called all the time; what it raises ends the sweep, and is raised here.

    Raises:
        ClusterError: if Ray lost what the sweep itself needs.
    """
    os.environ.update(ENVIRONMENT)
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(plan.num_trials if plan.waits_for_others else plan.slots)
    stop = _Stop(folder.stopped(ledger.command))
    ending = _Ending(plan, folder, ledger, board, stop)
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(TrialActor, sweep=plan, folder=folder, stop_file=stop.file),
            tune.PlacementGroupFactory(bundles_of(plan, cluster)),
        ),
        tune_config=tune.TuneConfig(
            metric=plan.metric,
            mode=plan.mode,
            search_alg=search,
            scheduler=make_scheduler(plan, ledger, board),
            num_samples=-1,  # the search says when it has no more
            max_concurrent_trials=None if plan.waits_for_others else plan.slots,
            reuse_actors=True,
            trial_name_creator=_name_of,
            trial_dirname_creator=_name_of,
        ),
        run_config=tune.RunConfig(
            name=f"command-{ledger.command}",
            **ray_storage(folder.tune),
            callbacks=[JsonLoggerCallback(), ending],
            stop=stop,
            # Actors that die with their node; what fails inside a trial is retried there, or not.
            failure_config=tune.FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )
    try:
        _in_thread(tuner.fit, check, stop.set)
    except (RayError, TuneError) as error:
        raise ClusterError(
            f"Ray ended the sweep: {str(error).strip()}. The same command continues it; trials that have ended stay."
        ) from error
    ending.drop_checkpoints()


def bundles_of(plan: SweepPlan, cluster: ClusterPlan) -> list[dict[str, float]]:
    """What Tune sets aside for a trial: a worker's resources where it trains in its actor, and in any case a share of the head
    node, where its driver runs. Where trials wait for others, that share lets no more than `plan.slots` run at once."""
    share = {HEAD_NODE: int(1e4 / plan.slots) / 1e4 if plan.waits_for_others else SHARE}
    of_worker = {"CPU": cluster.cpus_per_worker, "GPU": float(cluster.gpus_per_worker)}
    needed = {name: amount for name, amount in of_worker.items() if amount}
    return [share] if plan.workers > 1 or not needed else [needed, share]


def _name_of(trial: TuneTrial) -> str:
    return trial.config[TRIAL]


class _Stop(Stopper):
    """Lets this process stop all trials, which then end as on an interrupt of their own.

    Tune hears it at once, an actor only after its present step, whose result may be an hour away: it looks for a file meanwhile.
    """

    def __init__(self, file: str) -> None:
        self.file, self.is_set = file, False

    def set(self) -> None:
        self.is_set = True
        with suppress(RaytuneError):  # storage that is away: trials end with this process
            write_bytes(self.file, b"")

    def __reduce__(self) -> tuple:
        return NoopStopper, ()  # as for schedulers (schedule.py)

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.is_set


class _Ending(tune.Callback):
    """Notes how trials begin and end, and takes away what they no longer need."""

    def __init__(self, plan: SweepPlan, folder: SweepFolder, ledger: Ledger, board: Board, stop: _Stop) -> None:
        self._plan, self._folder, self._ledger, self._board, self._stop = plan, folder, ledger, board, stop
        self._to_drop: set[str] = set()

    def __reduce__(self) -> tuple:
        return tune.Callback, ()  # as for schedulers (schedule.py)

    def on_trial_start(self, iteration: int, trials: Sequence[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        self._board.active(trial.config[TRIAL], "running")
        self.drop_checkpoints()

    def on_trial_complete(self, iteration: int, trials: Sequence[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        if self._stop.is_set:
            return
        name = trial.config[TRIAL]
        self._board.active(name, "ended")
        if name not in self._ledger.known.ends:
            self._ledger.end(name, self._end_of(name))
        end = self._ledger.known.ends[name]
        if end.state != "finished" and end.is_final:
            self._to_drop.add(name)

    def drop_checkpoints(self) -> None:
        """Remove the state of trials that will not go on, once their workers have ended too, which is a little later. What they
        measured stays."""
        for name in sorted(self._to_drop):
            run = self._folder.trial(name)
            with suppress(RaytuneError):  # storage that is away for a moment: the next time
                record = RunRecord.read(run)
                if record is None or record.state != "running":
                    remove_folder(run.checkpoints, run.path)
                    self._to_drop.remove(name)

    def _end_of(self, name: str) -> Ended:
        """A trial that ended without a word about it in the ledger: decided, but its driver was killed before it noted the end;
        trained to its end; or it has waited in Hyperband for nothing."""
        against = self._ledger.known.verdict_on(name)
        if against is not None:
            return end_of(against, self._plan.metric)
        record = RunRecord.read(self._folder.trial(name))
        if record is not None and record.state == "finished":
            return Ended(state="finished")
        return Ended(state="stopped", cause=f"after step {self._board.of(name).step}, where it had waited for others")

    def on_trial_error(self, iteration: int, trials: Sequence[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        if self._stop.is_set:
            return
        name = trial.config[TRIAL]
        self._board.active(name, "ended")
        release_placement_groups(self._folder.trial(name))
        if name not in self._ledger.known.ends:
            self._ledger.end(name, Ended(state="failed", cause=_cause(trial), is_final=False))

    def on_trial_recover(self, iteration: int, trials: Sequence[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        release_placement_groups(self._folder.trial(trial.config[TRIAL]))


def _cause(trial: TuneTrial) -> str:
    """What Tune says of an actor that died without a word of its own."""
    lines = str(trial.get_error() or "its process died").strip().splitlines()
    return lines[-1][:500]


def _in_thread(work: Callable[[], object], check: Callable[[], None], stop: Callable[[], None]) -> None:
    """Do something in a thread, so that a signal reaches this one. A signal, and what `check` raises, stops it first."""
    outcome: SimpleQueue[BaseException | None] = SimpleQueue()

    def run() -> None:
        try:
            work()
            outcome.put(None)
        except BaseException as error:
            outcome.put(error)

    thread = threading.Thread(target=run, name="tune", daemon=True)
    thread.start()
    try:
        error = _next_outcome(outcome, check)
    except BaseException:
        stop()
        thread.join(STOP_TIMEOUT_S)
        raise
    if error is not None:
        raise error


def _next_outcome(outcome: SimpleQueue[BaseException | None], check: Callable[[], None]) -> BaseException | None:
    while True:
        with suppress(Empty):
            return outcome.get(timeout=CHECK_EVERY_S)
        check()
