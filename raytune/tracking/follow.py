"""Tells one run to one tracker, each thing once, from its folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from raytune.config.sections.tracking import TrackingSection
from raytune.credentials import redacted
from raytune.metrics.events import read_events
from raytune.metrics.follower import Follower
from raytune.metrics.history import History
from raytune.metrics.json_numbers import encode_number
from raytune.metrics.points import Point
from raytune.plan.run_plan import RunPlan
from raytune.printable import in_a_line
from raytune.run_folder import RunFolder
from raytune.storage import (
    download_file,
    download_folder,
    exists,
    is_local,
    local_path,
    read_bytes,
    read_from,
    read_json,
    write_json,
)
from raytune.tracking.told import happening_of, page_mark, result_of, settings_of
from raytune.tracking.tracker import Row, Status, TrackedRun, Tracker


class TrackerAwayError(Exception):
    """A tracker did not take what it was told. The text says why, in a line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What the run folder notes about a tracker."""

    run_id: str
    place: str
    num_bytes: int = 0
    """Of metrics.jsonl, of which it knows everything."""
    num_events: int = 0
    status: Status | None = None
    """How the run ended, as it was told; None: not yet."""

    @classmethod
    def read(cls, path: str) -> Self | None:
        return cls(**read_json(path)) if exists(path) else None


class Following:
    """One run and one tracker.

    Args:
        name: of the tracker.
        sweep: folder of the sweep that the run is a trial of, with the sweep's name in it.
    """

    def __init__(self, name: str, tracker: Tracker, folder: RunFolder, section: TrackingSection, sweep: RunFolder | None) -> None:
        self._tracker, self._folder, self._section, self._sweep = tracker, folder, section, sweep
        self._note = folder.tracking(name)
        self._metrics = Follower(folder.metrics)
        self._cuts = self._metrics.cuts
        self._known: dict[int, Point] = {}
        """What the tracker was told, by step."""
        self._untold: dict[int, Point] = {}
        self._events: list[dict] = []
        self._told: Told | None = None
        """None: its run is not open."""

    @property
    def last_event(self) -> str | None:
        """What happened last to the run."""
        return self._events[-1]["event"] if self._events else None

    @property
    def is_complete(self) -> bool:
        """Whether an earlier command has told everything of a run that has finished."""
        told = Told.read(self._note)
        return told is not None and told.place == self._tracker.place and told.status == "finished"

    @property
    def has_begun(self) -> bool:
        return exists(self._folder.run) and exists(self._folder.plan)

    def look(self) -> None:
        """Tell what is new.

        Raises:
            TrackerAwayError: if the tracker does not take it; the next look tells it.
            UserError, ClusterError: if the run folder cannot be read.
        """
        if not self.has_begun:
            return
        self._read()
        if self._told is None:
            self._start()
        self._tell_points()
        self._tell_events()

    def end(self, status: Status | None) -> None:
        """Tell the rest, and how the run ended. May be called again when the tracker was away.

        Raises:
            TrackerAwayError, UserError, ClusterError: as `look` does.
        """
        self.look()
        if self._told is None:
            return
        result = read_json(self._folder.result) if status == "finished" and exists(self._folder.result) else None
        with _files(self._folder, self._section.log_model and result is not None) as (files, model), self._to_tracker():
            if result is not None:
                self._tracker.result(result_of(result), self._metrics.last_step, self._events[-1]["time"])
            if files or model:
                self._tracker.files(files, model)
            self._tracker.end(status)
        self._save(status=status)
        self._told = None

    def _read(self) -> None:
        for point in self._metrics.look():
            self._untold[point.step] = point
        self._events = read_events(self._folder.events)

    def _start(self) -> None:
        told = Told.read(self._note)
        if told is not None and told.place != self._tracker.place:
            told = None
        run = self._run()
        with self._to_tracker():
            started = self._tracker.start(run, told.run_id if told else None)
        if told is None or not started.keeps:
            told = Told(run_id=started.run_id, place=self._tracker.place)
        self._told = told
        sent = read_from(self._folder.metrics, 0)[: told.num_bytes] if told.num_bytes else b""
        self._known = {point.step: point for point in History.parse(sent, self._folder.metrics).points}
        self._untold = {point.step: point for point in self._metrics.points}
        self._cuts = (0, 0)
        self._save(status=None)

    def _run(self) -> TrackedRun:
        record, plan = read_json(self._folder.run), RunPlan.model_validate_json(read_bytes(self._folder.plan))
        section, name = self._section, self._folder.name
        shown = section.run_name or (self._sweep.name if self._sweep else name)
        return TrackedRun(
            name=f"{shown} {name}" if self._sweep else shown,
            key=sha256(f"{self._folder.path} {record['created']}".encode()).hexdigest()[:16],
            place=f"{self._sweep.name}/{name}" if self._sweep else name,
            group=section.group or (self._sweep.name if self._sweep else None),
            sweep=self._sweep.path if self._sweep else None,
            tags=section.tags,
            settings=settings_of(record["config"], plan),
        )

    def _tell_points(self) -> None:
        if self._metrics.cuts != self._cuts:
            self._take_back()
        rows = [row for step in sorted(self._untold) if (row := self._row(self._untold[step]))]
        if rows:
            with self._to_tracker():
                self._tracker.metrics(rows)
        if self._untold:
            self._known |= self._untold
            self._untold = {}
            self._save(num_bytes=self._metrics.num_bytes)

    def _take_back(self) -> None:
        """Where training went back: the tracker forgets what stands no more."""
        gone = [step for step, point in self._known.items() if not self._metrics.stands(point)]
        self._untold = {step: point for step, point in self._untold.items() if self._metrics.stands(point)}
        if gone:
            first = min(gone)
            with self._to_tracker():
                keeps = self._tracker.forget(first)
            self._known = {step: point for step, point in self._known.items() if step < first} if keeps else {}
            self._untold |= {point.step: point for point in self._metrics.points if point.step not in self._known}
            if not keeps:
                self._save(num_bytes=0, num_events=0)
        self._cuts = self._metrics.cuts

    def _row(self, point: Point) -> Row | None:
        """What the tracker does not know of a point."""
        before = self._known.get(point.step)
        known = before.values if before and before.time == point.time else {}
        new = {name: value for name, value in point.values.items() if name not in known or _differ(known[name], value)}
        return Row(step=point.step, time=point.time, values=new) if new else None

    def _tell_events(self) -> None:
        assert self._told is not None
        num_known = self._told.num_events
        if len(self._events) > num_known:
            happenings, last_step = [], 0
            for event in self._events:
                last_step = event.get("step") or last_step
                happenings.append(happening_of(event, last_step))
            with self._to_tracker():
                self._tracker.happened(happenings, num_known)
            self._save(num_events=len(self._events))

    def _save(self, **changes: Any) -> None:
        assert self._told is not None
        self._told = replace(self._told, **changes)
        write_json(self._note, asdict(self._told))

    @contextmanager
    def _to_tracker(self) -> Iterator[None]:
        """What a library raises, whatever it is, means that its tracker is away."""
        try:
            yield
        except Exception as error:
            self._told = None
            first = _first_cause(error)
            raise TrackerAwayError(in_a_line(redacted(f"{type(first).__name__}: {first}"))) from error


def _first_cause(error: BaseException) -> BaseException:
    """Under what libraries lay over it: a refused connection, for example."""
    while (under := error.__cause__ or error.__context__) is not None:
        error = under
    return error


def _differ(one: float, other: float) -> bool:
    """Whether two numbers differ, not-a-number being equal to itself."""
    return encode_number(one) != encode_number(other)


def _has_page(folder: RunFolder) -> bool:
    """Whether there is a page, and it is of how the run stands: one that failed and was continued may have an older one."""
    return exists(folder.report) and page_mark(read_json(folder.run)).encode() in read_bytes(folder.report)


@contextmanager
def _files(folder: RunFolder, with_model: bool) -> Iterator[tuple[list[Path], Path | None]]:
    """What the run folder has to give, on this machine for as long as the block lasts; the folder of the model, if asked for."""
    there = [path for path in (folder.run, folder.plan, folder.result) if exists(path)]
    there += [folder.report] if _has_page(folder) else []
    if is_local(folder.path):
        yield [local_path(path) for path in there], local_path(folder.model) if with_model else None
        return
    with TemporaryDirectory() as here:
        files = [Path(here, path.rpartition("/")[2]) for path in there]
        for path, file in zip(there, files):
            download_file(path, file)
        if with_model:
            download_folder(folder.model, Path(here, "model"))
        yield files, Path(here, "model") if with_model else None
