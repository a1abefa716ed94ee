"""Ray Tune at work on a sweep: from a plan and a ledger to trials that have ended."""

import math
import os
import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.logger import JsonLoggerCallback

from raytune.launch.record import RunRecord
from raytune.launch.trainer import release_placement_groups
from raytune.plan.run_plan import ClusterPlan
from raytune.run_folder import SweepFolder
from raytune.storage import remove_folder
from raytune.sweeps.board import Board
from raytune.sweeps.ledger import Ended, Ledger
from raytune.sweeps.schedule import make_scheduler
from raytune.sweeps.search import TRIAL, TrialSearch
from raytune.sweeps.sweep_plan import SweepPlan
from raytune.sweeps.trainable import TrialActor

HEAD_NODE = "node:__internal_head__"
"""Resource of which every head node has one: a driver that is placed by it takes no CPU that a worker waits for."""
CHECK_EVERY_S = 0.5
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
    """
    os.environ.update(ENVIRONMENT)
    # Hyperband fills its groups with trials that have not started yet; others draw one when there is room for it.
    waits_for_others = plan.stopping == "hyperband"
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(plan.num_trials if waits_for_others else plan.slots)
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(TrialActor, sweep=plan, folder=folder), tune.PlacementGroupFactory(bundles_of(plan, cluster))
        ),
        tune_config=tune.TuneConfig(
            metric=plan.metric,
            mode=plan.mode,
            search_alg=search,
            scheduler=make_scheduler(plan, ledger, board),
            num_samples=-1,  # the search says when it has no more
            max_concurrent_trials=None if waits_for_others else plan.slots,
            reuse_actors=True,
            trial_name_creator=_name_of,
            trial_dirname_creator=_name_of,
        ),
        run_config=tune.RunConfig(
            name=f"command-{ledger.command}",
            storage_path=folder.tune,
            callbacks=[JsonLoggerCallback(), _Ending(folder, ledger, board)],
            # Actors that die with their node; what fails inside a trial is retried there, or not.
            failure_config=tune.FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )
    _in_thread(tuner.fit, check)


def bundles_of(plan: SweepPlan, cluster: ClusterPlan) -> list[dict[str, float]]:
    """What Tune sets aside for a trial: a worker's resources where it trains in its actor, and in any case a share of the head
    node, by which no more than `plan.slots` trials run at once."""
    share = {HEAD_NODE: math.floor(1e4 / plan.slots) / 1e4}
    of_worker = {"CPU": cluster.cpus_per_worker, "GPU": float(cluster.gpus_per_worker)}
    needed = {name: amount for name, amount in of_worker.items() if amount}
    return [share] if plan.workers > 1 or not needed else [needed, share]


def _name_of(trial: TuneTrial) -> str:
    return trial.config[TRIAL]


class _Ending(tune.Callback):
    """Notes how trials begin and end, and takes away what they no longer need."""

    def __init__(self, folder: SweepFolder, ledger: Ledger, board: Board) -> None:
        self._folder, self._ledger, self._board = folder, ledger, board

    def __reduce__(self) -> tuple:
        return tune.Callback, ()  # as for schedulers (schedule.py)

    def on_trial_start(self, iteration: int, trials: Sequence[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        self._board.active(trial.config[TRIAL], "running")

    def on_trial_complete(self, iteration: int, trials: Sequence[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        name = trial.config[TRIAL]
        self._board.active(name, "ended")
        if name not in self._ledger.known.ends:
            self._ledger.end(name, self._end_of(name))
        if self._ledger.known.ends[name].state != "finished":
            drop_checkpoints(self._folder, name)

    def _end_of(self, name: str) -> Ended:
        """A trial that ended without a decision of its own has trained to its end, or has waited in Hyperband for nothing."""
        record = RunRecord.read(self._folder.trial(name))
        if record is not None and record.state == "finished":
            return Ended(state="finished")
        return Ended(state="stopped", cause=f"after step {self._board.of(name).step}, where it had waited for others")

    def on_trial_error(self, iteration: int, trials: Sequence[TuneTrial], trial: TuneTrial, **info: Any) -> None:
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


def drop_checkpoints(folder: SweepFolder, trial: str) -> None:
    """Remove the state of a trial that will not go on; what it measured stays."""
    run = folder.trial(trial)
    remove_folder(run.checkpoints, run.path)


def _in_thread(work: Callable[[], object], check: Callable[[], None]) -> None:
    """Do something in a thread, so that a signal reaches this one; what `check` raises ends the connection to the cluster."""
    outcome: SimpleQueue[BaseException | None] = SimpleQueue()

    def run() -> None:
        try:
            work()
            outcome.put(None)
        except BaseException as error:
            outcome.put(error)

    threading.Thread(target=run, name="tune", daemon=True).start()
    while True:
        try:
            error = outcome.get(timeout=CHECK_EVERY_S)
        except Empty:
            check()
            continue
        if error is not None:
            raise error
        return
