"""What a chat template may take: two seconds and some memory for a rendering. A template is a program by a stranger.

jinja2's sandbox, in which transformers runs it, keeps it from files and from Python's insides, but not from a loop of loops or a
text of a terabyte. Two guards, neither of which costs an ordinary rendering anything to speak of:

- A thread looks ten times a second at renderings that go on, and ends one whose own processor time is spent (so that a busy
  machine ends none) or that fills memory, by raising in its thread, whichever that is: signals reach the main thread alone.
- What makes much of little in one step, where no thread can step in (`'x' * 10**10`, a width of a billion), is refused before.

Long because it lists, function by function of jinja2, what can make much of little; a list in two places would have gaps.
"""

import os
import re
import threading
import time
from collections.abc import Callable, Iterable
from ctypes import c_ulong, py_object, pythonapi
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

from raytune.errors import DataError
from raytune.units import GIB, MIB, format_bytes

SECONDS = 2.0
"""Processor time for a call that renders; the slowest known template needs a thousandth of it for a long chat."""
SECONDS_PER_CHAT = 0.01
"""On top, for each chat of a call that renders many."""
SECONDS_PER_TURN = 0.001
"""And for each turn in them: of a long chat all beginnings are rendered, which have many. The slowest known template needs a
tenth of it."""
MEMORY = GIB
"""By how much the process may grow while a rendering has gone on for longer than any takes."""
_TIMES = 3
"""That the process has to grow so before it is the template's doing: other threads of it load models, or copy states."""
_REST_S = 60.0
"""For which others are waited for, at most, to grow no more."""
TEXT_UP_TO = 256 * MIB
TEMPLATE_UP_TO = MIB
"""In characters; the largest known have 20,000."""
MOST_REPEATED = 10_000_000
"""Letters or items that one step may make."""
WIDEST = 100_000
_LOOKS_EVERY_S = 0.1
_WIDTHS = re.compile(r"%[-+ #0]*(?:\*|\d+)?\.?(\d{6,})|%[-+ #0]*(\d{6,})|\{[^{}]*:[^{}]*?(\d{6,})[^{}]*\}")
"""Widths and precisions of both kinds of formats."""
_MAX_BITS = 4096
_THREAD_CLOCK = 6
"""CPUCLOCK_PERTHREAD_MASK | CPUCLOCK_SCHED of Linux. pthread_getcpuclockid would crash on a thread that has just ended."""

Result = TypeVar("Result")


def within_budget(render: Callable[[], Result], name: str, num_chats: int = 1, num_turns: int = 0) -> Result:
    """What `render` gives, unless the template takes more than it may.

    Args:
        render: is called again where the memory that was taken may be another thread's.
        name: of the template, in messages.
        num_chats: that are rendered.
        num_turns: that all of them have.

    Raises:
        DataError: naming the template and what it took too much of.
    """
    seconds = SECONDS + SECONDS_PER_CHAT * num_chats + SECONDS_PER_TURN * num_turns
    for number in range(1, _TIMES + 1):
        watched = _Watched(threading.get_ident(), threading.get_native_id(), seconds)
        try:
            try:
                _watchdog.watch(watched)
                result = render()
            finally:
                _watchdog.leave(watched)
            if not watched.spent:
                return result
        except _SpentError:
            _watchdog.leave(watched)  # it may have come while the first was at work
        except _TooMuchError as error:
            raise DataError(f"{name} {error}. {_OTHER}") from None
        if not watched.may_be_anothers or number == _TIMES:
            break
        _wait_for_rest()
    raise DataError(
        f"{name} takes more than {watched.spent} to render {'a chat' if num_chats == 1 else f'{num_chats} chats'}. {_OTHER}"
    )


def check_length(text: str, name: str) -> None:
    """Refuse the text of a template that is longer than any.

    Raises:
        DataError: naming the template.
    """
    if len(text) > TEMPLATE_UP_TO:
        raise DataError(f"{name} has {format_bytes(len(text))}, which is no chat template. {_OTHER}")


def check_rendered(longest: int, name: str) -> None:
    """Refuse a text that is longer than any chat.

    Args:
        longest: letters of the longest text that was rendered.

    Raises:
        DataError: naming the template.
    """
    if longest > TEXT_UP_TO:
        raise DataError(f"{name} makes a text of {format_bytes(longest)} of a chat. {_OTHER}")


_OTHER = "Set data.template to another one, or to a mended copy of it."


class _SpentError(BaseException):  # which no template and no library takes for a failure of its own
    """Raised in the thread of a rendering whose budget is spent."""


class _TooMuchError(BaseException):
    """One step of a template would make too much."""


# --- Time and memory ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Watched:
    thread: int
    native_thread: int
    seconds: float
    started_s: float = 0.0
    """Processor time of the thread when it was first looked at."""
    started_bytes: int = 0
    spent: str = ""
    """Of what there was too much, once that is known."""
    may_be_anothers: bool = False
    """Whether another thread may have taken it: memory is known of the whole process only."""


class _Watchdog:
    """Ends renderings that take too much. Renderings of other threads and processes do not know of each other."""

    def __init__(self) -> None:
        self._forget()
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._lock = threading.Lock()
        """Held while something is raised in another thread."""
        self._wake = threading.Event()
        self._watched: dict[int, _Watched] = {}
        self._is_awake = False
        self._is_running = False

    def watch(self, watched: _Watched) -> None:
        self._watched[watched.thread] = watched
        if not self._is_awake:
            with self._lock:
                if not self._is_running:
                    self._is_running = True
                    threading.Thread(target=self._look, name="template budget", daemon=True).start()
            self._is_awake = True
            self._wake.set()

    def leave(self, watched: _Watched) -> None:
        """Watch no longer. What was raised and has not arrived yet is taken back."""
        if self._watched.pop(watched.thread, None) is None:
            with self._lock:
                pythonapi.PyThreadState_SetAsyncExc(c_ulong(watched.thread), None)

    def _look(self) -> None:
        while True:
            self._wake.wait()
            time.sleep(_LOOKS_EVERY_S)
            for watched in list(self._watched.values()):
                self._judge(watched)
            if not self._watched:
                self._wake.clear()
                self._is_awake = False
                if self._watched:  # it came in between, and may have seen an eye that was still open
                    self._is_awake = True
                    self._wake.set()

    def _judge(self, watched: _Watched) -> None:
        used_s, used_bytes = _thread_seconds(watched.native_thread), _memory_bytes()
        if not watched.started_bytes:  # first seen: it has gone on for a tenth of a second at most
            watched.started_s, watched.started_bytes = used_s, used_bytes
            return
        if used_s - watched.started_s > watched.seconds:
            watched.spent = f"{watched.seconds:.3g} seconds"
        elif used_bytes - watched.started_bytes > MEMORY:
            watched.spent, watched.may_be_anothers = f"{format_bytes(MEMORY)} of memory", True
        else:
            return
        with self._lock:
            found = self._watched.pop(watched.thread, None)
            if found is not None and found is not watched:  # that one ended by itself, and the thread renders the next
                self._watched[watched.thread] = found
            elif found is not None:
                pythonapi.PyThreadState_SetAsyncExc(c_ulong(watched.thread), py_object(_SpentError))


def _thread_seconds(native_thread: int) -> float:
    """Processor time that a thread has used, by Linux' clock for its number; where no clock tells, the time of the wall."""
    try:
        return time.clock_gettime((~native_thread << 3) | _THREAD_CLOCK)
    except OSError:
        return time.monotonic()


def _memory_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 1  # not known here: time alone counts


def _wait_for_rest() -> None:
    """Until the process grows no more."""
    deadline, before = time.monotonic() + _REST_S, _memory_bytes()
    while time.monotonic() < deadline:
        time.sleep(_LOOKS_EVERY_S)
        if (now := _memory_bytes()) - before < MEMORY / 64:
            return
        before = now


_watchdog = _Watchdog()


# --- Single steps ------------------------------------------------------------------------------------------------------------


def _refuse(what: str) -> None:
    raise _TooMuchError(f"makes too much in one step ({what})")


def _check_repeated(value: Any, count: Any) -> None:
    if isinstance(value, int) and not isinstance(count, int):
        value, count = count, value
    if isinstance(value, str | bytes | list | tuple) and isinstance(count, int) and len(value) * count > MOST_REPEATED:
        _refuse(f"{len(value)} letters or items, {count} times" if count < 10**12 else "a text, repeated without end")
    if isinstance(value, int) and isinstance(count, int) and value.bit_length() + count.bit_length() > _MAX_BITS:
        _refuse("a number of thousands of digits")


def _check_power(base: Any, exponent: Any) -> None:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * abs(exponent) > _MAX_BITS:
        _refuse("a number of thousands of digits")


def _check_format(text: Any, *values: Any) -> None:
    """Of both kinds of formats: widths and precisions that are written out, or given as values."""
    if not isinstance(text, str):
        return
    numbers = [int("".join(found)) for found in _WIDTHS.findall(text)]
    flat = [inner for value in values for inner in (value if isinstance(value, tuple | list) else [value])]
    if "*" in text or re.search(r"\{[^{}]*:[^{}]*\{", text):
        numbers += [value for value in flat if isinstance(value, int)]
    if max(map(abs, numbers), default=0) > WIDEST:
        _refuse(f"a width above {WIDEST}")


def _check_widths(*arguments: Any) -> None:
    if any(isinstance(value, int) and abs(value) > WIDEST for value in arguments):
        _refuse(f"a width above {WIDEST}")


def _check_replaced(text: Any, old: Any, new: Any, *_: Any) -> None:
    if isinstance(text, str) and isinstance(old, str) and isinstance(new, str) and len(new) > len(old):
        times = text.count(old)
        if len(text) + times * (len(new) - len(old)) > max(MOST_REPEATED, 2 * len(text)):
            _refuse(f"{len(new)} letters for {len(old)}, {times} times")


def _check_joined(separator: Any, items: Any = (), *_: Any) -> None:
    if isinstance(separator, str) and isinstance(items, str | list | tuple) and len(separator) * len(items) > MOST_REPEATED:
        _refuse(f"{len(items)} items, joined by {len(separator)} letters")


_OF_TEXT = {
    **dict.fromkeys(("ljust", "rjust", "center", "zfill", "expandtabs"), lambda text, *arguments: _check_widths(*arguments)),
    "replace": _check_replaced,
    "join": _check_joined,
}
_OF_FILTERS = {
    **dict.fromkeys(("center", "indent"), lambda text, *arguments: _check_widths(*arguments)),
    **dict.fromkeys(("batch", "slice", "round", "tojson"), lambda value, *arguments: _check_widths(*arguments)),
    "replace": _check_replaced,
    "join": lambda items, separator="", *_: _check_joined(separator, items),
    "format": _check_format,
}


def _check_sum(left: Any, right: Any) -> None:
    if isinstance(left, str) and isinstance(right, str) and (letters := len(left) + len(right)) > TEXT_UP_TO:
        _refuse(f"a text of {letters} letters")


def _check_pieces(pieces: Iterable[str]) -> None:
    if (letters := sum(map(len, pieces))) > TEXT_UP_TO:
        _refuse(f"a text of {letters} letters")


_OPERATORS = {"*": _check_repeated, "**": _check_power, "%": _check_format, "+": _check_sum}


class _Filters(dict[str, Any]):
    """Filters of an environment; those that can make much of little are checked, whoever sets them."""

    def __setitem__(self, name: str, function: Any) -> None:
        super().__setitem__(name, _checked(function, _OF_FILTERS[name]) if name in _OF_FILTERS else function)


def _checked(function: Callable[..., Any], check: Callable[..., None]) -> Callable[..., Any]:
    num_skipped = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context, which some take first

    @wraps(function)
    def checked(*arguments: Any, **named: Any) -> Any:
        check(*arguments[num_skipped:], *named.values())
        return function(*arguments, **named)

    return checked


class _Code(CodeGenerator):
    """Has the environment join what `~` joins, which is no operator to a sandbox."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("(markup_join if context.eval_ctx.autoescape else str_join)(environment.bounded((")
        for piece in node.nodes:
            self.visit(piece, frame)
            self.write(", ")
        self.write(")))")


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, which refuses steps that make too much."""

    intercepted_binops = frozenset(_OPERATORS)
    code_generator_class = _Code

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """Join what a template, a macro or a block wrote."""
        pieces = list(pieces)
        _check_pieces(pieces)
        return "".join(pieces)

    @staticmethod
    def bounded(pieces: tuple[Any, ...]) -> tuple[Any, ...]:
        """Values that a template joins, as they are."""
        _check_pieces([piece for piece in pieces if isinstance(piece, str)])
        return pieces

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        filters, self.filters = self.filters, _Filters()
        for name, function in filters.items():
            self.filters[name] = function

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if not (type(left) is int and operator == "%"):
            _OPERATORS[operator](left, right)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        return wrapped and _checked(wrapped, partial(_check_format, value.__self__))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(owner := getattr(__obj, "__self__", None), str) and (check := _OF_TEXT.get(__obj.__name__)):
            check(owner, *args, *kwargs.values())
        return super().call(__context, __obj, *args, **kwargs)


# transformers makes the environment itself, with what templates expect in it, so it is given this one to make. When it takes an
# environment, this can go (transformers 5.23 does not).
if not issubclass(chat_template_utils.ImmutableSandboxedEnvironment, ImmutableSandboxedEnvironment):
    raise SecurityError("transformers runs chat templates in no sandbox that raytune knows")
chat_template_utils.ImmutableSandboxedEnvironment = TemplateEnvironment  # pyright: ignore[reportPrivateImportUsage]
chat_template_utils._compile_jinja_template.cache_clear()
