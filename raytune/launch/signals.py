"""Ctrl-C and SIGTERM: what was started here is ended before this process goes."""

import os
import signal
import time
from types import FrameType

HANDED_ON = (signal.SIGTERM, signal.SIGINT)
"""Signals by which a person or a cluster asks a command to end."""

# A Ctrl-C or a `ray job stop` reaches a whole group of processes, and a parent hands it on: the same one again is no second wish.
_ONE_WISH_S = 1.0
_last_s: dict[int, float] = {}


def exit_code_of(number: int) -> int:
    """Of a process that a signal ended, as a shell counts it."""
    return 128 + number


def leave(number: int, frame: FrameType | None) -> None:
    """Handler that ends this process at once: while libraries are loaded there is nothing to let go of, and an exception would be
    lost in them."""
    if number == signal.SIGINT:
        os.write(2, b"interrupted; nothing was started\n")
    os._exit(exit_code_of(number))


def ends_in_order() -> None:
    """From now on there is something to let go of: a signal unwinds what goes on, where it would have left at once."""
    for number in HANDED_ON:
        if signal.getsignal(number) is leave:
            signal.signal(number, end_in_order)


def end_in_order(number: int, frame: FrameType | None) -> None:
    """Handler that unwinds the main thread, so that whoever holds something lets go of it.

    Raises:
        KeyboardInterrupt, SystemExit: for SIGINT, and for any other signal.
    """
    now = time.monotonic()
    if now - _last_s.get(number, float("-inf")) < _ONE_WISH_S:
        return
    _last_s[number] = now
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(exit_code_of(number))
