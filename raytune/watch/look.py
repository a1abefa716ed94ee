"""What the folders under a storage say, read again and again: of every file only what was added since the look before."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from pydantic import ValidationError

from raytune.config.load import dump_yaml
from raytune.config.sections.run import RunConfig
from raytune.config.sections.sweep import SweepSection
from raytune.errors import RaytuneError, UserError
from raytune.launch.attempts.lease import Holder, Standing, Watched
from raytune.launch.state.record import RunRecord, read_plan
from raytune.metrics.events import EventFollower
from raytune.metrics.follower import Follower
from raytune.object_store import once
from raytune.plan.costs.memory import bytes_in, tensor_bytes
from raytune.plan.run_plan import RunPlan
from raytune.printable import first_line
from raytune.run_folder import RunFolder, SweepFolder
from raytune.storage import exists, in_parallel, is_local, list_folder, local_path, read_bytes
from raytune.sweeps.ledger import Known, LedgerFollower

LOOK_EVERY_S, REMOTE_LOOK_EVERY_S = 1.0, 20.0
SETTLED_EVERY = 6
"""Of a run that has ended, every so many looks: another command may go on with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """What of a plan a person watches a run against."""

    num_steps: int
    memory_bytes: int
    """Of the rank that holds most."""
    usd_per_hour: float
    """0: its machines are not rented, or nobody has said which they are."""
    may_end_early: bool

    @classmethod
    def of(cls, plan: RunPlan) -> "Planned":
        on_gpu = plan.cluster.device == "cuda"
        cost = plan.cost
        usd = 0.0 if cost is None else cost.spot_usd if cost.is_spot and cost.spot_usd is not None else cost.usd
        return cls(
            num_steps=plan.optimization.num_steps,
            memory_bytes=tensor_bytes(plan.memory) if on_gpu else bytes_in(plan.memory, "device"),
            usd_per_hour=usd / cost.hours if cost and cost.hours else 0.0,
            may_end_early=plan.stopping.may_end,
        )


@dataclass(slots=True)
class FollowedRun:
    """What is known of a run. It is changed by the next look."""

    folder: RunFolder
    record: RunRecord | None = None
    planned: Planned | None = None
    standing: Standing = Standing.FREE
    holder: Holder | None = None
    """Of the newest claim."""
    metrics: Follower = field(init=False)
    events: EventFollower = field(init=False)
    at_work_s: float = 0.0
    """Over all attempts, from the first sign of life of each to its last."""
    problem: str | None = None
    """Why it cannot be read."""
    saves_soon: bool = False
    """Whether a save was asked for that has not been made yet."""
    stops_soon: bool = False

    @property
    def is_nothing_yet(self) -> bool:
        """Whether a command has only claimed the folder: it may become a run or a sweep."""
        return self.record is None

    def __post_init__(self) -> None:
        self.metrics, self.events = Follower(self.folder.metrics), EventFollower(self.folder.events)


@dataclass(slots=True)
class SweepSeen:
    """What is known of a sweep. It is changed by the next look."""

    folder: SweepFolder
    known: Known = field(default_factory=Known)
    trials: Mapping[str, FollowedRun] = field(default_factory=dict)
    """By name, those that have a folder."""
    section: SweepSection | None = None
    """None: another raytune wrote it, or it was not read yet."""
    standing: Standing = Standing.FREE
    holder: Holder | None = None
    is_finished: bool = False
    problem: str | None = None
    stops_soon: bool = False

    @property
    def is_nothing_yet(self) -> bool:
        return False


Seen = Sequence[FollowedRun | SweepSeen]


class Watcher:
    """Looks at a storage folder; or at one run or sweep, where that is what it is given.

    Raises:
        UserError: if there is no such folder.
    """

    def __init__(self, storage: str) -> None:
        self.storage = storage
        self.look_every_s = LOOK_EVERY_S if is_local(storage) else REMOTE_LOOK_EVERY_S
        self._only: str | None = None
        if exists(f"{storage}/run.json") or exists(f"{storage}/sweep.json"):
            self.storage, _, self._only = storage.rpartition("/")
        elif is_local(storage) and not local_path(storage).is_dir():
            raise UserError(f"There is no folder {storage}. Name the one that holds your runs: `storage` of their configs.")
        self._runs: dict[str, _RunLooks | _SweepLooks] = {}
        self._strangers: dict[str, int] = {}
        self._num_looks = 0

    def look(self) -> Seen:
        """Everything that is known by now, by name.

        Raises:
            RaytuneError: if the storage itself cannot be listed.
        """
        with once():
            names = [self._only] if self._only else list_folder(self.storage)
        for gone in self._runs.keys() - set(names):
            del self._runs[gone]
        for name in names:
            known = self._runs.get(name)
            if (known is None and self._is_due(name)) or (known is not None and known.seen.is_nothing_yet):
                self._add(name)
        in_parallel(lambda name: self._runs[name].look(self._num_looks), list(self._runs))
        self._num_looks += 1
        return [self._runs[name].seen for name in sorted(self._runs)]

    def _is_due(self, name: str) -> bool:
        """A folder that is neither a run nor a sweep is asked again from time to time: it may become one."""
        last = self._strangers.get(name)
        return last is None or is_local(self.storage) or self._num_looks - last >= SETTLED_EVERY

    def _add(self, name: str) -> None:
        run, sweep = RunFolder(self.storage, name), SweepFolder(self.storage, name)
        with suppress(RaytuneError, OSError), once():
            if exists(sweep.sweep):
                self._runs[name] = _SweepLooks(sweep)
            elif name not in self._runs and (exists(run.run) or exists(run.leases)):
                self._runs[name] = _RunLooks(run)
            elif name not in self._runs:
                self._strangers[name] = self._num_looks


class _RunLooks:
    def __init__(self, folder: RunFolder) -> None:
        self.seen = FollowedRun(folder)
        self._claims = Watched(folder)
        self._signs: dict[int, tuple[float, float]] = {}
        self._plan_of: int | None = None

    @property
    def is_settled(self) -> bool:
        record = self.seen.record
        return record is not None and record.state != "running" and self.seen.standing is Standing.FREE

    def look(self, number: int) -> None:
        """
        Args:
            number: of this look at the storage.
        """
        if self.is_settled and number % SETTLED_EVERY:
            return
        seen, folder = self.seen, self.seen.folder
        try:
            with once():
                seen.standing, seen.holder = self._claims.look()
                seen.record = RunRecord.read(folder)
                attempt = seen.record.attempts if seen.record else 0
                if attempt != self._plan_of and exists(folder.plan):
                    seen.planned, self._plan_of = Planned.of(read_plan(folder)), attempt
                self._note_signs()
                is_held = seen.standing is not Standing.FREE
                seen.saves_soon = is_held and exists(folder.save_request)
                seen.stops_soon = is_held and exists(folder.stop_request)
            seen.problem = None
        except (RaytuneError, OSError) as error:
            seen.problem = first_line(error)

    def _note_signs(self) -> None:
        seen = self.seen
        events, are_all = seen.events.look()
        points = seen.metrics.look()
        if are_all and events:
            self._signs.clear()
            points = seen.metrics.points
        for attempt, at in (*((event["attempt"], event["time"]) for event in events), *((p.attempt, p.time) for p in points)):
            first, last = self._signs.get(attempt, (at, at))
            self._signs[attempt] = min(first, at), max(last, at)
        seen.at_work_s = sum(last - first for first, last in self._signs.values())


class _SweepLooks:
    def __init__(self, folder: SweepFolder) -> None:
        self.seen = SweepSeen(folder)
        self._as_run = RunFolder(folder.storage, folder.name)
        self._claims = Watched(self._as_run)
        self._ledger = LedgerFollower(folder.ledger)
        self._trials: dict[str, _RunLooks] = {}

    def look(self, number: int) -> None:
        seen = self.seen
        if seen.is_finished and seen.standing is Standing.FREE and number % SETTLED_EVERY:
            return
        try:
            with once():
                seen.standing, seen.holder = self._claims.look()
                seen.known = self._ledger.look()
                seen.is_finished = exists(seen.folder.result)
                seen.stops_soon = seen.standing is not Standing.FREE and exists(self._as_run.stop_request)
                if seen.section is None:
                    with suppress(ValidationError):  # another raytune's
                        seen.section = RunConfig.model_validate_json(read_bytes(seen.folder.sweep)).sweep
            seen.problem = None
        except (RaytuneError, OSError) as error:
            seen.problem = first_line(error)
            return
        for name in seen.known.trials.keys() - self._trials.keys():
            self._trials[name] = _RunLooks(seen.folder.trial(name))
        for trial in self._trials.values():
            trial.look(number)
        seen.trials = {name: trial.seen for name, trial in self._trials.items()}


def asked_of(record: RunRecord) -> str:
    """How a run was asked for, as YAML of what differs from the defaults; nothing of another raytune's config."""
    with suppress(ValidationError):
        return dump_yaml(RunConfig.model_validate(record.config))
    return ""


def looking(watcher: Watcher, tell: Callable[[Seen], None], is_over: Callable[[float], bool]) -> None:
    """Look until it is over, and tell each time what is known; a storage that is away is tried again.

    Args:
        is_over: waits so many seconds, or until it is over.
    """
    while True:
        started = time.monotonic()
        with suppress(RaytuneError, OSError):
            tell(watcher.look())
        if is_over(max(0.2, watcher.look_every_s - (time.monotonic() - started))):
            return
