"""One sweep from the driver's side: config -> cluster -> trials and their plans -> Ray Tune -> result."""

from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import partial

from raytune.config.load import config_diff, dump_yaml
from raytune.config.run import RunConfig
from raytune.config.sweep import SweepSection
from raytune.data.build import ParallelMap
from raytune.errors import PlanError, UserError
from raytune.launch.cluster import connect, map_on_cluster, named_address, this_machine
from raytune.launch.lease import hold
from raytune.launch.prepare import Preparation
from raytune.launch.record import readable, refuse_another_run
from raytune.launch.stores import STORES_FOLDER
from raytune.metrics import History
from raytune.plan.machine import Machine
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import RunFolder, SweepFolder
from raytune.storage import absolute, exists, read_bytes, remove_folder, write_bytes, write_json
from raytune.sweeps.board import Board
from raytune.sweeps.collect import collect
from raytune.sweeps.ledger import Ended, Known, Ledger, read_ledger
from raytune.sweeps.results import SweepResult, trials_csv, trials_jsonl
from raytune.sweeps.search import Listed, Optuna, Source, TrialSearch
from raytune.sweeps.space import Places, check_space, corners, space_of, trial_config, trials_of
from raytune.sweeps.sweep_plan import SweepPlan, num_slots, plan_sweep, share_of
from raytune.sweeps.trial import Trial
from raytune.sweeps.tuner import run_trials
from raytune.sweeps.winner import read_sweep

Watch = Callable[[SweepPlan, Known, Board], AbstractContextManager]
"""Given the plan, what the ledger says and the board, a context that lasts as long as the trials: progress for a person."""

MAY_CHANGE = ("sweep.trials", "sweep.max_concurrent", "cluster.", "checkpoint.keep_", "training.logging_steps")
"""Beginnings of keys that may change between two commands of one sweep."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A sweep that is ready to start."""

    plan: SweepPlan
    trials: list[Trial]
    """All trials; with Optuna none are known before the first has ended."""
    plans: list[RunPlan]
    """Of the trials, or of the corners of the space."""


class Planner:
    """Makes configs and plans of trials. What several trials read is tokenised once.

    Args:
        config: of the sweep.
        machine: the whole cluster.
    """

    def __init__(self, config: RunConfig, folder: SweepFolder, machine: Machine, parallel_map: ParallelMap) -> None:
        self._config, self._folder = config, folder
        self.slots = num_slots(machine, config, _workers(config))
        self._preparation = Preparation(share_of(machine, self.slots), parallel_map)

    def config(self, trial: Trial) -> RunConfig:
        """The run config of a trial: in the sweep's folder, without questions at its end."""
        config = self._ranked(trial)
        store = config.data.store or f"{absolute(self._config.storage)}/{STORES_FOLDER}"
        return config.model_copy(
            update={
                "storage": self._folder.trials,
                "data": config.data.model_copy(update={"store": store}),
                "evaluation": config.evaluation.model_copy(update={"generation": None}),
                "checkpoint": config.checkpoint.model_copy(update={"resume": True}),
            }
        )

    def winner(self, trial: Trial) -> RunConfig:
        """The run config that trains a trial again, beside the sweep."""
        return self._ranked(trial).model_copy(update={"name": f"{self._config.name}-best"})

    def _ranked(self, trial: Trial) -> RunConfig:
        """A trial's config with its number of workers and the metric of the sweep."""
        section, config = _section(self._config), trial_config(self._config, trial)
        return config.model_copy(
            update={
                "checkpoint": config.checkpoint.model_copy(update={"metric": section.metric, "mode": section.mode}),
                "cluster": config.cluster.model_copy(update={"workers": _workers(config)}),
            }
        )

    def plan(self, trial: Trial) -> RunPlan:
        """The plan of a trial, without its rungs.

        Raises:
            UserError: if it cannot be done; the message names the trial's values.
        """
        try:
            return self._preparation.prepare(self.config(trial)).plan
        except UserError as error:
            values = ", ".join(f"{key}={value}" for key, value in trial.values.items())
            shared = f" {self.slots} trials share the machines: a smaller sweep.max_concurrent leaves more to each."
            is_crowded = isinstance(error, PlanError) and self.slots > 1
            raise type(error)(f"With {values}: {error}{shared if is_crowded else ''}") from error


def sweep(
    config: RunConfig, watch: Watch = lambda plan, known, board: nullcontext(), places: Places | None = None
) -> SweepResult:
    """Search the space of a sweep, or go on where an earlier command stopped; a finished sweep is only read.

    Args:
        places: where the keys of the sweep were written, for messages.

    Raises:
        UserError: before anything is started, if a point of the space is no valid config or fits no machine, or the sweep of that
            name was another one.
        ClusterError: if Ray lost what the sweep itself needs.
    """
    folder = _folder(config)
    check_space(config, places)
    _refuse_another_sweep(folder, config)
    if _is_finished(folder, config):
        return read_sweep(folder.path)
    with hold(RunFolder(folder.storage, folder.name)) as lease, connect(config.cluster) as machine:
        parallel_map = partial(map_on_cluster, start_timeout=config.cluster.start_timeout)
        planner = Planner(config, folder, machine, parallel_map)
        resolved = _resolve(config, planner)
        known = read_ledger(folder.ledger)
        _refuse_other_rungs(folder, resolved.plan, known)
        _refuse_other_trials(folder, planner, known)
        write_bytes(folder.sweep, config.model_dump_json(indent=2).encode())
        remove_folder(folder.result, folder.path)  # until this command has one too
        board = Board(resolved.plan.mode)
        with closing(Ledger(folder.ledger, resolved.plan.comparison)) as ledger, watch(resolved.plan, ledger.known, board):
            search = _search(config, folder, planner, resolved, ledger, board)
            run_trials(resolved.plan, folder, resolved.plans[0].cluster, search, ledger, board, lease.check)
        result = collect(folder, resolved.plan, list(_section(config).space))
        _write(folder, planner, result)
    return result


def plan_of_sweep(config: RunConfig, places: Places | None = None) -> Resolved:
    """What `sweep` would do, on the cluster that is named, or else on this machine. Tokenises the data, trains nothing.

    Raises:
        UserError: as `sweep` does.
    """
    folder = _folder(config)
    check_space(config, places)
    if named_address(config.cluster):
        with connect(config.cluster) as machine:
            parallel_map = partial(map_on_cluster, start_timeout=config.cluster.start_timeout)
            return _resolve(config, Planner(config, folder, machine, parallel_map))
    return _resolve(config, Planner(config, folder, this_machine(config.cluster), map))


def _resolve(config: RunConfig, planner: Planner) -> Resolved:
    section = _section(config)
    trials = [] if section.search == "optuna" else trials_of(config)
    # Beside the trials themselves, so that a longer search of this space cannot run into a wall later.
    points = [Trial(number=number, values=values) for number, values in enumerate(corners(space_of(config)))]
    plans = [planner.plan(trial) for trial in [*trials, *points]]
    plan = plan_sweep(section, config.name, len(trials) or section.trials, plans, planner.slots)
    return Resolved(plan=plan, trials=trials, plans=plans[: len(trials)] or plans)


def _search(
    config: RunConfig, folder: SweepFolder, planner: Planner, resolved: Resolved, ledger: Ledger, board: Board
) -> TrialSearch:
    """Where the trials of this command come from: those of earlier commands that have not ended, then new ones."""
    known = ledger.known
    source: Source = Listed(resolved.trials) if resolved.trials else Optuna(config, num_known=len(known.trials))
    for trial in known.trials.values():
        if known.has_ended(trial.name):
            best = History.read(folder.trial(trial.name).metrics).best_of(resolved.plan.metric, resolved.plan.mode)
            source.again(trial)
            source.finished(trial, best[1] if best and known.ends[trial.name].state != "failed" else None)

    def assign(trial: Trial) -> bool:
        ledger.assign(trial)
        try:
            plan = planner.plan(trial)
            plan = plan.model_copy(update={"rungs": resolved.plan.rung_steps(plan)})
        except UserError as error:
            ledger.end(trial.name, Ended(state="failed", cause=str(error)))
            return False
        told = {"config": planner.config(trial).model_dump(mode="json"), "plan": plan.model_dump(mode="json")}
        write_json(folder.assignment(trial.name), told)
        return True

    def value_of(trial: Trial) -> float | None:
        end = known.ends.get(trial.name)
        return None if end is not None and end.state == "failed" else board.of(trial.name).best

    return TrialSearch(source, known.unended, len(known.trials), assign, value_of)


def _is_finished(folder: SweepFolder, config: RunConfig) -> bool:
    """Whether every trial that is asked for has ended, and the result was written after that."""
    if not exists(folder.result):
        return False
    known, section = read_ledger(folder.ledger), _section(config)
    num_trials = section.trials if section.search == "optuna" else len(trials_of(config))
    return len(known.trials) >= num_trials and not known.unended


def _refuse_another_sweep(folder: SweepFolder, config: RunConfig) -> None:
    """Refuse to continue a sweep whose trials would be other ones, or judged in another way.

    More trials, and other machines for them, are no other sweep.
    """
    if not exists(folder.sweep):
        return
    with readable(folder.sweep, RunFolder(folder.storage, folder.name)):
        was = RunConfig.model_validate_json(read_bytes(folder.sweep))
    changes = [change for change in config_diff(was, config) if not change[0].startswith(MAY_CHANGE)]
    if changes:
        lines = "\n".join(f"  {key}: {old} -> {new}" for key, old, new in changes)
        raise UserError(
            f"Sweep {config.name!r} in {folder.storage} was started with other settings:\n{lines}\n"
            f"Continuing it would mix two sweeps. Give this one another name (name=...), or restore the settings."
        )


def _refuse_other_rungs(folder: SweepFolder, plan: SweepPlan, known: Known) -> None:
    """Refuse to judge trials by other rungs than those before them: a step count may follow from data or from the cluster.

    Raises:
        UserError: naming every difference.
    """
    changes = [
        f"  {key}: {known.comparison[key]} -> {value}"
        for key, value in plan.comparison.items()
        if key in known.comparison and known.comparison[key] != value
    ]
    if changes:
        raise UserError(
            f"Trials of sweep {folder.name!r} in {folder.storage} were compared after other amounts of training:\n"
            + "\n".join(changes)
            + "\nGive the new sweep another name (name=...), or set sweep.stopping.grace and the data to what they were."
        )


def _refuse_other_trials(folder: SweepFolder, planner: Planner, known: Known) -> None:
    """Refuse to continue trials whose steps would compute something else, on another cluster for example.

    Raises:
        UserError: naming every difference.
    """
    for trial in known.unended:
        refuse_another_run(folder.trial(trial.name), planner.plan(trial))


def _write(folder: SweepFolder, planner: Planner, result: SweepResult) -> None:
    """Leave the result in the sweep's folder."""
    write_bytes(folder.trials_jsonl, trials_jsonl(result).encode())
    write_bytes(folder.trials_csv, trials_csv(result).encode())
    if result.best:
        write_bytes(folder.best, dump_yaml(planner.winner(result.best.trial)).encode())
    write_json(folder.result, result.to_json())


def _section(config: RunConfig) -> SweepSection:
    if config.sweep is None:
        raise UserError("This config has no `sweep` section, so there is nothing to search. Train it with `raytune train`.")
    return config.sweep


def _folder(config: RunConfig) -> SweepFolder:
    return SweepFolder(absolute(config.storage), config.name)


def _workers(config: RunConfig) -> int:
    """Workers of a trial: one, unless the config says otherwise, so that as many trials as possible run side by side."""
    return 1 if config.cluster.workers == "auto" else config.cluster.workers
