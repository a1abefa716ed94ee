"""Who holds a run: one command at a time starts attempts of it. Decisions are pure; looks, clocks and processes are passed in.

<run>/lease/<number>.json is claimed by creating it, which succeeds once per number, and then renewed by its holder every few
seconds; the highest number counts. The clocks of two machines are never compared: a holder elsewhere counts as gone when its file
has stood still for EXPIRES_S of the own clock, one on this machine when its process is gone.
"""

import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Self

from raytune.errors import RaytuneError, RunHeldError, TakenOverError
from raytune.launch.state.record import RunRecord
from raytune.run_folder import RunFolder
from raytune.storage import create_bytes, exists, list_folder, read_bytes, remove_empty_folder, remove_folder, write_bytes
from raytune.training.checkpoints.commit import newest_attempt
from raytune.units import format_seconds

RENEW_EVERY_S = 5.0
"""How often a command also looks whether somebody asks it to end."""
EXPIRES_S = 60.0
LOOK_EVERY_S = 1.0

_log = logging.getLogger(__name__)


class StopAsked(KeyboardInterrupt):
    """Raised where a Ctrl-C would be: somebody asks for the end of a command from elsewhere."""


# --- Values and decisions (pure) ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """The process that holds a run, as others can find it."""

    host: str
    system: str | None
    """Names the running system and its table of processes, which containers of one host do not share; None: not known."""
    pid: int
    born: int | None
    """When the process started, in ticks of its system: a later process of the same pid has another one. None: not known."""
    job: str | None
    """Submission id of its Ray job."""
    since: str
    """Local time of its host, for people only."""

    def __str__(self) -> str:
        job = f", Ray job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A claim on a run."""

    number: int
    """Larger than that of every claim and every attempt before."""
    token: str
    """Random, so that nobody takes another's claim for the own one."""
    holder: Holder
    beat: int = 0
    """Counts renewals."""

    def encode(self) -> bytes:
        return (json.dumps(asdict(self), indent=2) + "\n").encode()

    @classmethod
    def decode(cls, content: bytes) -> Self | None:
        """The claim in a file, or None for one that is just being written or that another raytune wrote."""
        try:
            value = json.loads(content)
            return cls(**{**value, "holder": Holder(**value["holder"])})
        except (ValueError, TypeError, KeyError):
            return None


@dataclass(frozen=True, slots=True)
class Look:
    """What a look at the newest claim found."""

    number: int
    content: bytes
    at_s: float
    """By the own clock."""

    @property
    def lease(self) -> Lease | None:
        return Lease.decode(self.content)


class Standing(Enum):
    FREE = "free"
    HELD = "held"
    UNCLEAR = "unclear"


def standing(first: Look, newest: Look, holder_lives: bool | None) -> Standing:
    """Whether a claim still counts.

    Args:
        first, newest: two looks, which may be the same.
        holder_lives: whether the process of the newest claim is alive; None if that cannot be seen from here.
    """
    if holder_lives is not None:
        return Standing.HELD if holder_lives else Standing.FREE
    if (newest.number, newest.content) != (first.number, first.content):
        return Standing.HELD
    return Standing.FREE if newest.at_s - first.at_s >= EXPIRES_S else Standing.UNCLEAR


def is_held_by(lease: Lease, look: Look | None) -> bool:
    """Whether a claim is still the one that counts."""
    return look is not None and look.number == lease.number and look.lease is not None and look.lease.token == lease.token


# --- Processes ---------------------------------------------------------------------------------------------------------------


def this_process() -> Holder:
    pid = os.getpid()
    return Holder(
        host=os.uname().nodename,
        system=_system(),
        pid=pid,
        born=_born(pid),
        job=own_job(),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
    )


def own_job() -> str | None:
    """Submission id of the Ray job that this process is; None if it is none."""
    return json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {}).get("job_submission_id")


def lives(holder: Holder) -> bool | None:
    """Whether a process is alive; None if it belongs to another system or this one does not tell."""
    if holder.system is None or holder.system != _system():
        return None
    return holder.born is not None and _born(holder.pid) == holder.born


def _system() -> str | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{os.uname().nodename} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _born(pid: int) -> int | None:
    """When a process started, in ticks since its system did; None if it is no more, or waits to be buried by its parent."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


# --- Looking -----------------------------------------------------------------------------------------------------------------


class Watched:
    """A run whose claims are looked at again and again, by somebody who claims nothing."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._first: Look | None = None

    def look(self, clock: Callable[[], float] = time.monotonic) -> tuple[Standing, Holder | None]:
        """How its newest claim stands, and whose it is. FREE: there is none, or its holder is gone."""
        newest = _look(self._folder, clock)
        if newest is None:
            self._first = None
            return Standing.FREE, None
        if self._first is None or (newest.number, newest.content) != (self._first.number, self._first.content):
            moved, self._first = self._first is not None, newest
            if moved:
                return Standing.HELD, newest.lease.holder if newest.lease else None
        lease = newest.lease
        found = standing(self._first, newest, lives(lease.holder) if lease else None)
        return found, lease.holder if lease else None


# --- Claiming and holding ----------------------------------------------------------------------------------------------------


@contextmanager
def hold(folder: RunFolder) -> Iterator["Holding"]:
    """Hold a run for the duration of the block.

    Raises:
        RunHeldError: if another command holds it.
    """
    holding = Holding(folder, claim(folder, this_process()))
    remove_folder(folder.requests, folder.path)  # they were to a command that has ended
    thread = threading.Thread(target=holding.renew_for_ever, name=f"lease of {folder.name}", daemon=True)
    thread.start()
    try:
        yield holding
    finally:
        holding.release()


def claim(
    folder: RunFolder, holder: Holder, *, sleep: Callable[[float], None] = time.sleep, clock: Callable[[], float] = time.monotonic
) -> Lease:
    """Claim a run that nobody holds, or whose holder is gone. Takes EXPIRES_S where only time can tell that it is.

    Raises:
        RunHeldError: if its holder is alive.
    """
    first: Look | None = None
    while True:
        newest = _look(folder, clock)
        if newest is not None:
            first, watched_before = first or newest, first is not None
            lease = newest.lease
            found = standing(first, newest, lives(lease.holder) if lease else None)
            if found is Standing.HELD:
                raise _held(folder, lease)
            if found is Standing.UNCLEAR:
                if not watched_before:
                    _log.warning("%s Watching its heartbeat for up to %s.", _who(folder, lease), format_seconds(EXPIRES_S))
                sleep(LOOK_EVERY_S)
                continue
        record = RunRecord.read(folder)
        known = max(newest.number if newest else 0, newest_attempt(folder), record.attempts if record else 0)
        lease = Lease(number=known + 1, token=uuid.uuid4().hex, holder=holder)
        if create_bytes(_file(folder, lease.number), lease.encode()) and is_held_by(lease, _look(folder, clock)):
            _remove_older(folder, lease.number)
            return lease
        first = None  # somebody was faster


class Holding:
    """A claim that is being renewed.

    Args:
        lease: as it was claimed.
    """

    def __init__(self, folder: RunFolder, lease: Lease) -> None:
        self._folder, self._lease = folder, lease
        self._renewing = threading.Lock()
        self._released = threading.Event()
        self._lost: TakenOverError | None = None
        self._is_asked_to_end = False

    @property
    def number(self) -> int:
        """Of the claim: attempts of its holder are numbered no lower."""
        return self._lease.number

    def check(self) -> None:
        """Whether the run was still held when it was renewed last, and is to go on. Costs nothing.

        Raises:
            TakenOverError: if another command has taken it over.
            StopAsked: if somebody has asked for its end in its folder.
        """
        self._check_held()
        if self._is_asked_to_end:
            raise StopAsked("stopped as asked")

    def _check_held(self) -> None:
        if self._lost:
            raise self._lost

    def renew(self) -> None:
        """See whether the run is still held, say so to others, and hear what they ask.

        Raises:
            TakenOverError: if another command has taken it over.
        """
        with self._renewing:
            self._check_held()
            if self._released.is_set():
                return
            found = _look(self._folder, time.monotonic)
            if not is_held_by(self._lease, found):
                self._lost = _taken_over(self._folder, self._lease, found.lease if found else None)
                raise self._lost
            self._lease = replace(self._lease, beat=self._lease.beat + 1)
            write_bytes(_file(self._folder, self._lease.number), self._lease.encode())
            self._is_asked_to_end = self._is_asked_to_end or exists(self._folder.stop_request)

    def renew_for_ever(self) -> None:
        """Renew until the run is released or lost."""
        while not self._released.wait(RENEW_EVERY_S):
            try:
                self.renew()
            except TakenOverError as error:
                _log.error("%s", error)
                return
            except RaytuneError as error:  # the storage is away: nobody else can claim the run there either
                _log.warning("The lease of run %s could not be renewed: %s", self._folder.name, error)

    def release(self) -> None:
        """Let others claim the run at once. A run folder that holds nothing else goes too."""
        self._released.set()
        with self._renewing, suppress(RaytuneError):  # a lease that stays because the storage is away expires
            if is_held_by(self._lease, _look(self._folder, time.monotonic)):
                remove_folder(self._folder.requests, self._folder.path)
                remove_folder(_file(self._folder, self._lease.number), self._folder.path)
                remove_empty_folder(self._folder.leases)
                remove_empty_folder(self._folder.path)


def drop_claim_of(folder: RunFolder, pid: int) -> bool:
    """Let others claim a run that a process of this machine held until it ended.

    Returns:
        Whether it held the run.
    """
    newest = _look(folder, time.monotonic)
    lease = newest.lease if newest else None
    if lease is None or lease.holder.pid != pid or lives(lease.holder) is not False:
        return False
    remove_folder(_file(folder, lease.number), folder.path)
    remove_empty_folder(folder.leases)
    return True


def _file(folder: RunFolder, number: int) -> str:
    return f"{folder.leases}/{number}.json"


def _numbers(folder: RunFolder) -> list[int]:
    return sorted(
        int(name.removesuffix(".json")) for name in list_folder(folder.leases) if name.removesuffix(".json").isdecimal()
    )


def _look(folder: RunFolder, clock: Callable[[], float]) -> Look | None:
    """The newest claim, or None if there is none."""
    for number in reversed(_numbers(folder)):
        with suppress(FileNotFoundError):  # released since
            return Look(number, read_bytes(_file(folder, number)), clock())
    return None


def _remove_older(folder: RunFolder, number: int) -> None:
    for older in _numbers(folder):
        if older < number:
            remove_folder(_file(folder, older), folder.path)


def _who(folder: RunFolder, lease: Lease | None) -> str:
    who = lease.holder if lease else "a process that left no name"
    return f"Run {folder.name!r} in {folder.storage} is held by {who}."


def _held(folder: RunFolder, lease: Lease | None) -> RunHeldError:
    return RunHeldError(
        f"{_who(folder, lease)} It is alive, so nothing was started. Wait until it ends, or end it there: then the same command "
        f"continues the run. A holder that died without a word is noticed at once on its own machine, elsewhere "
        f"{format_seconds(EXPIRES_S)} after its last heartbeat."
    )


def _taken_over(folder: RunFolder, lease: Lease, other: Lease | None) -> TakenOverError:
    by = f"by {other.holder}" if other else "by another command"
    return TakenOverError(
        f"Run {folder.name!r} in {folder.storage} was taken over {by}, because this command ({lease.holder}) gave no sign "
        f"of life for {format_seconds(EXPIRES_S)}. This one ends and writes no more; the other one goes on."
    )
