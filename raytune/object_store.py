"""Calls to an object store behind an fsspec URL: with limits, and again with words while they fail for a reason that may pass.

What a call may wait for, from the inside out: a connection and the next bytes on it (the client's limits, where we know how to
set them), the next sign of progress (`in_time`, whatever the client does), and the storage as a whole (`retry`). A store that
accepts connections and never answers therefore ends a run within minutes, with exit code 10, and never holds it for ever.
"""

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar, copy_context
from functools import cache
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from raytune.errors import ClusterError, RaytuneError, UserError
from raytune.local_files import FULL, disk_full
from raytune.missing import OPTIONAL, install_command
from raytune.printable import in_a_line
from raytune.units import MIB

# What a storage service is given to come back before a run fails with "retry later". The other ranks wait in a collective
# meanwhile, whose limit is five minutes. Besides a number of attempts there is a time, because one attempt may take a minute.
PATIENCE_S = 240.0
MOST_ATTEMPTS = 10
# A refusal is usually a wrong credential, but services also refuse while they rotate tokens: asked again, not for long.
PATIENCE_AFTER_REFUSAL_S = 15.0
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 60.0

CONNECT_LIMIT_S, READ_LIMIT_S = 10.0, 15.0
TRIES_OF_CLIENT = 3
# Longer than the client's own tries take together: what is given up here sends nothing more that could overtake a later write.
CALL_LIMIT_S = 60.0
SLOWEST_BYTES_PER_S = MIB / 16
"""A link that moves less is taken for a dead one."""

_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "abfss": "adlfs", "az": "adlfs"}
_NO_CREDENTIALS = ("NoCredentialsError", "DefaultCredentialsError", "ClientAuthenticationError", "CredentialUnavailableError")
"""Names of what botocore, google-auth and azure-identity raise where they find none. With a status, a store has refused some."""
_OF_A_COMMIT = re.compile(r"hf://\w+/[^@]+@[0-9a-f]{40}/")
_USER_INFO = re.compile(r"(?<=://)[^/\s@]+@")

_log = logging.getLogger(__name__)
T = TypeVar("T")


def limit_of(num_bytes: int) -> float:
    """Seconds that a call which moves so many bytes may take without a sign of progress."""
    return CALL_LIMIT_S + num_bytes / SLOWEST_BYTES_PER_S


def shown(path: str | Path) -> str:
    """A URL as messages may show it: without credentials, which some put before the host or behind a question mark."""
    return _USER_INFO.sub("", str(path)).partition("?")[0]


def is_of_a_commit(path: str | Path) -> bool:
    """Whether a URL names a commit of a hub, whose files never are others."""
    return _OF_A_COMMIT.match(str(path)) is not None


def file_system(path: str | Path) -> tuple[Any, str]:
    """The fsspec file system of a URL with nothing remembered, and the path inside it.

    Raises:
        UserError: if the kind of URL is unknown, or its package is not installed.
    """
    import fsspec  # only runs on remote storage pay for it

    protocol = str(path).split("://")[0]
    try:
        files, name = fsspec.core.url_to_fs(str(path), **_client_limits(protocol))
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        if package is None:
            raise UserError(f"Cannot use {shown(path)}: {error}") from error
        raise UserError(
            f"Cannot use {shown(path)}: the package {package} is not installed on {os.uname().nodename}. "
            f"Install it on every node: {install_command(OPTIONAL[package])}"
        ) from error
    except ValueError as error:
        if _PACKAGES.get(protocol) == "adlfs":  # which takes its account and credentials when it is made
            raise UserError(
                f"Cannot use {shown(path)} on {os.uname().nodename}: {_quoted(error)}. Set AZURE_STORAGE_CONNECTION_STRING, or "
                f"AZURE_STORAGE_ACCOUNT_NAME and its credentials, on every node."
            ) from error
        known = ", ".join(f"{name}://" for name in ("s3", "gs", "abfs"))
        raise UserError(f"Cannot use {shown(path)}: {error}. Use a local folder or one of {known}.") from error
    if protocol in ("s3", "s3a"):
        files.retries = 1  # s3fs tries again around botocore, which does so too; it has no option for it
    if not is_of_a_commit(path):
        files.invalidate_cache()  # other processes write too: what was listed a minute ago says nothing
    return files, name


def _client_limits(protocol: str) -> dict[str, Any]:
    """Limits on connecting and on reading, as the client of a protocol takes them; what fsspec's own files say goes first."""
    from fsspec.config import conf

    if protocol in ("s3", "s3a"):
        limits = {
            "connect_timeout": CONNECT_LIMIT_S,
            "read_timeout": READ_LIMIT_S,
            "retries": {"mode": "standard", "total_max_attempts": TRIES_OF_CLIENT},
        }
        chosen = conf.get(protocol, {})
        return {
            "config_kwargs": limits | chosen.get("config_kwargs", {}),
            "session": chosen.get("session") or _s3_session(os.getpid(), chosen.get("profile")),
        }
    if protocol in ("gs", "gcs"):
        return {"requests_timeout": conf.get(protocol, {}).get("requests_timeout", CALL_LIMIT_S)}
    return {}


@cache
def _s3_session(pid: int, profile: str | None) -> Any:
    """A session whose uploads do not ask whether they may, one per process.

    With `Expect: 100-continue`, which botocore sends before each body, aiobotocore 3.10 over aiohttp 3.14 waits for ever where no
    answer comes: none of its limits holds yet. And should the answer come after all, it would put the content of then in place.
    """
    from aiobotocore.session import AioSession
    from botocore.handlers import add_expect_header

    session = AioSession(profile=profile)
    session.unregister("before-call.s3", add_expect_header)
    return session


# --- Limits ------------------------------------------------------------------------------------------------------------------


class _Progress:
    """When an attempt last moved. Attempts inside an attempt move it too."""

    def __init__(self, around: "_Progress | None") -> None:
        self._around = around
        self.moves, self.at, self.is_given_up = 0, time.monotonic(), False

    def note(self) -> None:
        if self.is_given_up:
            raise TimeoutError("the call was given up")
        self.moves, self.at = self.moves + 1, time.monotonic()
        if self._around:
            self._around.note()


_progress: ContextVar[_Progress | None] = ContextVar("progress of a call", default=None)


def moved() -> None:
    """Called by whatever moves bytes, whenever some have moved: its limit counts from here.

    Raises:
        TimeoutError: in a thread that was left behind, which is to stop.
    """
    if progress := _progress.get():
        progress.note()


def in_time(action: Callable[[], T], limit_s: float) -> T:
    """What an action returns, if it does so or moves on within the limit, and again within the limit after that.

    It runs in a thread that is left behind when time is up, since nothing can end a thread that waits for a socket.

    Raises:
        TimeoutError: if time is up.
        BaseException: what the action raised.
    """
    outcome: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
    progress = _Progress(_progress.get())

    def run() -> None:
        _progress.set(progress)
        try:
            outcome.put((action(), None))
        except BaseException as error:
            outcome.put((None, error))

    threading.Thread(target=copy_context().run, args=(run,), name="storage call", daemon=True).start()
    try:
        while (seconds_left := progress.at + limit_s - time.monotonic()) > 0:
            with suppress(Empty):
                result, error = outcome.get(timeout=seconds_left)
                if error is not None:
                    raise error
                return result
    finally:
        progress.is_given_up = True  # also where a signal ended the wait
    raise TimeoutError(f"no answer for {limit_s:.0f} s")


_is_tried_once: ContextVar[bool] = ContextVar("whether calls are tried once", default=False)


@contextmanager
def once() -> Iterator[None]:
    """Context in which a call that fails is not tried again: for who comes again anyway, while others wait for it."""
    token = _is_tried_once.set(True)
    try:
        yield
    finally:
        _is_tried_once.reset(token)


# --- Again -------------------------------------------------------------------------------------------------------------------


def retry(
    action: Callable[[Any, str], T],
    verb: str,
    path: str | Path,
    *,
    limit_s: float | None = CALL_LIMIT_S,
    patience_s: float = PATIENCE_S,
    patience_after_refusal_s: float = PATIENCE_AFTER_REFUSAL_S,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> T:
    """Do something with remote storage, again and again while it fails for a reason that may pass.

    Args:
        action: given the file system of `path` and the path inside it.
        verb: for messages, such as "read".
        limit_s: seconds that an attempt may take without a sign of progress; None if the action sees to that itself.
        patience_s: seconds without any success or progress after which it gives up.

    Raises:
        FileNotFoundError: at once; the storage has answered.
        StorageFullError: at once, if the disk of this machine is full.
        UserError: if the storage still refuses access after a few seconds, or there are no credentials.
        ClusterError: if it still fails when patience is at its end.
    """
    what = f"{verb} {shown(path)}"
    files, failing_since, wait = None, clock(), FIRST_WAIT_S
    progress = _Progress(_progress.get())
    most_attempts = 1 if _is_tried_once.get() else MOST_ATTEMPTS
    for attempt in range(1, most_attempts + 1):
        moves_before, token = progress.moves, _progress.set(progress)
        try:
            files, name = file_system(path)
            return action(files, name) if limit_s is None else in_time(lambda f=files, n=name: action(f, n), limit_s)
        except (FileNotFoundError, RaytuneError):
            raise
        except Exception as error:  # every backend has its own kinds; what cannot pass is sorted out here
            if type(error).__name__ in _NO_CREDENTIALS and _status(error) is None:
                raise UserError(f"Could not {what}: no credentials for this storage on {os.uname().nodename}. {error}") from error
            if isinstance(error, OSError) and error.errno in FULL:
                raise disk_full(what, error) from error
            if progress.moves > moves_before:
                failing_since = clock()
            refused, cause, elapsed = _is_refusal(error), _quoted(error), clock() - failing_since
            patience = patience_after_refusal_s if refused else patience_s
            if attempt == most_attempts or elapsed + wait > patience:
                if refused:
                    raise UserError(
                        f"Could not {what}: the storage refuses access ({cause}). "
                        f"Give the credentials or the role of {os.uname().nodename} the right to read, write and list there."
                    ) from error
                raise ClusterError(
                    f"Could not {what} in {attempt} attempt{'s' * (attempt > 1)} over {elapsed:.0f} s ({cause}). "
                    f"When the storage is back, run the same command again: nothing that was committed is lost."
                ) from error
            _log.warning(
                "Could not %s (%s). Attempt %d of at most %d failed; next in %g s, giving up after %.0f s without an answer.",
                *(what, cause, attempt, most_attempts, wait, patience),
            )
            if isinstance(error, TimeoutError) and files is not None:
                files.clear_instance_cache()  # its connections may all be held by calls that were left behind
        finally:
            _progress.reset(token)
        sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT_S)
    raise AssertionError("the last attempt returns or raises")


def _is_refusal(error: Exception) -> bool:
    """Whether the storage refused access. adlfs passes on what azure-core raises, and gcsfs says it in words."""
    is_forbidden = isinstance(error, OSError) and str(error).startswith("Forbidden: ")
    return isinstance(error, PermissionError) or is_forbidden or _status(error) in (401, 403)


def _status(error: BaseException) -> int | None:
    """The status of the answer that an error, or what it was raised from, stands for, where its client tells."""
    status = getattr(error, "status_code", None) or getattr(error, "code", None)
    if isinstance(status, int):
        return status
    return None if error.__cause__ is None else _status(error.__cause__)


def _quoted(error: Exception) -> str:
    """An error as a message may quote it: clients put whole responses into theirs."""
    text = _USER_INFO.sub("", f"{type(error).__name__}: {error}")
    return in_a_line("".join(c if c.isprintable() else " " for c in text))


def refuse_web_page(name: str, content: bytes) -> None:
    """Refuse a page in the place of a file: what answers is no store, but a web server, a proxy or a page to log in at.

    Raises:
        UserError: if the file is none of ours that is a page.
    """
    start = content[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html")) and not name.endswith(".html"):
        title = re.search(rb"<title[^>]*>([^<]{1,200})", content, re.IGNORECASE)
        called = f' called "{in_a_line(title[1].decode(errors="replace"), 80)}"' if title else ""
        raise UserError(
            f"What answers for {name} on {os.uname().nodename} is a web page{called} and no object store. Check its address "
            f"(AWS_ENDPOINT_URL, or endpoint_url in fsspec's configuration), and whether a proxy or a login stands before it."
        )


@contextmanager
def bucket_must_exist(path: str | Path) -> Iterator[None]:
    """A write finds nothing missing but the bucket."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, FileNotFoundError) and _status(error) != 404:
            raise
        raise UserError(
            f"Cannot write {shown(path)}: {_quoted(error)}. Does the bucket exist, and is its name spelled right?"
        ) from error


@contextmanager
def upload_must_arrive(path: str | Path) -> Iterator[None]:
    """What is missing right after it was written was never stored, whatever the upload said; worth another try."""
    try:
        yield
    except FileNotFoundError as error:
        raise OSError(f"{shown(path)} was uploaded without an error but is not there") from error
