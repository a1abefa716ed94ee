"""What is asked of a run while it trains, agreed among its ranks at log steps.

A request comes to one rank first: its clock says that a save is due, for example. A rank that acted on what it alone has heard
would wait for the others in a collective that they are not in. So at log steps, where ranks wait for each other anyway, every
rank says what it has heard, and all of them act on all of it. One gather serves every kind of request; a run of which nothing
can be asked makes none.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import Enum
from typing import Any

from raytune.errors import RaytuneError
from raytune.object_store import once
from raytune.run_folder import RunFolder
from raytune.storage import is_local, read_bytes, remove_folder

LOOK_EVERY_S, REMOTE_LOOK_EVERY_S = 2.0, 15.0


class Request(Enum):
    SAVE = "save"
    """Save after this step."""
    TAKE_RESULTS = "take results"
    """Take what suites came to that somebody has measured beside the run."""


Source = Callable[[], Collection[Request]]
"""What this rank has heard and nobody has answered yet."""


class Requests:
    """The requests to one run.

    Args:
        sources: of this rank; as many on every rank.
        gather: every rank's value, on every rank.
    """

    def __init__(self, sources: Sequence[Source], gather: Callable[[Any], list[Any]]) -> None:
        self._sources, self._gather = sources, gather

    def agreed(self) -> frozenset[Request]:
        """What any rank has heard, on every rank. Every rank calls it after the same steps."""
        if not self._sources:
            return frozenset()
        heard = {request for source in self._sources for request in source()}
        return frozenset().union(*self._gather(heard))


class SaveClock:
    """Asks for a save when so many seconds have passed since the last one.

    Args:
        clock: in seconds.
    """

    def __init__(self, every_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._every_s, self._clock = every_s, clock
        self._last_s = clock()

    def __call__(self) -> Collection[Request]:
        return {Request.SAVE} if self._clock() - self._last_s >= self._every_s else ()

    def saved(self) -> None:
        """The run has just been saved, on request or not."""
        self._last_s = self._clock()


class SaveFile:
    """Asks for a save while there is a file in the run folder that does (`RunFolder.save_request`).

    The storage is looked at by a thread of its own, so that no step waits for it; on one rank, while the others hear nothing.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._heard: bytes | None = None
        self._answered: bytes | None = None

    def __call__(self) -> Collection[Request]:
        return {Request.SAVE} if self._heard not in (None, self._answered) else ()

    def saved(self) -> None:
        """The run has just been saved, on request or not."""
        self._answered = self._heard

    def look(self) -> None:
        """See what the folder asks, and take away what was answered; another request may have come since."""
        with suppress(RaytuneError, OSError), once():  # a later look will tell
            self._heard = found = _content(self._folder.save_request)
            if found is not None and found == self._answered:
                remove_folder(self._folder.save_request, self._folder.requests)


def _content(path: str) -> bytes | None:
    try:
        return read_bytes(path)
    except FileNotFoundError:
        return None


@contextmanager
def listening(
    folder: RunFolder, rank: int, look_every_s: float | None = None, beside: Sequence[Callable[[], None]] = ()
) -> Iterator[SaveFile]:
    """Hear what the folder of a run asks, before the block and as long as it lasts; rank 0 looks.

    Args:
        beside: what else it looks at.
    """
    file, ended = SaveFile(folder), threading.Event()
    if rank != 0:
        yield file
        return
    every_s = look_every_s or (LOOK_EVERY_S if is_local(folder.path) else REMOTE_LOOK_EVERY_S)

    looks = (file.look, *beside)

    def look_for_ever() -> None:
        while not ended.wait(every_s):
            for look in looks:
                look()

    for look in looks:
        look()

    thread = threading.Thread(target=look_for_ever, name=f"requests to {folder.name}", daemon=True)
    thread.start()
    try:
        yield file
    finally:
        ended.set()
