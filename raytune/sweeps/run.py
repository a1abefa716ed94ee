"""One sweep from the driver's side: config -> cluster -> trials and their plans -> Ray Tune -> result."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from functools import partial

from raytune.config.load import config_diff
from raytune.config.sections.run import RunConfig
from raytune.errors import UserError
from raytune.hub.snapshot import in_lines
from raytune.launch.attempts.lease import hold
from raytune.launch.cluster.address import named_address
from raytune.launch.cluster.cluster import connect, map_on_cluster
from raytune.launch.data.base_here import bring_base
from raytune.launch.state.begun import as_begun, refuse_unloadable
from raytune.launch.state.record import read_plan, readable, refuse_changes
from raytune.metrics.history import History
from raytune.model.files.base_content import content_changes
from raytune.run_folder import RunFolder, SweepFolder
from raytune.storage import exists, read_bytes, remove_folder, write_bytes, write_json
from raytune.sweeps.assignment import Assignment
from raytune.sweeps.board import Board
from raytune.sweeps.collect import collect
from raytune.sweeps.ledger import Ended, Known, Ledger, read_ledger
from raytune.sweeps.planner import Planner, Resolved, checked_folder, resolve, section_of
from raytune.sweeps.results import SweepResult
from raytune.sweeps.search import Listed, Optuna, Source, TrialSearch
from raytune.sweeps.space import Places, trials_of
from raytune.sweeps.sweep_plan import SweepPlan
from raytune.sweeps.tables import trials_csv, trials_jsonl
from raytune.sweeps.trial import Trial
from raytune.sweeps.tuner import run_trials
from raytune.sweeps.winner import best_yaml, read_sweep
from raytune.tracking.trackers import refuse_unready
from raytune.tracking.watching import tracking

_log = logging.getLogger(__name__)

Watch = Callable[[SweepPlan, Known, Board], AbstractContextManager]
"""Given the plan, what the ledger says and the board, a context that lasts as long as the trials: progress for a person."""

MAY_CHANGE = (
    *("sweep.trials", "sweep.max_concurrent", "cluster.", "provider.", "checkpoint.keep_", "training.logging_steps", "tracking"),
)
"""Beginnings of keys that may change between two commands of one sweep."""

COMPARED_BY_CONTENT = "model.base"
"""Where a sweep goes on, its base may lie elsewhere: what is in it is compared. A finished one is read, without its base."""


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
    folder = checked_folder(config, places)
    refuse_unready(config.tracking, folder.storage)
    if _is_finished(folder, config):
        _refuse_another_sweep(folder, config, may_change=MAY_CHANGE)
        return replace(read_sweep(folder.path), finished_before=True)
    _refuse_another_sweep(folder, config, may_change=(*MAY_CHANGE, COMPARED_BY_CONTENT))
    with hold(RunFolder(folder.storage, folder.name)) as lease, connect(config.cluster) as machine:
        parallel_map = partial(map_on_cluster, start_timeout=config.cluster.start_timeout)
        planner = Planner(config, folder, machine, parallel_map)
        resolved = resolve(config, planner)
        known = read_ledger(folder.ledger)
        _refuse_other_rungs(folder, resolved.plan, known)
        _refuse_other_trials(folder, planner, known)
        _refuse_other_bases(folder, planner, known)
        write_bytes(folder.sweep, config.model_dump_json(indent=2).encode())
        remove_folder(folder.result, folder.path)  # until this command has one too
        board = Board(resolved.plan.mode)
        told = RunFolder(folder.storage, folder.name)
        with (
            closing(Ledger(folder.ledger, resolved.plan.comparison)) as ledger,
            watch(resolved.plan, ledger.known, board),
            tracking(config.tracking, told, is_sweep=True),
        ):
            if named_address(config.cluster) is None:
                models = (model for plan in resolved.plans for model in plan.models)
                for model in {(model.path, model.revision): model for model in models}.values():
                    bring_base(model, in_lines(_log.warning))
            search = _search(config, folder, planner, resolved, ledger, board)
            try:
                run_trials(resolved.plan, folder, resolved.plans[0].cluster, search, ledger, board, lease.check)
            except KeyboardInterrupt as end:
                why = str(end) or "interrupted"
                raise KeyboardInterrupt(f"{why}. The same command continues the sweep; ended trials stay.") from None
        result = collect(folder, resolved.plan, list(section_of(config).space))
        _write(folder, planner, result)
    return result


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
            prepared = planner.prepared(trial)
            plan = prepared.plan.model_copy(update={"rungs": resolved.plan.rung_steps(prepared.plan)})
        except UserError as error:
            ledger.end(trial.name, Ended(state="failed", cause=str(error)))
            return False
        told = Assignment(config=planner.config(trial), plan=plan, questions=prepared.questions)
        told.write(folder.assignment(trial.name))
        return True

    def value_of(trial: Trial) -> float | None:
        end = known.ends.get(trial.name)
        return None if end is not None and end.state == "failed" else board.of(trial.name).best

    return TrialSearch(source, known.unended, len(known.trials), assign, value_of)


def _is_finished(folder: SweepFolder, config: RunConfig) -> bool:
    """Whether every trial that is asked for has ended, and the result was written after that."""
    if not exists(folder.result):
        return False
    known, section = read_ledger(folder.ledger), section_of(config)
    num_trials = section.trials if section.search == "optuna" else len(trials_of(config))
    return len(known.trials) >= num_trials and not known.unended


def _refuse_another_sweep(folder: SweepFolder, config: RunConfig, *, may_change: tuple[str, ...]) -> None:
    """Refuse to continue a sweep whose trials would be other ones, or judged in another way.

    More trials, and other machines for them, are no other sweep.

    Args:
        may_change: beginnings of keys.
    """
    if not exists(folder.sweep):
        return
    with readable(folder.sweep, RunFolder(folder.storage, folder.name)):
        was = RunConfig.model_validate_json(read_bytes(folder.sweep))
    changes = [change for change in config_diff(was, config) if not change[0].startswith(may_change)]
    refuse_changes("sweep", folder.name, folder.storage, changes)


def _refuse_other_rungs(folder: SweepFolder, plan: SweepPlan, known: Known) -> None:
    """Refuse to judge trials by other rungs than those before them: a step count may follow from data or from the cluster.

    Raises:
        UserError: naming every difference.
    """
    changes = [
        (f"{key} of the comparison", known.comparison[key], value)
        for key, value in plan.comparison.items()
        if key in known.comparison and known.comparison[key] != value
    ]
    refuse_changes("sweep", folder.name, folder.storage, changes)


def _refuse_other_trials(folder: SweepFolder, planner: Planner, known: Known) -> None:
    """Refuse to continue trials whose steps would compute something else, on another cluster for example.

    Raises:
        UserError: naming every difference.
    """
    for trial in known.unended:
        plan, begun = as_begun(folder.trial(trial.name), planner.plan(trial), planner.config(trial))
        if begun:
            refuse_unloadable(begun, plan)


def _refuse_other_bases(folder: SweepFolder, planner: Planner, known: Known) -> None:
    """Refuse to compare trials with ended ones whose base or teacher held something else, wherever it lay then and lies now.

    Raises:
        UserError: naming every file that differs.
    """
    for trial in known.trials.values():
        run = folder.trial(trial.name)
        if not known.has_ended(trial.name) or not exists(run.plan):
            continue
        for was, (key, section) in zip(read_plan(run).models, planner.models(trial).items()):
            if was.content is None:
                continue
            now = planner.content(section)
            changes = [(f"{key} (its file {name})", old, new) for name, old, new in content_changes(was.content, now)]
            refuse_changes("sweep", folder.name, folder.storage, changes)


def _write(folder: SweepFolder, planner: Planner, result: SweepResult) -> None:
    """Leave the result in the sweep's folder."""
    write_bytes(folder.trials_jsonl, trials_jsonl(result).encode())
    write_bytes(folder.trials_csv, trials_csv(result).encode())
    if result.best:
        write_bytes(folder.best, best_yaml(planner.winner(result.best.trial), result).encode())
    write_json(folder.result, result.to_json())
