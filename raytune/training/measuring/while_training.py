"""Suites while training goes on, as the ranks see it: they write the model where it is due, and measure it themselves between
steps, or hear later what somebody beside them has measured.

Nothing here changes what is trained, and nothing that goes wrong ends it: it is said once. Weights are read and not written; what
is drawn on the way is of no consequence, since each step seeds what it draws.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress

from raytune.errors import RaytuneError
from raytune.evaluation.answers import all_chunks, together
from raytune.evaluation.judging import values_of
from raytune.evaluation.questions import by_suite, from_json_lines
from raytune.metrics.history import History
from raytune.model.inference import HeldModels, asked_of_run
from raytune.object_store import once
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import RunFolder
from raytune.storage import exists, file_sizes, read_bytes
from raytune.training.checkpoints.checkpoint import Report
from raytune.training.checkpoints.peers import Peers, gather_in_own_group
from raytune.training.engines.engine import Engine
from raytune.training.measuring import exports
from raytune.training.measuring.exports import Export, SuiteResult
from raytune.training.measuring.final import PATIENCE_S, write_model
from raytune.training.measuring.suites import of_model
from raytune.training.steps.requests import Request

LOOK_EVERY_S = 0.5
"""At the end of a run, which waits."""


class Results:
    """What others make of the exports of a run, as the thread that listens finds it. On rank 0; the others hear nothing.

    A `Source` of requests: that results are taken.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder, self._lock = folder, threading.Lock()
        self._awaited: dict[int, Export] = {}
        self._found: list[SuiteResult] = []

    def __call__(self) -> Collection[Request]:
        return {Request.TAKE_RESULTS} if self._found else ()

    def begin(self, found: Iterable[SuiteResult], awaited: Iterable[Export]) -> None:
        """Forget what was expected; from now on expect this."""
        with self._lock:
            self._found = list(found)
            self._awaited = {export.step: export for export in awaited}

    def expect(self, export: Export) -> None:
        with self._lock:
            self._awaited[export.step] = export

    def look(self) -> None:
        """See what is there by now. A newer result says that older exports have been left out."""
        with self._lock:
            steps = sorted(self._awaited)
        with suppress(RaytuneError, OSError, ValueError, KeyError, TypeError), once():  # a later look will tell
            for step in steps:
                result = exports.read_result(self._folder, step)  # without the lock: training would wait with it for a storage
                with self._lock:
                    if result is not None and result.export == self._awaited.get(step):
                        self._found.append(result)
                        self._awaited = {other: export for other, export in self._awaited.items() if other > step}

    def take(self) -> list[SuiteResult]:
        """What was found since the last time."""
        with self._lock:
            found, self._found = self._found, []
            return found

    @property
    def awaits(self) -> int | None:
        """Step of the newest export that nothing is known of yet."""
        with self._lock:
            return max(self._awaited, default=None)


class WhileTraining:
    """The suites that a run measures on its way; where there are none, nothing happens. Every rank builds one, and calls its
    methods at the same points.

    Args:
        report: told what becomes of it, as `EventLog.write`.
    """

    def __init__(self, plan: RunPlan, engine: Engine, folder: RunFolder, report: Report) -> None:
        self._plan, self._engine, self._folder, self._report = plan, engine, folder, report
        self._measured = plan.evaluation.while_training
        self._has_failed = False
        self._failed_metrics: set[str] = set()
        self._results: Results | None = None
        if self._measured is None:
            return
        gather = gather_in_own_group(engine.world_size, PATIENCE_S)
        self._peers = Peers(engine.rank, gather, RaytuneError)
        if self._measured.where == "spare":
            self._results = Results(folder)

    @property
    def sources(self) -> list[Results]:
        """Of requests, on every rank."""
        return [self._results] if self._results else []

    @property
    def looks(self) -> list[Callable[[], None]]:
        """What rank 0 has to look at now and then, in a thread."""
        return [self._results.look] if self._results else []

    def begin(self, step: int, learn: Callable[[int, dict[str, float]], None]) -> None:
        """Go on from a step: what was measured behind it is no part of the run.

        Args:
            learn: told on rank 0 what is known of the steps before.
        """
        if self._measured is None:
            return
        try:
            self._peers.decide(lambda: self._begin(step, learn))
        except RaytuneError as error:
            self._say("suites_not_measured", step=step, reason=str(error))

    def _begin(self, step: int, learn: Callable[[int, dict[str, float]], None]) -> None:
        assert self._measured is not None
        exports.forget_after(self._folder, step)
        names, known = self._measured.metrics, set()
        for point in History.read(self._folder.metrics).points:
            if values := {name: value for name, value in point.values.items() if name in names and point.step <= step}:
                learn(point.step, values)
                known.add(point.step)
        if self._results:
            found = [result for result in exports.results_in(self._folder) if result.export.step not in known]
            settled = known | {result.export.step for result in found}
            there = exports.exports_in(self._folder)
            self._results.begin(found, [export for export in there if export.step > max(settled, default=-1)])

    def after(self, step: int) -> dict[str, float]:
        """Measure the model as it is after a step, or have it measured; what is known at once, on every rank."""
        if self._measured is None:
            return {}
        export = Export.new(step)
        try:
            export = self._peers.decide(lambda: export)
            self._write(export)
            if self._results:
                self._results.expect(export)
                return {}
            return self._measure(export)
        except RaytuneError as error:  # the same on every rank
            self._say("suites_not_measured", step=step, reason=str(error))
            return {}
        finally:
            if not self._results and self._engine.rank == 0:
                with suppress(RaytuneError, OSError):
                    exports.remove_all(self._folder)

    def _write(self, export: Export) -> None:
        path, started_s = export.path(self._folder), time.perf_counter()
        try:
            with self._engine.averaged():
                self._peers.together(lambda: write_model(self._plan, self._engine, path))
            self._peers.decide(lambda: exports.complete(self._folder, export))
        except RaytuneError:
            if self._engine.rank == 0:
                with suppress(RaytuneError, OSError):
                    exports.remove(self._folder, export)
            raise
        if self._engine.rank == 0:
            num_bytes = sum(file_sizes(path).values())
            self._report("exported", step=export.step, seconds=time.perf_counter() - started_s, num_bytes=num_bytes)
            if self._results:
                exports.remove_old(self._folder)

    def _measure(self, export: Export) -> dict[str, float]:
        """What a saved model is worth, by all ranks, each with its share of the rows."""
        assert self._measured is not None
        started_s, suites, engine = time.perf_counter(), self._measured.suites, self._engine
        asked = by_suite(suites, from_json_lines(read_bytes(self._folder.questions)))
        own = all_chunks(suites, asked)[engine.rank :: engine.world_size]
        _, tuned = asked_of_run(self._plan, export.path(self._folder))

        def answered() -> dict:
            with HeldModels(engine.device) as models:
                return of_model(models, tuned, own)

        parts = self._peers.together(answered)
        judge = self._peers.decide
        found, failed = judge(lambda: values_of(suites, asked, together(parts, asked), device=str(engine.device)))
        for metric, why in failed.items():
            if metric not in self._failed_metrics:
                self._report("metric_failed", step=export.step, metric=metric, why=why)
        self._failed_metrics |= set(failed)
        self._report("suites_measured", step=export.step, seconds=time.perf_counter() - started_s)
        return found

    def take(self) -> list[SuiteResult]:
        """Results that have come since the last time, on rank 0; none on others."""
        return self._results.take() if self._results else []

    def look(self) -> None:
        """See on rank 0 what has come by now."""
        if self._results and self._engine.rank == 0:
            self._results.look()

    def wait(self) -> None:
        """Look once more after the last step, and where a suite ranks checkpoints wait until the last export is measured, for as
        long as the plan says. Every rank calls it."""
        if self._results is None or self._measured is None:
            return
        with suppress(RaytuneError):
            waits = self._plan.checkpoint.metric in self._measured.metrics
            self._peers.decide(self._wait if waits else self.look)

    def _wait(self) -> None:
        assert self._results is not None
        assert self._measured is not None
        results, deadline = self._results, time.monotonic() + self._measured.wait_s
        step, is_said = results.awaits, False
        while (results.look(), results.awaits)[1] is not None:
            if exists(self._folder.given_up) or time.monotonic() > deadline:
                self._say("suites_not_awaited", step=step)
                return
            if not is_said:
                self._report("suites_awaited", step=step, seconds=self._measured.wait_s)
                is_said = True
            time.sleep(LOOK_EVERY_S)

    def _say(self, event: str, **facts: object) -> None:
        """Once: whatever goes wrong here may go wrong again."""
        if not self._has_failed:
            self._report(event, **facts)
        self._has_failed = True
