"""Functions of the user's that are told what happens to a run: they follow its folder in a thread of the driver.

No step waits for them, on no worker. They are called one after the other, each event in its order; where one is slow, those that
follow wait for it, and training does not.
"""

import inspect
import logging
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from raytune.errors import RaytuneError, UserError
from raytune.metrics.events import read_events
from raytune.metrics.follower import Follower
from raytune.metrics.points import Point, is_of_training
from raytune.object_store import once
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import RunFolder
from raytune.storage import is_local
from raytune.user_code import load, read_code

LOOK_EVERY_S, REMOTE_LOOK_EVERY_S = 1.0, 20.0
WAIT_AT_END_S = 60.0
"""For callbacks that are still at work when the run has ended."""

_log = logging.getLogger(__name__)

Kind = Literal[
    "started", "step", "evaluation", "saved", "rolled_back", "warning", "attempt_failed", "finished", "interrupted", "failed"
]
_KINDS: dict[str, Kind] = {
    "training_started": "started",
    "checkpoint_saved": "saved",
    "rolled_back": "rolled_back",
    "divergence": "warning",
    "overfitting": "warning",
    "update_skipped": "warning",
    "stopped_early": "warning",
    "attempt_failed": "attempt_failed",
    "run_finished": "finished",
    "run_interrupted": "interrupted",
}
"""By the event of the run folder. Others are raytune's own."""
_LAST: tuple[Kind, ...] = ("finished", "interrupted", "failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEvent:
    """What happened to a run."""

    kind: Kind
    """`started`: an attempt goes on from `step`; steps behind it that were told before are trained again. `step`: a logged one.
    `evaluation`, `saved` (a checkpoint that counts), `rolled_back` (by the divergence guard), `warning`, `attempt_failed`
    (another one follows), and at the end one of `finished`, `interrupted` and `failed`."""
    run: str
    folder: str
    attempt: int
    step: int | None
    """None where it is about no step."""
    time: float
    """Seconds since 1970."""
    metrics: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    """As in metrics.jsonl, of a step or an evaluation."""
    facts: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """What events.jsonl says besides."""

    @property
    def is_last(self) -> bool:
        """Whether it is the end of the run, as far as this command goes."""
        return self.kind in _LAST


Callback = Callable[[RunEvent], object]


def load_callbacks(names: Sequence[str]) -> list[Callback]:
    """The functions that a config names.

    Raises:
        UserError: if one of them is not here, or takes something else than one event.
    """
    return [_loaded(name) for name in names]


def _loaded(name: str) -> Callback:
    try:
        found = load(read_code(name))
    except UserError as error:
        raise UserError(str(error), keys=("callbacks",)) from error
    check_callback(found, name)
    return found


def check_callback(callback: Any, name: str) -> None:
    """Refuse what cannot be called with one event.

    Raises:
        UserError: if it cannot.
    """
    if not callable(callback):
        raise UserError(f"The callback {name} is no function, but of type {type(callback).__name__}.", keys=("callbacks",))
    with suppress(ValueError):  # of some functions that are not written in Python
        try:
            inspect.signature(callback).bind(None)
        except TypeError as error:
            raise UserError(f"The callback {name} cannot be called with one event: {error}.", keys=("callbacks",)) from error


@contextmanager
def calling(callbacks: Sequence[Callback], plan: RunPlan, *, look_every_s: float | None = None) -> Iterator[None]:
    """Tell callbacks what happens to a run as long as the block lasts, and how it ended."""
    if not callbacks:
        yield
        return
    folder = RunFolder(plan.storage, plan.name)
    every_s = look_every_s or (LOOK_EVERY_S if is_local(folder.path) else REMOTE_LOOK_EVERY_S)
    news, ended = News(folder), threading.Event()
    teller = _Teller(callbacks)
    thread = threading.Thread(target=_tell, args=(news, teller, every_s, ended), name="callbacks", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=WAIT_AT_END_S)
        if thread.is_alive():
            _log.warning("A callback is still at work %.0f s after the run has ended; it is left.", WAIT_AT_END_S)


def _tell(news: "News", teller: "_Teller", every_s: float, ended: threading.Event) -> None:
    is_over = False
    while not is_over:
        is_over = ended.wait(every_s)
        try:
            with once():
                found = news.look()
        except (RaytuneError, OSError) as error:  # the next look will tell
            if is_over:
                _log.warning("The last events of the run could not be read for its callbacks: %s", error)
            continue
        for event in found:
            teller.tell(event)
    if not teller.has_ended:
        teller.tell(news.failure())
    teller.close()


class _Teller:
    """Calls all callbacks, and says once of each that it failed."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = callbacks
        self._failures: Counter[int] = Counter()
        self.has_ended = False
        """Whether they know how the run ended."""

    def tell(self, event: RunEvent) -> None:
        self.has_ended = self.has_ended or event.is_last
        for number, callback in enumerate(self._callbacks):
            try:
                callback(event)
            except Exception:
                self._failures[number] += 1
                if self._failures[number] == 1:
                    _log.warning(
                        "The callback %s failed at the event %r. Training goes on, and so do its calls.\n%s",
                        _name_of(callback),
                        event.kind,
                        traceback.format_exc().rstrip(),
                    )

    def close(self) -> None:
        for number, count in self._failures.items():
            if count > 1:
                _log.warning("The callback %s failed at %d events in all.", _name_of(self._callbacks[number]), count)


def _name_of(callback: Callback) -> str:
    return getattr(callback, "__qualname__", type(callback).__name__)


class News:
    """What is new in a run folder since it was looked at before; of a run that goes on, since this was made."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder, self._metrics = folder, Follower(folder.metrics)
        self._known: dict[int, Point] = {}
        self._num_events = 0
        self._attempt = 0
        self.look()

    def look(self) -> list[RunEvent]:
        """What happened, in its order. What is measured after a save is known was measured before it."""
        told = read_events(self._folder.events)
        events = [event for number, event in enumerate(told) if number >= self._num_events]
        points = self._metrics.look()
        self._num_events = len(told)
        found = [one for event in events if (one := self._of_event(event))]
        found += [one for point in points for one in self._of_point(point)]
        return sorted(found, key=lambda one: one.time)  # stable: a step before its evaluation

    def failure(self) -> RunEvent:
        """The end of a run that wrote none."""
        return self._event("failed", self._attempt, None, max([0.0, *(point.time for point in self._known.values())]))

    def _of_event(self, event: Mapping[str, Any]) -> RunEvent | None:
        self._attempt = max(self._attempt, event["attempt"])
        facts = {name: value for name, value in event.items() if name not in ("event", "attempt", "time", "step")}
        kind = _KINDS.get(event["event"])
        if kind == "attempt_failed" and facts.get("decision") == "raise":
            kind = "failed"
        if kind is None:
            return None
        facts = facts if kind != "warning" else facts | {"warning": event["event"]}
        return self._event(kind, event["attempt"], event.get("step"), event["time"], facts=facts)

    def _of_point(self, point: Point) -> Iterator[RunEvent]:
        before = self._known.get(point.step)
        self._known[point.step] = point
        is_known = before is not None and (before.attempt, before.time) == (point.attempt, point.time)
        known = before.values if before and is_known else {}
        new = {name: value for name, value in point.values.items() if name not in known}
        for kind, is_its in (("step", is_of_training), ("evaluation", lambda name: not is_of_training(name))):
            if values := {name: value for name, value in new.items() if is_its(name)}:
                yield self._event(kind, point.attempt, point.step, point.time, metrics=values)

    def _event(
        self,
        kind: Any,
        attempt: int,
        step: int | None,
        time: float,
        *,
        metrics: Mapping[str, float] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> RunEvent:
        return RunEvent(
            kind=kind,
            run=self._folder.name,
            folder=self._folder.path,
            attempt=attempt,
            step=step,
            time=time,
            metrics=MappingProxyType(dict(metrics or {})),
            facts=MappingProxyType(dict(facts or {})),
        )
