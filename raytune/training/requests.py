"""What is asked of a run while it trains, agreed among its ranks at log steps.

A request comes to one rank first: its clock says that a save is due, for example. A rank that acted on what it alone has heard
would wait for the others in a collective that they are not in. So at log steps, where ranks wait for each other anyway, every
rank says what it has heard, and all of them act on all of it. One gather serves every kind of request; a run of which nothing
can be asked makes none.
"""

import time
from collections.abc import Callable, Collection, Sequence
from enum import Enum
from typing import Any


class Request(Enum):
    SAVE = "save"
    """Save after this step."""


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
