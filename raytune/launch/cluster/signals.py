"""Ctrl-C and SIGTERM: what was started here is ended before this process goes."""

import os
import signal
import sys
import threading
import time
from types import FrameType

HANDED_ON = (signal.SIGTERM, signal.SIGINT)
"""Signals by which a person or a cluster asks a command to end."""

# A Ctrl-C or a `ray job stop` reaches a whole group of processes, and a parent hands it on: the same one again is no second wish.
_ONE_WISH_S = 1.0
_AGAIN_S = 0.05
_last_s: dict[int, float] = {}
_raised: dict[int, BaseException] = {}
"""What the handler raised last for a signal."""


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
            unwind_at(number)


def unwind_at(number: int) -> None:
    """Have a signal unwind the main thread, wherever it finds it."""
    global _other_hook
    signal.signal(number, end_in_order)
    if sys.unraisablehook is not _raised_again:
        _other_hook, sys.unraisablehook = sys.unraisablehook, _raised_again


def end_in_order(number: int, frame: FrameType | None) -> None:
    """Handler that unwinds the main thread, so that whoever holds something lets go of it.

    Raises:
        KeyboardInterrupt, SystemExit: for SIGINT, and for any other signal.
    """
    now = time.monotonic()
    if now - _last_s.get(number, float("-inf")) < _ONE_WISH_S:
        return
    _last_s[number] = now
    _raised[number] = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(exit_code_of(number))
    raise _raised[number]


_other_hook = sys.unraisablehook


def _raised_again(unraisable: "sys.UnraisableHookArgs") -> None:
    """Hook for exceptions that Python drops: a signal's, raised inside a finaliser or a hook of a fork, would be lost there, and
    the command went on. So the signal comes once more, when that is over."""
    number = next((number for number, raised in _raised.items() if raised is unraisable.exc_value), None)
    if number is None:
        _other_hook(unraisable)
        return
    del _last_s[number]
    again = threading.Timer(_AGAIN_S, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()
