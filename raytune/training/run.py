"""The policy of a run, on every rank: where it starts, what is done after which step, and what it leaves behind."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from raytune.data.batches import Batch, step_batches
from raytune.data.store import Store
from raytune.metrics import EventLog
from raytune.model.kept_base import KeptBase
from raytune.plan.identity import identity_of
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import RunFolder
from raytune.training.checkpoint import Checkpoints, Report
from raytune.training.engine import Engine
from raytune.training.fetched_base import fetch_base
from raytune.training.final import finish
from raytune.training.loop import LossSum, training_steps
from raytune.training.recorder import Recorder
from raytune.training.requests import Request, Requests, SaveClock
from raytune.training.schedule import learning_rate
from raytune.training.start import prepare_process, start_engine
from raytune.training.timetable import Timetable
from raytune.training.validation import Validation


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """Who this process is among the workers of an attempt."""

    rank: int
    world_size: int
    device_index: int
    """Of its device among those that this process sees; on a CPU, its number on the node."""
    attempt: int
    report: Callable[[dict[str, float]], None]
    """Tells whoever waits for news (a sweep, for one). Every rank calls it the same number of times, seconds apart."""
    check: Callable[[], None] = lambda: None
    """Called after every step; what it raises ends the run in order. For a process that nobody else can end."""
    kept: KeptBase | None = None
    """Where a process that trains one run after the other keeps the base."""


def train(plan: RunPlan, worker: Worker) -> None:
    """Train a plan on this rank, from its newest checkpoint or from the start, to its last step and its final model.

    Raises:
        RaytuneError: the same on every rank where it concerns all of them.
    """
    folder = RunFolder(plan.storage, plan.name)
    fetch_base(plan, folder, worker.rank, worker.world_size)
    device = prepare_process(plan, worker.device_index)
    engine, loss_sum = start_engine(plan, device, worker.rank, worker.world_size, worker.kept)
    with _told(folder, worker) as report:
        checkpoints = Checkpoints(
            folder, engine, fence=worker.attempt, policy=plan.checkpoint, fingerprint=identity_of(plan), report=report
        )
        resumed = checkpoints.load_newest()
        start = resumed.step if resumed else 0
        report("training_started", step=start)
        with Recorder(plan, engine, folder, attempt=worker.attempt, resumed_step=start) as recorder:
            _make_steps(plan, worker, engine, loss_sum, checkpoints, recorder, start)
            del loss_sum  # beside the engine, all that holds the model
            finish(plan, engine, checkpoints, recorder, folder)


def _make_steps(
    plan: RunPlan,
    worker: Worker,
    engine: Engine,
    loss_sum: LossSum,
    checkpoints: Checkpoints,
    recorder: Recorder,
    start: int,
) -> None:
    """Train from the step after `start` to the last, and do what is due on the way."""
    timetable, validation = Timetable.of(plan), Validation(plan, engine, loss_sum)
    store = Store.open(plan.data.train.path)
    save_clock = None if plan.checkpoint.every_s is None else SaveClock(plan.checkpoint.every_s)
    requests = Requests([save_clock] if save_clock else [], engine.gather_objects)
    if start == 0 and plan.evaluation.at_start and validation:
        recorder.evaluation(0, validation.measure())
    for result in training_steps(
        engine,
        _batches(plan, store, worker),
        loss_sum,
        lambda step: learning_rate(step, plan.optimization),
        start=start,
        stop=timetable.num_steps,
        seed=plan.seed,
        named=store.named,
    ):
        worker.check()
        step = result.step
        asked = requests.agreed() if timetable.logs_after(step) else frozenset()
        evaluates, saves = timetable.evaluates_after(step), timetable.saves_after(step) or Request.SAVE in asked
        if timetable.logs_after(step) or evaluates or saves:
            recorder.step(result)  # reads the step, and so stops here if it went wrong
        measured = validation.measure() if evaluates else {}
        if evaluates:
            recorder.evaluation(step, measured)
        if saves:
            recorder.flush()
            checkpoints.save(step, metrics=measured)
            if save_clock:
                save_clock.saved()
        if timetable.is_rung(step):
            checkpoints.wait()  # whoever judges the trial here may let it wait, and continue it elsewhere
        if evaluates:
            worker.report({"step": step, **measured})


@contextmanager
def _told(folder: RunFolder, worker: Worker) -> Iterator[Report]:
    """Takes the events of the run as long as the block lasts, however it ends; they are rank 0's to write."""
    if worker.rank != 0:
        yield lambda event, **facts: None
        return
    with EventLog(folder.events, attempt=worker.attempt) as events:
        yield events.write


def _batches(plan: RunPlan, store: Store, worker: Worker) -> Callable[[int], Sequence[Batch]]:
    """This rank's micro-batches of a step."""

    def batches_of(step: int) -> Sequence[Batch]:
        batches = step_batches(
            store,
            step=step,
            rank=worker.rank,
            world=worker.world_size,
            micro_batch_size=plan.batch.micro_batch_size,
            accumulation=plan.batch.accumulation,
            num_rows_in_run=plan.optimization.num_rows,
            seed=plan.seed,
        )
        return [batch.pin_memory() for batch in batches] if plan.cluster.device == "cuda" else batches

    return batches_of
