"""A parent for commands that Ray may end without a word.

Where a cluster's head or the node under a driver is lost, Ray's C++ ends the driver's process, with exit code 1 and no exception.
So such a command works in a child of the process that was started, and tells its parent what it is about: the parent hands
signals on, and where the child ended without saying so, it writes down why and says it. It has loaded nothing yet when it parts,
so the child costs a millisecond. Where the parent is killed, the child is too.
"""

import ctypes
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

import click

from raytune.cli.say import say
from raytune.errors import EXIT_RETRY_LATER
from raytune.launch.cluster.signals import HANDED_ON, ends_in_order, exit_code_of

VERBS = ("train", "sweep", "find-rate", "score", "evaluate", "generate", "serve", "plan", "preflight")
_PR_SET_PDEATHSIG = 1
_SHOW_CURSOR = "\x1b[?25h"


class Notes:
    """What a command tells its parent.

    Args:
        descriptor: of the pipe to it; None: there is no parent.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self._descriptor = descriptor

    def tell(self, **facts: Any) -> None:
        """Facts by name (those of `lost.Driver`); later ones count."""
        if self._descriptor is not None:
            with suppress(OSError):
                os.write(self._descriptor, json.dumps(facts).encode() + b"\n")


def notes() -> Notes:
    """Those of the command that is being answered."""
    told = click.get_current_context().obj
    return told if isinstance(told, Notes) else Notes()


def begin_on(cluster: str | None) -> Notes:
    """Begin to work on a cluster: the parent knows which, and from now on signals end the command in order.

    Args:
        cluster: as the user named it; None: inside this machine.

    Returns:
        The notes of the command, for what else it has to tell.
    """
    told = notes()
    told.tell(cluster=cluster)
    ends_in_order()
    return told


def supervised(answer: Callable[[Notes], None], arguments: Sequence[str]) -> None:
    """Answer a command, in a child if it is one that talks to Ray.

    Args:
        answer: raises SystemExit when it is done.
    """
    verb = next((argument for argument in arguments if not argument.startswith("-")), None)
    if verb not in VERBS or sys.platform != "linux":
        ends_in_order()  # it may have sent a job, or hold half a file, at any time
        answer(Notes())
        return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    awaited = [number for number in HANDED_ON if signal.getsignal(number) is not signal.SIG_IGN] + [signal.SIGCHLD]
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    reading, writing = os.pipe()
    hearing, heard = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child:
        os.close(writing)
        os.close(heard)
        _answer_for(child, reading, _Signals(child, hearing), awaited, verb, as_json="--json" in arguments)
    os.close(reading)
    os.close(hearing)
    os.set_blocking(heard, False)
    signal.set_wakeup_fd(heard, warn_on_full_buffer=False)
    told = Notes(writing)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(EXIT_RETRY_LATER)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, awaited)
    try:
        answer(told)
    except SystemExit as end:
        told.tell(ended=end.code if isinstance(end.code, int) else int(end.code is not None))
        raise
    except Exception:  # a fault of ours, whose traceback comes now: Ray has not ended this process
        told.tell(ended=1)
        raise


class _Signals:
    """Hands signals on to the child, unless it got them too: a terminal and `ray job stop` signal a whole group of processes.

    Args:
        hearing: pipe into which the child's Python writes the number of each signal that reaches it.
    """

    def __init__(self, child: int, hearing: int) -> None:
        self._child, self._hearing = child, hearing
        self._heard, self._handed_on = Counter[int](), Counter[int]()
        os.set_blocking(hearing, False)

    def hand_on(self, number: int) -> None:
        with suppress(BlockingIOError):
            self._heard.update(os.read(self._hearing, 1 << 12))
        if self._heard[number] > self._handed_on[number]:
            self._heard[number] -= 1
            return
        self._handed_on[number] += 1
        with suppress(ProcessLookupError):
            os.kill(self._child, number)


def _answer_for(child: int, reading: int, signals: _Signals, awaited: Sequence[int], verb: str, *, as_json: bool) -> NoReturn:
    """Wait for the child, hand signals on to it, and end as it did."""
    received, status = 0, 0
    while True:
        number = signal.sigwaitinfo(awaited).si_signo
        if number != signal.SIGCHLD:
            received = received or number
            signals.hand_on(number)
            continue
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
    facts = _told(reading)
    code, by_signal = os.waitstatus_to_exitcode(status), os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    if "ended" in facts:
        code = facts["ended"]
    elif code in map(exit_code_of, HANDED_ON):
        pass
    elif by_signal is not None and by_signal in HANDED_ON:
        code = exit_code_of(by_signal)
    elif not received:
        code = EXIT_RETRY_LATER
        _say_lost(facts | {"pid": child, "signal": by_signal, "verb": verb}, as_json=as_json)
    if received and code:
        code = exit_code_of(received)
    sys.stdout.flush()
    os._exit(code)


def _told(reading: int) -> dict[str, Any]:
    """Everything that the child has told."""
    os.set_blocking(reading, False)
    content = b""
    with suppress(BlockingIOError):
        while piece := os.read(reading, 1 << 16):
            content += piece
    facts: dict[str, Any] = {}
    for line in content.splitlines():
        facts |= json.loads(line)
    return facts


def _say_lost(facts: dict[str, Any], *, as_json: bool) -> None:
    from raytune.errors import ClusterError
    from raytune.launch.attempts.lost import Driver, driver_lost

    if sys.stderr.isatty():
        sys.stderr.write(_SHOW_CURSOR)
    message = driver_lost(Driver(**facts))
    if as_json:
        say(json.dumps({"ok": False, "error": ClusterError.__name__, "message": message, "exit_code": EXIT_RETRY_LATER}))
    else:
        say(message, err=True)
