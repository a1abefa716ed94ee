"""A trial as Ray Tune runs it: one actor, one conversation about results, and a run underneath.

A trial of one worker trains in the actor itself, which Tune keeps warm for the next trial: libraries stay imported and, where
the base is frozen, its weights stay loaded. A trial of several workers is driven from a light actor on the head node: a Ray Train
worker group does the work, and its metrics file says how far it is.
"""

import gc
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

import torch.distributed as dist
from ray import tune

from raytune.errors import EXIT_RETRY_LATER, RaytuneError, RunHeldError
from raytune.launch.attempts.attempts import Failure
from raytune.launch.attempts.causes import first_failure
from raytune.launch.attempts.lease import EXPIRES_S
from raytune.launch.attempts.trainer import fit
from raytune.launch.run import Attempt, RunFailedError, train_plan
from raytune.metrics.follower import Follower
from raytune.model.kept_base import KeptBase
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import RunFolder, SweepFolder
from raytune.storage import exists
from raytune.sweeps.assignment import Assignment
from raytune.sweeps.schedule import AMOUNT, FAILURE, MAY_PASS, STEP
from raytune.sweeps.search import TRIAL
from raytune.sweeps.sweep_plan import SweepPlan
from raytune.training.checkpoints.commit import committed
from raytune.training.run import Worker, train
from raytune.training.worker import recorded

REPORTED = "reported_step"
TRY_AGAIN_EVERY_S = LOOK_EVERY_S = 2.0


class TrialStopped(SystemExit):
    """Raised where a trial reports or makes a step, when it is not to go on: it ends in order, as on an interrupt."""


class SweepStopped(Exception):
    """Told to Tune, which has stopped listening, in place of a result."""


class TrialActor(tune.Trainable):
    """Runs one trial after the other; `step` returns the next result of the present one."""

    def setup(self, config: dict[str, Any], sweep: SweepPlan, folder: SweepFolder, stop_file: str) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """
        Args:
            stop_file: there once the sweep is to stop.
        """
        self._sweep, self._folder, self._stop_file = sweep, folder, stop_file
        self._reported_step = 0
        self._talk: _Conversation | None = None
        self._kept = KeptBase()

    def step(self) -> dict[str, Any]:
        if self._talk is None:
            assignment = Assignment.read(self._folder.assignment(self.config[TRIAL]))
            reporter = _Reporter(self._sweep, assignment.plan, self._reported_step)
            self._talk = _Conversation(lambda talk: _run(assignment, reporter, talk, self._kept))
        result = self._talk.next_result(self._is_stopped)
        self._reported_step = result.get(STEP, self._reported_step)
        return result

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.cleanup()
        self.config, self._reported_step = new_config, 0
        return True

    def cleanup(self) -> None:
        talk, self._talk = self._talk, None
        if talk is not None:
            talk.end()
        del talk
        gc.collect()

    def _is_stopped(self) -> bool:
        with suppress(RaytuneError):  # storage that is away is the trial's matter
            return exists(self._stop_file)
        return False

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """A trial that waits for others: its state is committed in its run folder, Tune keeps only what it was told."""
        return {REPORTED: self._reported_step}

    def load_checkpoint(self, checkpoint: Any) -> None:
        self._reported_step = checkpoint[REPORTED]


class _Conversation:
    """Work in a thread of its own that says one result at a time, and goes on only when it is asked for the next.

    Args:
        work: is given this conversation, to `say` its results in and to `leave_if_over` between them.
    """

    def __init__(self, work: Callable[["_Conversation"], None]) -> None:
        self._said: SimpleQueue[dict[str, Any] | BaseException] = SimpleQueue()
        self._may_go_on = threading.Semaphore(0)
        self._is_over = False
        self._last: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._run, args=(work,), name="trial", daemon=True)
        self._thread.start()

    def next_result(self, is_stopped: Callable[[], bool]) -> dict[str, Any]:
        """The next result; the last one again, marked as done, when the work has ended.

        Args:
            is_stopped: asked now and then whether to end the work instead of waiting for it.

        Raises:
            SweepStopped: if it was ended.
            Exception: what the work raised.
        """
        if self._last:
            self._may_go_on.release()
        said = self._next_said(is_stopped)
        if isinstance(said, BaseException):
            raise said
        self._last = said or {**self._last, "done": True}
        return self._last

    def _next_said(self, is_stopped: Callable[[], bool]) -> dict[str, Any] | BaseException:
        while True:
            with suppress(Empty):
                return self._said.get(timeout=LOOK_EVERY_S)
            if is_stopped():
                self.end()
                raise SweepStopped("the sweep was stopped")

    def end(self) -> None:
        """Stop the work where it next looks, and wait until it has ended."""
        self._is_over = True
        self._may_go_on.release()
        self._thread.join()

    def say(self, result: dict[str, Any]) -> None:
        """Called by the work: returns when the next result is asked for.

        Raises:
            TrialStopped: if none will be.
        """
        self.leave_if_over()
        self._said.put(result)
        self._may_go_on.acquire()
        self.leave_if_over()

    def leave_if_over(self) -> None:
        """Called by the work, between results.

        Raises:
            TrialStopped: if it is not to go on.
        """
        if self._is_over:
            raise TrialStopped

    def _run(self, work: Callable[["_Conversation"], None]) -> None:
        try:
            work(self)
        except TrialStopped:
            return
        except BaseException as error:
            # Frames of the traceback would keep the model alive.
            self._said.put(error.with_traceback(None))
        else:
            self._said.put({})


class _Reporter:
    """From what a run measures to results for Tune: each evaluation once, in order.

    Args:
        after_step: the last that Tune was told of; 0: none. What was measured before the first step compares nothing.
    """

    def __init__(self, sweep: SweepPlan, plan: RunPlan, after_step: int) -> None:
        self._sweep, self._plan, self._after_step = sweep, plan, after_step

    def unreported(self, evaluations: Iterable[Mapping[str, float]]) -> list[Mapping[str, float]]:
        """Those that Tune was not told of yet, and that have what trials are compared by."""
        return [values for values in evaluations if values[STEP] > self._after_step and self._sweep.metric in values]

    def new(self, evaluations: Iterable[Mapping[str, float]]) -> Iterator[dict[str, Any]]:
        """Results of those that were not reported yet."""
        for values in self.unreported(evaluations):
            self._after_step = step = int(values[STEP])
            yield {**values, STEP: step, AMOUNT: self._sweep.amount_at(self._plan, step)}

    def failure(self, error: RaytuneError) -> dict[str, Any]:
        cause = error.failure.headline if isinstance(error, RunFailedError) else str(error)
        facts = {FAILURE: cause, MAY_PASS: error.exit_code == EXIT_RETRY_LATER}
        # Tune wants the metric in every result.
        return {**facts, self._sweep.metric: math.nan, STEP: self._after_step, AMOUNT: 0.0}


def _run(assignment: Assignment, reporter: _Reporter, talk: _Conversation, kept: KeptBase) -> None:
    """Train a trial to its end, telling what it measures; first what earlier attempts at it have measured."""
    plan = assignment.plan
    measured = _Evaluations(RunFolder(plan.storage, plan.name).metrics)

    def tell() -> None:
        for result in reporter.new(measured.look()):
            talk.say(result)

    tell()
    attempt = _here(reporter, talk, kept) if plan.batch.workers == 1 else _elsewhere(reporter, talk, measured)
    try:
        _train_when_free(lambda: train_plan(plan, assignment.questions, assignment.config, attempt=attempt), talk)
    except RaytuneError as error:
        talk.say(reporter.failure(error))
        raise
    tell()


class _Evaluations:
    """What a run has measured of its model, by step. A look costs what was added since the one before."""

    def __init__(self, path: str) -> None:
        self._follower = Follower(path)
        self._by_step: dict[int, dict[str, float]] = {}

    def look(self) -> list[dict[str, float]]:
        """All that are known by now, in order. Of a step that is measured again, after a resume, the later values."""
        for point in self._follower.look():
            if evaluation := point.evaluation:
                self._by_step[point.step] = {STEP: point.step, **evaluation}
        return [self._by_step[step] for step in sorted(self._by_step) if step <= self._follower.last_step]


def _train_when_free(train: Callable[[], object], talk: _Conversation) -> None:
    """Train; where the actor before this one has just died, as soon as its lease has expired."""
    deadline = time.monotonic() + 2 * EXPIRES_S
    while True:
        try:
            train()
        except RunHeldError:
            if time.monotonic() > deadline:
                raise
            talk.leave_if_over()
            time.sleep(TRY_AGAIN_EVERY_S)
        else:
            return


def _elsewhere(reporter: _Reporter, talk: _Conversation, measured: _Evaluations) -> Attempt:
    """Attempts on worker groups, whose metrics file is followed while they train."""

    def attempt(plan: RunPlan, number: int, check: Callable[[], None]) -> Failure | None:
        folder = RunFolder(plan.storage, plan.name)

        def look() -> None:
            check()
            talk.leave_if_over()
            unreported = reporter.unreported(measured.look())
            if not unreported:
                return
            # Whoever judges the trial may let it wait, and continue it elsewhere: so no rung before its step is committed.
            saved = max((commit.step for commit in committed(folder)), default=0)
            unsaved_rung = next((rung for rung in plan.rungs if rung > saved), math.inf)
            for result in reporter.new(values for values in unreported if values[STEP] < unsaved_rung):
                talk.say(result)

        return fit(plan, number, look)

    return attempt


def _here(reporter: _Reporter, talk: _Conversation, kept: KeptBase) -> Attempt:
    """Attempts in this process."""

    def attempt(plan: RunPlan, number: int, check: Callable[[], None]) -> Failure | None:
        def report(values: Mapping[str, float]) -> None:
            for result in reporter.new([values]):
                talk.say(result)

        def still() -> None:
            check()
            talk.leave_if_over()

        if plan.engine.kind == "zero" and not dist.is_initialized():
            backend = "nccl" if plan.cluster.device == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # DeepSpeed wants one, alone or not
        worker = Worker(rank=0, world_size=1, device_index=0, attempt=number, report=report, check=still, kept=kept)
        try:
            with recorded(plan, number, rank=0):
                train(plan, worker)
        except Exception as error:
            kept.drop()
            return first_failure(RunFolder(plan.storage, plan.name), number, error)
        return None

    return attempt
