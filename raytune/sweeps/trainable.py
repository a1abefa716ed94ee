"""A trial as Ray Tune runs it: one actor, one conversation about results, and a run underneath.

A trial of one worker trains in the actor itself, which Tune keeps warm for the next trial: libraries stay imported and, where
the base is frozen, its weights stay loaded. A trial of several workers is driven from a light actor on the head node: a Ray Train
worker group does the work, and its metrics file says how far it is.
"""

import gc
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch.distributed as dist
from ray import tune

from raytune.config.run import RunConfig
from raytune.errors import EXIT_RETRY_LATER
from raytune.launch.attempts import Failure
from raytune.launch.run import Attempt, RunFailedError, train_plan
from raytune.launch.trainer import first_failure, fit
from raytune.metrics import History
from raytune.model.kept_base import KeptBase
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import RunFolder, SweepFolder
from raytune.storage import read_json
from raytune.sweeps.schedule import AMOUNT, FAILURE, MAY_PASS, STEP
from raytune.sweeps.search import TRIAL
from raytune.sweeps.sweep_plan import SweepPlan
from raytune.training.run import Worker, train
from raytune.training.worker import recorded

REPORTED = "reported_step"


class TrialStopped(SystemExit):
    """Raised where a trial reports, when it is not to go on: whatever it was doing ends in order, as on an interrupt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What a trial is to do."""

    config: RunConfig
    plan: RunPlan

    @classmethod
    def read(cls, path: str) -> "Assignment":
        values = read_json(path)
        return cls(config=RunConfig.model_validate(values["config"]), plan=RunPlan.model_validate(values["plan"]))


class TrialActor(tune.Trainable):
    """Runs one trial after the other; `step` returns the next result of the present one."""

    def setup(self, config: dict[str, Any], sweep: SweepPlan, folder: SweepFolder) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._sweep, self._folder = sweep, folder
        self._reported_step = 0
        self._talk: _Conversation | None = None
        self._kept = KeptBase()

    def step(self) -> dict[str, Any]:
        if self._talk is None:
            assignment = Assignment.read(self._folder.assignment(self.config[TRIAL]))
            reporter = _Reporter(self._sweep, assignment.plan, self._reported_step)
            self._talk = _Conversation(lambda say: _run(assignment, reporter.to(say), self._kept))
        result = self._talk.next_result()
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

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """A trial that waits for others: its state is committed in its run folder, Tune keeps only what it was told."""
        return {REPORTED: self._reported_step}

    def load_checkpoint(self, checkpoint: Any) -> None:
        self._reported_step = checkpoint[REPORTED]


class _Conversation:
    """Work in a thread of its own that says one result at a time, and goes on only when it is asked for the next."""

    def __init__(self, work: Callable[[Callable[[dict[str, Any]], None]], None]) -> None:
        self._said: SimpleQueue[dict[str, Any] | BaseException] = SimpleQueue()
        self._may_go_on = threading.Semaphore(0)
        self._is_over = False
        self._last: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._run, args=(work,), name="trial", daemon=True)
        self._thread.start()

    def next_result(self) -> dict[str, Any]:
        """The next result; the last one again, marked as done, when the work has ended.

        Raises:
            Exception: what the work raised.
        """
        if self._last:
            self._may_go_on.release()
        said = self._said.get()
        if isinstance(said, BaseException):
            raise said
        self._last = said or {**self._last, "done": True}
        return self._last

    def end(self) -> None:
        """Stop the work where it next says something, and wait until it has ended."""
        self._is_over = True
        self._may_go_on.release()
        self._thread.join()

    def _run(self, work: Callable[[Callable[[dict[str, Any]], None]], None]) -> None:
        try:
            work(self._say)
        except TrialStopped:
            return
        except BaseException as error:
            # Frames of the traceback would keep the model alive.
            self._said.put(error.with_traceback(None))
        else:
            self._said.put({})

    def _say(self, result: dict[str, Any]) -> None:
        self._leave_if_over()
        self._said.put(result)
        self._may_go_on.acquire()
        self._leave_if_over()

    def _leave_if_over(self) -> None:
        if self._is_over:
            raise TrialStopped


class _Reporter:
    """From what a run measures to what Tune is told: each evaluation once, in order.

    Args:
        after_step: the last that Tune was told of; 0: none. What was measured before the first step compares nothing.
    """

    def __init__(self, sweep: SweepPlan, plan: RunPlan, after_step: int) -> None:
        self._sweep, self._plan, self._after_step = sweep, plan, after_step
        self._say: Callable[[dict[str, Any]], None] = lambda result: None

    def to(self, say: Callable[[dict[str, Any]], None]) -> "_Reporter":
        self._say = say
        return self

    def history(self, history: History) -> None:
        """Report what a metrics file has that was not reported yet."""
        for point in history.evaluations:
            self.evaluation({STEP: point.step, **point.values})

    def evaluation(self, values: Mapping[str, float]) -> None:
        step = int(values[STEP])
        if step <= self._after_step:
            return
        self._after_step = step
        self._say({**values, STEP: step, AMOUNT: self._sweep.amount_at(self._plan, step)})

    def failure(self, error: RunFailedError) -> None:
        may_pass = error.exit_code == EXIT_RETRY_LATER
        facts = {FAILURE: error.failure.headline, MAY_PASS: may_pass}
        # Tune wants the metric in every result.
        self._say({**facts, self._sweep.metric: math.nan, STEP: self._after_step, AMOUNT: 0.0})


def _run(assignment: Assignment, reporter: _Reporter, kept: KeptBase) -> None:
    """Train a trial to its end, telling what it measures; first what earlier attempts at it have measured."""
    plan = assignment.plan
    metrics = RunFolder(plan.storage, plan.name).metrics
    reporter.history(History.read(metrics))
    try:
        train_plan(
            plan, [], assignment.config, attempt=_here(reporter, kept) if plan.batch.workers == 1 else _elsewhere(reporter)
        )
    except RunFailedError as error:
        reporter.failure(error)
        raise
    reporter.history(History.read(metrics))


def _elsewhere(reporter: _Reporter) -> Attempt:
    """Attempts on worker groups, whose metrics file is read while they train."""

    def attempt(plan: RunPlan, number: int, check: Callable[[], None]) -> Failure | None:
        metrics = RunFolder(plan.storage, plan.name).metrics

        def look() -> None:
            check()
            reporter.history(History.read(metrics))

        return fit(plan, number, look)

    return attempt


def _here(reporter: _Reporter, kept: KeptBase) -> Attempt:
    """Attempts in this process."""

    def attempt(plan: RunPlan, number: int, check: Callable[[], None]) -> Failure | None:
        def report(values: Mapping[str, float]) -> None:
            check()
            reporter.evaluation(values)

        if plan.engine.kind == "zero" and not dist.is_initialized():
            backend = "nccl" if plan.cluster.device == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # DeepSpeed wants one, alone or not
        worker = Worker(rank=0, world_size=1, device_index=0, attempt=number, report=report, kept=kept)
        try:
            with recorded(plan, number, rank=0):
                train(plan, worker)
        except Exception as error:
            kept.drop()
            return first_failure(RunFolder(plan.storage, plan.name), number, error)
        return None

    return attempt
