"""The policy of a run, on every rank: where it starts, what is done after which step, and what it leaves behind."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from raytune.data.batches.batches import Batch, TrainingRows, step_batches
from raytune.data.batches.slices import Seat
from raytune.errors import TrainingError
from raytune.evaluation.suite_metrics import metrics_of
from raytune.metrics.events import EventLog
from raytune.metrics.history import History
from raytune.metrics.points import RollBack
from raytune.plan.identity.identity import identity_of
from raytune.plan.run_plan import RunPlan
from raytune.plan.strategies.averaging import share_after
from raytune.run_folder import RunFolder
from raytune.training.checkpoints.checkpoint import Checkpoints, Report
from raytune.training.measuring.final import finish
from raytune.training.measuring.while_training import WhileTraining
from raytune.training.start.importance import hold_by_importance
from raytune.training.start.rows import position_after, tell_what_was_read, training_rows
from raytune.training.start.start import Started, Worker, start
from raytune.training.steps.divergence import Guard, findings
from raytune.training.steps.loop import training_steps
from raytune.training.steps.phases import Phases
from raytune.training.steps.recorder import Recorder
from raytune.training.steps.requests import Request, Requests, SaveClock, SaveFile, listening
from raytune.training.steps.schedule import learning_rate
from raytune.training.steps.stopping import Curve, Noted, Stopping
from raytune.training.steps.timetable import Timetable
from raytune.training.steps.validation import HeldOut


def train(plan: RunPlan, worker: Worker) -> None:
    """Train a plan on this rank, from its newest checkpoint or from the start, to its last step and its final model.

    Raises:
        RaytuneError: the same on every rank where it concerns all of them.
    """
    train_started(start(plan, worker))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """What works on a run beside its engine, for as long as an attempt lasts."""

    started: Started
    checkpoints: Checkpoints
    phases: Phases
    guard: Guard
    suites: WhileTraining
    report: Report


def train_started(started: Started) -> None:
    """`train`, from where the engine has started."""
    plan, worker, folder, engine = started.plan, started.worker, started.folder, started.engine
    measured = plan.evaluation.while_training
    for suite in (*plan.evaluation.suites, *(measured.suites if measured else ())):
        metrics_of(suite)  # what they need has to be here too, and not only at the command's
    with _told(folder, worker) as report:
        hold_by_importance(started, report)
        phases = Phases(plan, engine)
        checkpoints = Checkpoints(
            folder,
            engine,
            attempt=worker.attempt,
            policy=plan.checkpoint,
            fingerprint=identity_of(plan),
            report=report,
            prepare=phases.reach_state,
        )
        resumed = checkpoints.load_newest()
        first = resumed.step if resumed else 0
        report("training_started", step=first)
        guard = Guard.resumed(plan, engine, report, folder.metrics, first) if resumed else Guard(plan, engine, report)
        suites = WhileTraining(plan, engine, folder, report)
        parts = _Parts(started=started, checkpoints=checkpoints, phases=phases, guard=guard, suites=suites, report=report)
        back = None
        while diverged := _train_from(first, back, parts):
            back = guard.go_back(diverged, checkpoints)
            first = back.to


def _train_from(first: int, back: RollBack | None, parts: _Parts) -> TrainingError | None:
    """Train from the step after `first` to the final model; or to where the run diverges, if it may be rolled back then.

    Args:
        back: the way back that led to `first`, if one did.
    """
    started, checkpoints, suites = parts.started, parts.checkpoints, parts.suites
    plan, worker, engine, folder = started.plan, started.worker, started.engine, started.folder
    stopping = _stopping(started, first, parts.report)
    suites.begin(first, checkpoints.learn)
    with Recorder(
        plan, engine, folder, attempt=worker.attempt, resumed_step=first, roll_back=back, told=stopping.add
    ) as recorder:
        try:
            if not stopping.has_ended(first):
                newest = checkpoints.wait()
                position = newest.position if newest and newest.step == first else None
                with training_rows(plan, position) as rows, listening(folder, worker.rank, beside=suites.looks) as asked:
                    _make_steps(first, parts, recorder, stopping, asked, rows)
        except TrainingError as error:
            if not parts.guard.rolls_back or error.bad_step is None:
                raise
            return error.with_traceback(None)  # which would keep what the failed step holds
        suites.wait()
        _take_results(suites, recorder, checkpoints)
        recorder.flush()
        found = replace(stopping.findings, divergence=_divergence(plan, folder, worker))
        finish(started, checkpoints, recorder, found)
        suites.look()
        _take_results(suites, recorder, checkpoints)  # what has come meanwhile, for the curve
    return None


def _take_results(suites: WhileTraining, recorder: Recorder, checkpoints: Checkpoints) -> None:
    """Write down, and count for what is saved, what suites came to at earlier steps; rank 0 does."""
    for result in suites.take():
        recorder.late(result.export.step, result.values)
        checkpoints.learn(result.export.step, result.values)


def _divergence(plan: RunPlan, folder: RunFolder, worker: Worker) -> tuple[Noted, ...]:
    """What the guard came to, for the result, which rank 0 writes."""
    return findings(History.read(folder.metrics), plan.divergence, plan.logging_steps) if worker.rank == 0 else ()


def _stopping(started: Started, first: int, report: Report) -> Stopping:
    """The rules of the run, which know what was measured until the step that this attempt goes on from."""
    plan, curve = started.plan, Curve.of(started.plan)
    if plan.stopping.are_given and started.worker.rank == 0:
        curve.read(History.read(started.folder.metrics), last_step=first)
    return Stopping(plan.stopping, plan.optimization.num_steps, curve, started.engine.gather_objects, report)


def _make_steps(
    first: int, parts: _Parts, recorder: Recorder, stopping: Stopping, save_file: SaveFile, rows: TrainingRows
) -> None:
    """Train from the step after `first` to the last, or to where a rule ends the run, and do what is due on the way."""
    started, checkpoints, suites = parts.started, parts.checkpoints, parts.suites
    plan, worker, engine, guard = started.plan, started.worker, started.engine, parts.guard
    timetable, validation = Timetable.of(plan), HeldOut.validation(plan, engine, started.loss.cross_entropy)
    savers = [save_file, *([] if plan.checkpoint.every_s is None else [SaveClock(plan.checkpoint.every_s)])]
    requests = Requests([*savers, *suites.sources], engine.gather_objects)
    if first == 0 and (measured := _at_start(plan, validation, suites)):
        recorder.evaluation(0, measured)
    if guard.rolls_back and checkpoints.wait() is None:
        recorder.flush()
        checkpoints.save(0, metrics={})  # so that there is always a way back; unmeasured, since it is not what the run is for
    parts.phases.reach_step(first)
    for result in training_steps(
        engine,
        batches_of_run(plan, rows, worker),
        started.loss,
        lambda step: learning_rate(step, plan.optimization) * guard.rate_scale,
        start=first,
        stop=timetable.num_steps,
        seed=plan.seed,
        named=rows.named,
        norm_limit=guard.norm_limit,
        part_sum=started.loss.take_divergence,
    ):
        step = result.step
        worker.check()
        if (share := share_after(step, plan.optimization.averaging)) is not None:
            engine.average(share)
        asked = requests.agreed() if timetable.logs_after(step) else frozenset()
        evaluates, saves = timetable.evaluates_after(step), timetable.saves_after(step) or Request.SAVE in asked
        measures = timetable.measures_after(step)
        if timetable.logs_after(step) or evaluates or saves or measures:
            guard.look(result, recorder.step(result))  # reads the step, and so stops here if it went wrong
        measured = validation.measure() if evaluates else {}
        if measures:
            measured |= suites.after(step)
        if evaluates or measures:
            recorder.evaluation(step, measured)
        if Request.TAKE_RESULTS in asked:
            _take_results(suites, recorder, checkpoints)
        ends = (evaluates or measures or Request.TAKE_RESULTS in asked) and stopping.ends_after(step)
        if saves or ends:
            recorder.flush()
            checkpoints.save(step, metrics=measured, position=position_after(step, plan, rows))
            tell_what_was_read(rows, step, parts.report)
            for saver in savers:
                saver.saved()
        if timetable.is_rung(step):
            checkpoints.wait()  # whoever judges the trial here may let it wait, and continue it elsewhere
        if measured:
            worker.report({"step": step, **measured})
        if ends:
            break
        parts.phases.reach_step(step)


def _at_start(plan: RunPlan, validation: HeldOut, suites: WhileTraining) -> dict[str, float]:
    """What the model is worth before the first step."""
    measured = validation.measure() if plan.evaluation.at_start and validation else {}
    while_training = plan.evaluation.while_training
    return measured | (suites.after(0) if while_training and while_training.at_start else {})


@contextmanager
def _told(folder: RunFolder, worker: Worker) -> Iterator[Report]:
    """Takes the events of the run as long as the block lasts, however it ends; they are rank 0's to write."""
    if worker.rank != 0:
        yield lambda event, **facts: None
        return
    with EventLog(folder.events, attempt=worker.attempt) as events:
        yield events.write


def batches_of_run(plan: RunPlan, rows: TrainingRows, worker: Worker) -> Callable[[int], Sequence[Batch]]:
    """This rank's micro-batches of a step."""

    seat = Seat.of(plan.batch, worker.rank, worker.world_size)

    def batches_of(step: int) -> Sequence[Batch]:
        batches = step_batches(
            rows,
            step=step,
            rank=seat.group,
            world=seat.num_groups,
            micro_batch_size=plan.batch.micro_batch_size,
            accumulation=plan.batch.accumulation,
            num_rows_in_run=plan.optimization.num_rows,
            seed=plan.seed,
        )
        batches = [seat.own(batch) for batch in batches]
        return [batch.pin_memory() for batch in batches] if plan.cluster.device == "cuda" else batches

    return batches_of
