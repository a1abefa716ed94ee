"""Folders in which stores are built, beside the stores: a draft is held by one builder at a time, and the next one goes on with
what a killed builder left.

    <stores>/draft-<address>/lock             locked by its builder; the kernel lets go of it when that ends, however it does
                            /progress.json    how far that is, written again every few seconds
                            /shards/          see `finished_shards`
                            /store-<random>/  the store, before it is renamed to its address
            /draft-<random>/downloads/        files behind URLs, while they are read

A lock saves work, and nothing depends on it. Where storage has none, two builders share a draft: all that is put in place there
is whole, and equal whoever puts it.
"""

import errno
import fcntl
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from raytune.data.store.finished_shards import rows_in_progress
from raytune.local_files import local_errors
from raytune.units import format_seconds

SHARDS_FOLDER = "shards"
KEPT_S = 7 * 86400.0
"""How long what a killed builder left waits for the next one."""
STANDS_STILL_S = 120.0
"""A builder that has noted nothing for so long, though its draft is locked, is not waited for: its machine may be gone, and the
server of the files not know it."""
BEAT_S = 2.0
LOOK_S = 0.5

_LOCK, _PROGRESS = "lock", "progress.json"
_HAS_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildProgress:
    """How far a store is."""

    builder: str
    """The process."""
    is_own: bool
    """Whether that is this process, and not another that it waits for."""
    stage: Literal["reading", "tokenising", "packing"]
    done: int
    """Bytes that were read through; then rows that were tokenised."""
    found: int
    """Of these rows, those of shards that were done before."""
    total: int | None
    """Of what is done, about; None: nothing tells."""
    shards_found: int
    """That a build before this one left."""
    num_shards: int
    beat: int
    """Counts notes."""


def this_builder() -> str:
    """This process, in words."""
    return f"process {os.getpid()} on {os.uname().nodename}"


Report = Callable[[BuildProgress], None]
"""Takes the progress of a store, from a thread beside the building."""
Watch = Callable[[], AbstractContextManager[Report]]
"""A context that lasts as long as a store is built."""


@contextmanager
def unwatched() -> Iterator[Report]:
    """A watch that nobody keeps."""
    yield lambda progress: None


@contextmanager
def held(draft: Path, report: Report) -> Iterator[bool]:
    """Hold a draft, which is made if it is not there; waits while another builder holds it.

    Yields:
        Whether nobody else is at work there: not so where storage has no locks, or one who holds it gives no sign of life.
    """
    with local_errors(draft):
        lock = _locked(draft) or _waited_for(draft, report)
    try:
        yield lock is not None and lock.is_alone
    finally:
        if lock is not None:
            os.close(lock.descriptor)


def remove_unfinished(draft: Path) -> None:
    """Remove what a killed builder had not finished, from a draft that is held."""
    for folder in [*draft.glob(f"{SHARDS_FOLDER}/*.*"), *draft.glob("store-*"), *draft.glob("marks-*")]:
        shutil.rmtree(folder, ignore_errors=True)


def tidy(draft: Path, wanted: Collection[str], now_s: float) -> None:
    """Look through what other builders left: shards that are wanted move into a draft, and drafts of which something was wanted,
    or that are old, go.

    Args:
        draft: held.
        wanted: addresses of shards.
        now_s: seconds since 1970.
    """
    for other in draft.parent.glob("draft-*"):
        if other == draft or (lock := _locked(other, is_made=False)) is None:
            continue
        try:
            if not lock.is_alone:
                continue
            is_old = now_s - _changed_s(other) > KEPT_S
            adopted = [_adopted(other / SHARDS_FOLDER / name, draft / SHARDS_FOLDER / name) for name in wanted]
            if is_old or any(adopted):
                shutil.rmtree(other, ignore_errors=True)
        finally:
            os.close(lock.descriptor)


def _adopted(theirs: Path, own: Path) -> bool:
    if own.exists():
        return False
    try:
        own.parent.mkdir(exist_ok=True)
        os.rename(theirs, own)
    except OSError:  # most often: they have none
        return False
    return True


def _changed_s(folder: Path) -> float:
    """When something in a folder last changed."""
    changed = [0.0]
    for inner, _, names in os.walk(folder):
        for path in [inner, *(os.path.join(inner, name) for name in names)]:
            with suppress(OSError):
                changed.append(os.stat(path).st_mtime)
    return max(changed)


# --- Holding -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Lock:
    """Holds a draft until its descriptor is closed."""

    descriptor: int
    is_alone: bool
    """False where storage has no locks."""


def _locked(draft: Path, *, is_made: bool = True) -> _Lock | None:
    """The lock of a draft; None if another process holds it.

    Args:
        is_made: whether the draft and its lock are made if they are not there.
    """
    path = draft / _LOCK
    try:
        if is_made:
            draft.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT if is_made else os.O_RDWR, 0o644)
    except FileNotFoundError:  # just removed by a builder that is done
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held_file = os.fstat(descriptor)
        if os.path.samestat(held_file, os.stat(path)):
            return _Lock(descriptor, is_alone=True)
    except OSError as error:
        if error.errno in _HAS_NO_LOCKS:
            return _Lock(descriptor, is_alone=False)
        if error.errno not in (errno.EWOULDBLOCK, errno.ENOENT):
            os.close(descriptor)
            raise
    os.close(descriptor)  # another's; or that of a draft which was removed in the meantime
    return None


def _waited_for(draft: Path, report: Report) -> _Lock | None:
    """The lock of a draft that another builder held; None if that gives no sign of life."""
    last, since_s = None, time.monotonic()
    while (lock := _locked(draft)) is None:
        noted = _noted(draft)
        if noted != last:
            last, since_s = noted, time.monotonic()
        elif time.monotonic() - since_s > STANDS_STILL_S:
            _log.warning(
                "%s is held by %s, which has noted nothing for %s: going on beside it.",
                draft,
                noted.builder if noted else "another process",
                format_seconds(STANDS_STILL_S),
            )
            return None
        if noted:
            report(replace(noted, is_own=False))
        time.sleep(LOOK_S)
    return lock


# --- Progress ----------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Standing:
    """How far a builder is with a store, told by itself."""

    total_rows: int | None
    num_shards: int
    rows_done: int = 0
    """In shards that are done."""
    rows_found: int = 0
    shards_done: int = 0
    shards_found: int = 0
    is_packing: bool = False
    _beat: int = field(default=0, init=False)

    def progress(self, draft: Path) -> BuildProgress:
        self._beat += 1
        return BuildProgress(
            builder=this_builder(),
            is_own=True,
            stage="packing" if self.is_packing else "tokenising",
            done=self.rows_done + (0 if self.is_packing else rows_in_progress(draft / SHARDS_FOLDER)),
            found=self.rows_found,
            total=self.total_rows,
            shards_found=self.shards_found,
            num_shards=self.num_shards,
            beat=self._beat,
        )


@contextmanager
def noting(draft: Path, standing: Standing, report: Report) -> Iterator[None]:
    """Note and report progress every few seconds, from a thread of its own."""
    finished = threading.Event()
    thread = threading.Thread(target=_note, args=(draft, standing, report, finished), name="tokenising", daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def _note(draft: Path, standing: Standing, report: Report, finished: threading.Event) -> None:
    is_over = False
    while not is_over:
        progress = standing.progress(draft)
        beside = draft / f"{_PROGRESS}.{os.getpid()}"
        with suppress(OSError):  # a full disk is for the building to say
            beside.write_text(json.dumps(asdict(progress)))
            os.replace(beside, draft / _PROGRESS)
        report(progress)
        is_over = finished.wait(BEAT_S)


def _noted(draft: Path) -> BuildProgress | None:
    """What a builder last noted in its draft."""
    try:
        return BuildProgress(**json.loads((draft / _PROGRESS).read_text()))
    except (OSError, ValueError, TypeError):
        return None
