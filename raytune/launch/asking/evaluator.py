"""The evaluator of a run: for as long as an attempt trains, it measures the newest export on CPUs and GPUs that no worker has.

It lives beside one attempt, and starts its actor when the first export is there: by then the workers have their places, which
it must not take. Training neither waits for it nor hears of it but by the files that it writes (training.exports). What goes
wrong is said once; it begins again a few times, with the newest export, and then gives up.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from typing import Any, Protocol

import ray
from ray.exceptions import RayError, RayTaskError

from raytune.errors import RaytuneError
from raytune.evaluation.answers import Answered, Chunk, all_chunks, together
from raytune.evaluation.judging import values_of
from raytune.evaluation.questions import Question, by_suite, from_json_lines
from raytune.evaluation.suite_metrics import Given
from raytune.launch.asking.answering import Answerer, AnsweringPlan
from raytune.metrics.events import EventLog
from raytune.model.inference import asked_of_run
from raytune.object_store import once
from raytune.plan.run_plan import RunPlan, WhileTrainingPlan
from raytune.plan.saved.asked_model import AskedModel
from raytune.printable import first_line
from raytune.run_folder import RunFolder
from raytune.storage import is_local, read_bytes, remove_folder, write_json
from raytune.training.measuring import exports
from raytune.training.measuring.exports import Export, SuiteResult

MOST_FAILURES = 3
"""In a row, after which it begins again no more."""
LOOK_EVERY_S, REMOTE_LOOK_EVERY_S = 2.0, 15.0
ASK_EVERY_S = 1.0
UNPLACED_S = 60.0
"""Without a place for the actor, after which that is said."""
JOIN_S = 10.0

_log = logging.getLogger(__name__)


class EvaluatorEnded(Exception):
    """Nobody waits for an answer any more."""


class Answers(Protocol):
    """Who answers: `Answerer`, here or elsewhere."""

    def answer(self, one: AskedModel, chunk: Chunk) -> dict[int, Given]: ...

    def forget(self, folder: str) -> None:
        """What was saved there is not asked again."""
        ...

    def end(self) -> None: ...


@contextmanager
def evaluating(plan: RunPlan, attempt: int) -> Iterator[None]:
    """Measure the exports of an attempt as long as the block lasts."""
    measured, folder = plan.evaluation.while_training, RunFolder(plan.storage, plan.name)
    assert measured is not None
    ended = threading.Event()
    with closing(EventLog(folder.events, attempt=attempt)) as events:
        evaluator = Evaluator(plan, measured, lambda: RemoteAnswers(plan, measured, ended, events), events, ended)
        thread = threading.Thread(target=evaluator.run, name="evaluator", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(JOIN_S)


class Evaluator:
    """Measures one export after the other, always the newest.

    Args:
        begin: starts who answers.
        events: told how it is.
        ended: set once the attempt has ended.
    """

    def __init__(
        self,
        plan: RunPlan,
        measured: WhileTrainingPlan,
        begin: Callable[[], Answers],
        events: EventLog,
        ended: threading.Event,
    ) -> None:
        self._plan, self._measured, self._begin, self._events, self._ended = plan, measured, begin, events, ended
        self._folder = RunFolder(plan.storage, plan.name)
        self._answers: Answers | None = None
        self._asked: Mapping[str, Sequence[Question]] | None = None
        self._num_failures = 0
        self._is_away = False
        self._failed_metrics: set[str] = set()

    def run(self, look_every_s: float | None = None) -> None:
        """Until the attempt has ended, or it gives up."""
        every_s = look_every_s or (LOOK_EVERY_S if is_local(self._folder.path) else REMOTE_LOOK_EVERY_S)
        with suppress(RaytuneError, OSError):
            remove_folder(self._folder.given_up, self._folder.while_training)
        try:
            while not self._ended.wait(every_s) and self._num_failures < MOST_FAILURES:
                with suppress(RaytuneError, OSError, ValueError):  # storage that is away: the next look will tell
                    self.look()
        except EvaluatorEnded:
            pass
        finally:
            self._let_go()
            with suppress(RaytuneError, OSError):
                exports.leave(self._folder)

    def look(self) -> bool:
        """Measure the newest export, if it is not measured yet. Whether something new is known."""
        with once():
            there = exports.exports_in(self._folder)
        if not there:
            return False
        export = there[-1]
        known = exports.read_result(self._folder, export.step)
        if known is not None and known.export == export:
            return False
        exports.take(self._folder, export)
        try:
            return self._measure(export) if exports.is_there(self._folder, export) else False
        finally:
            exports.leave(self._folder)
            exports.remove_old(self._folder)

    def _measure(self, export: Export) -> bool:
        started_s = time.perf_counter()
        try:
            values = self._values(export)
        except EvaluatorEnded:
            raise
        except Exception as error:  # the model, a metric of the user's, or a process that is gone: training goes on
            if not self._ended.is_set() and exports.is_there(self._folder, export):
                self._has_failed(export, error)
            return False
        seconds = time.perf_counter() - started_s
        self._num_failures = 0
        if self._is_away:
            self._is_away = False
            self._events.write("evaluator_back", step=export.step)
        if not exports.write_result(self._folder, SuiteResult(export=export, values=values, seconds=seconds)):
            return False
        self._events.write("suites_measured", step=export.step, seconds=seconds)
        return True

    def _values(self, export: Export) -> dict[str, float]:
        suites = self._measured.suites
        if self._asked is None:
            self._asked = by_suite(suites, from_json_lines(read_bytes(self._folder.questions)))
        self._answers = self._answers or self._begin()
        _, tuned = asked_of_run(self._plan, export.path(self._folder))
        chunks = all_chunks(suites, self._asked)
        parts: list[Answered] = [{chunk.suite.name: self._answers.answer(tuned, chunk)} for chunk in chunks]
        self._answers.forget(export.path(self._folder))
        values, failed = values_of(suites, self._asked, together(parts, self._asked), device="cpu")
        for metric, why in failed.items():
            if metric not in self._failed_metrics:
                self._events.write("metric_failed", step=export.step, metric=metric, why=why)
        self._failed_metrics |= set(failed)
        return values

    def _has_failed(self, export: Export, error: Exception) -> None:
        """Begin anew with the next look, unless that has been done often enough."""
        self._let_go()
        self._num_failures += 1
        why = first_line(error.cause if isinstance(error, RayTaskError) else error)
        if not self._is_away:
            self._is_away = True
            _log.warning("Suites are not measured at step %d; training goes on, and it is tried again. %s", export.step, why)
            self._events.write("evaluator_away", step=export.step, why=why)
        if self._num_failures == MOST_FAILURES:
            _log.warning("Suites are measured no more while this attempt trains: %d attempts have failed. %s", MOST_FAILURES, why)
            self._events.write("evaluator_given_up", step=export.step, why=why)
            write_json(self._folder.given_up, {"why": why})

    def _let_go(self) -> None:
        answers, self._answers = self._answers, None
        if answers is not None:
            answers.end()


class RemoteAnswers:
    """An actor on the cluster that answers; made when it has its place.

    Args:
        ended: set when nobody waits for it any more.

    Raises:
        EvaluatorEnded, RayError: as `answer` does.
    """

    def __init__(self, plan: RunPlan, measured: WhileTrainingPlan, ended: threading.Event, events: EventLog) -> None:
        self._ended = ended
        device = "cuda" if measured.num_gpus else "cpu"
        self._actor: Any = (
            ray.remote(Answerer)
            .options(num_cpus=measured.num_cpus, num_gpus=measured.num_gpus, max_restarts=0)
            .remote(AnsweringPlan(device=device, threads=measured.num_cpus, tf32=plan.tf32))
        )
        try:
            there, started_s, is_said = self._actor.ready.remote(), time.monotonic(), False
            while not self._wait(there):
                if not is_said and time.monotonic() - started_s > UNPLACED_S:
                    is_said = True
                    events.write("evaluator_waits", cpus=measured.num_cpus, gpus=measured.num_gpus)
            node, pid = ray.get(there)
        except BaseException:
            self.end()
            raise
        events.write("evaluator_started", node=node, pid=pid)

    def answer(self, one: AskedModel, chunk: Chunk) -> dict[int, Given]:
        """What a model makes of a chunk.

        Raises:
            EvaluatorEnded: if nobody waits for it any more.
            RayError: if the actor is lost, or has raised something.
        """
        return self._result(self._actor.answer.remote(one, chunk))

    def forget(self, folder: str) -> None:
        self._result(self._actor.forget.remote(folder))

    def end(self) -> None:
        with suppress(RayError, ValueError):
            ray.kill(self._actor)

    def _result(self, reference: Any) -> Any:
        while not self._wait(reference):
            pass
        return ray.get(reference)

    def _wait(self, reference: Any) -> bool:
        """Wait for a moment; whether there is an answer, or an error."""
        if self._ended.is_set():
            raise EvaluatorEnded
        return bool(ray.wait([reference], timeout=ASK_EVERY_S)[0])
