"""Questions to a Hugging Face hub, and bytes of its files: asked again while that may help, and every refusal in words.

huggingface_hub owns the connection, the token and the addresses. Its own download is not used: version 2.4 writes into a file
that it removes when it is interrupted, so that a cut connection at 95 % of a shard starts it again.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import httpx2  # what huggingface_hub speaks HTTP with
from huggingface_hub import constants, get_session, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import build_hf_headers, parse_ratelimit_headers, validate_repo_id

from raytune.errors import ClusterError, ModelError
from raytune.hub.cache import DEFAULT_REVISION, default_hub_cache, is_commit, is_offline
from raytune.units import format_bytes, format_seconds

CONNECT_S, READ_S = 10.0, 30.0
"""How long a server may take to accept a connection, and to send the next bytes."""
LARGEST_PIECE = 40 * 10**9
"""Bytes asked for at once: what delivers the hub's files answers no request for more than 50 GB."""

_PASSING = (408, 425, 429, 500, 502, 503, 504)
"""Answers that another moment may change."""

_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long what may pass is waited for. Every byte that arrives begins the wait anew."""

    first_wait_s: float = 1.0
    longest_wait_s: float = 30.0
    total_s: float = 600.0
    """A hub counts requests per five minutes."""
    unreachable_s: float = 30.0
    """While the hub has not answered once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFile:
    """A file of a model at a commit."""

    name: str
    """Relative to the model, with `/`."""
    size: int
    digest: str
    """Names the blob: SHA-256 of the content of a large file, git's own hash of a small one."""
    is_large: bool


class MayPassError(Exception):
    """Something that is worth another try, after so many seconds if the hub said how many."""

    def __init__(self, cause: str, wait_s: float | None = None) -> None:
        super().__init__(cause)
        self.wait_s = wait_s


class Hub:
    """One model on the hub that HF_ENDPOINT names, with the login of this machine (HF_TOKEN, or what `hf auth login` left).

    Args:
        base: its id, such as `owner/name`.
        revision: branch, tag or commit, for messages; None: main.

    Raises:
        ModelError: if that is no id of a hub, or the network is not to be used.
    """

    def __init__(self, base: str, revision: str | None, patience: Patience | None = None) -> None:
        self.base, self._revision, self._patience = base, revision, patience or Patience()
        self.stopped = threading.Event()
        """Set by another thread to end what is waited for here."""
        self._has_answered, self._num_arrived = False, 0
        self._endpoint = constants.ENDPOINT
        self._node = os.uname().nodename
        try:
            validate_repo_id(base)
        except HFValidationError as error:
            raise self._no_id(str(error)) from error
        if is_offline():
            raise self._offline()

    @property
    def named(self) -> str:
        """The model in a message."""
        at = f" at revision {self._revision!r}" if self._revision and not is_commit(self._revision) else ""
        return f"model.base {self.base!r}{at or (f' at commit {self._revision}' if self._revision else '')}"

    def commit(self) -> str:
        """The commit that the revision stands for now.

        Raises:
            ModelError: if there is no such model or revision, or this machine's login may not see it.
            ClusterError: if the hub cannot be reached, or asks for too much patience.
        """
        if is_commit(self._revision):
            return str(self._revision)
        revision = quote(self._revision or DEFAULT_REVISION, safe="")
        info = self._json(f"{self._endpoint}/api/models/{self.base}/revision/{revision}")[0]
        commit = info.get("sha") if isinstance(info, dict) else None
        if not is_commit(commit):
            raise ClusterError(
                f"{self._endpoint} does not say which commit {self.named} is. Is it a Hugging Face hub (HF_ENDPOINT)?"
            )
        return str(commit)

    def files(self, commit: str) -> list[HubFile]:
        """Every file at a commit; names that would leave a folder are left out.

        Raises:
            ModelError, ClusterError: as `commit` does.
        """
        url: str | None = f"{self._endpoint}/api/models/{self.base}/tree/{commit}?recursive=true&expand=false"
        files = []
        while url:
            entries, url = self._json(url)
            try:
                files += [_hub_file(entry) for entry in entries if entry["type"] == "file" and _stays_inside(entry["path"])]
            except (KeyError, TypeError, AttributeError) as error:
                raise ClusterError(
                    f"{self._endpoint} does not list the files of {self.named} ({type(error).__name__}: {error}). Is it a "
                    f"Hugging Face hub (HF_ENDPOINT)?"
                ) from error
        return files

    def append(self, commit: str, file: HubFile, path: Path, arrived: Callable[[int], None]) -> None:
        """Add to a local file what it still lacks of a file of the hub.

        Args:
            path: with its first bytes, or not there yet.
            arrived: told how many bytes came, or, below zero, how many had to be given up.

        Raises:
            ModelError, ClusterError: as `commit` does.
        """
        with path.open("ab") as target:
            while (offset := target.seek(0, os.SEEK_END)) < file.size:
                self._patient(lambda: self._append_piece(commit, file, target, arrived), f"{file.name} of {self.base}")
                if target.seek(0, os.SEEK_END) == offset:
                    return  # stopped

    def _append_piece(self, commit: str, file: HubFile, target: Any, arrived: Callable[[int], None]) -> None:
        offset = target.seek(0, os.SEEK_END)
        stop = min(file.size, offset + LARGEST_PIECE)
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        if offset or stop < file.size:
            headers["Range"] = f"bytes={offset}-{stop - 1}"
        url = f"{self._endpoint}/{self.base}/resolve/{commit}/{quote(file.name)}"
        with self._stream(url, headers) as response:
            if offset and response.status_code != 206:  # sent whole, whatever was asked for
                target.truncate(0)
                arrived(-offset)
                offset = 0
            for chunk in response.iter_bytes():  # as it comes: what is gathered first is lost with a connection
                if self.stopped.is_set():
                    return
                target.write(chunk)
                target.flush()  # what a process that is killed leaves is what the next one need not ask for
                offset += len(chunk)
                self._num_arrived += len(chunk)
                arrived(len(chunk))
                if offset > file.size:
                    raise ClusterError(f"{self._endpoint} sends more than the {file.size} bytes of {file.name} that it lists.")
        if offset < stop:
            raise MayPassError(f"the connection was cut at {format_bytes(offset)} of {format_bytes(file.size)}")

    # --- Asking --------------------------------------------------------------------------------------------------------------

    def _json(self, url: str) -> tuple[Any, str | None]:
        """The answer to a question, and where it goes on."""

        def ask() -> tuple[Any, str | None]:
            with self._stream(url, build_hf_headers()) as response:
                response.read()
                try:
                    answer = response.json()
                except ValueError as error:  # not of a hub, so it has not answered yet: the login page of a network, for one
                    kind = "".join(filter(str.isprintable, response.headers.get("content-type", "no type")))[:60]
                    raise MayPassError(f"an answer that is no JSON ({kind}): a login page, or no hub at all?") from error
                self._has_answered = True
                return answer, response.links.get("next", {}).get("url")

        return self._patient(ask, f"what the hub says of {self.base}")

    @contextmanager
    def _stream(self, url: str, headers: dict[str, str]) -> Iterator[Any]:
        """An answer whose body is read as it comes."""
        timeout = httpx2.Timeout(READ_S, connect=CONNECT_S)
        with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
            self._check(response)
            yield response

    def _patient(self, action: Callable[[], T], what: str) -> T:
        """Do something until it succeeds, fails for good, or patience is at its end."""
        patience, wait = self._patience, self._patience.first_wait_s
        began = time.monotonic()
        while True:
            arrived_before = self._num_arrived
            try:
                return action()
            except (httpx2.UnsupportedProtocol, httpx2.InvalidURL) as error:
                raise ModelError(f"HF_ENDPOINT is {self._endpoint}, which is no address of a hub ({error}).") from error
            except (MayPassError, httpx2.RequestError) as error:
                if self._num_arrived > arrived_before:
                    began, wait = time.monotonic(), patience.first_wait_s
                cause = str(error) or type(error).__name__
                asked_s = error.wait_s if isinstance(error, MayPassError) else None
                limit = patience.total_s if self._has_answered else patience.unreachable_s
                pause = max(wait, asked_s or 0.0)
                if time.monotonic() - began + pause > limit or self.stopped.is_set():
                    raise self._lost(what, cause, time.monotonic() - began) from error
                _log.warning("%s: %s; trying again in %s", what, cause, format_seconds(pause))
                self.stopped.wait(pause)
                wait = min(2 * wait, patience.longest_wait_s)

    def _check(self, response: Any) -> None:
        """Refuse an answer that is none.

        Raises:
            ModelError: if it will be the same next time.
            MayPassError: if it may not.
        """
        status = response.status_code
        self._has_answered |= status >= 400
        if status in _PASSING:
            busy = "too many requests" if status == 429 else "the hub has a fault of its own"
            raise MayPassError(f"{busy} (HTTP {status})", _wait_asked_for(response))
        if status >= 400:
            code, said = response.headers.get("x-error-code"), response.headers.get("x-error-message") or ""
            raise ModelError(self._refusal(status, code, "".join(filter(str.isprintable, said))[:300]))

    # --- Words of a base, which other uses of a hub have their own for ------------------------------------------------------

    def _no_id(self, why: str) -> ModelError:
        return ModelError(
            f"model.base {self.base!r} is neither a folder on {self._node} nor an id of the Hugging Face hub ({why}). "
            f"Give a folder with config.json and *.safetensors, an id such as owner/name, or demo."
        )

    def _offline(self) -> ModelError:
        revision = f" --revision {self._revision}" if self._revision else ""
        return ModelError(
            f"{self.named} is neither a folder nor whole in the Hugging Face cache {default_hub_cache()} of {self._node}, "
            f"where HF_HUB_OFFLINE is set, so that nothing is downloaded. Unset it; or, where there is a network, "
            f"hf download {self.base}{revision}, and copy that cache here (HF_HUB_CACHE "
            f"names its place) or give a local folder as model.base."
        )

    def _lost(self, what: str, cause: str, waited_s: float) -> ClusterError:
        where, waited = f"{self._endpoint} from {self._node}", format_seconds(waited_s)
        if not self._has_answered:
            return ClusterError(
                f"The Hugging Face hub at {where} cannot be reached ({cause}; tried for {waited}), and {self.named} is not whole "
                f"in the cache there. Check the network and HF_ENDPOINT; without a network, download the model elsewhere "
                f"(hf download {self.base}), copy the cache and set HF_HUB_OFFLINE=1, or give a local folder as model.base."
            )
        more = "" if get_token() else " The hub allows more requests to who is logged in (HF_TOKEN, or hf auth login)."
        return ClusterError(
            f"Could not get {what} from {where}: {cause}, again and again for {waited}. What has arrived is kept: the same "
            f"command goes on from there.{more}"
        )

    def _refusal(self, status: int, code: str | None, said: str) -> str:
        """Why the hub does not give what was asked for, and what to do."""
        page, token = f"{self._endpoint}/{self.base}", get_token()
        has = "a token, of an account that may not see it" if token else "no token"
        login = f"log in on every node that trains: hf auth login, or HF_TOKEN in its environment ({self._node} has {has})"
        words = f" (HTTP {status}{f': {said}' if said else ''})"
        if code == "GatedRepo" or (status == 403 and "gated" in said.lower()):
            return f"{self.named} is gated: who downloads it has to accept its terms. Do so at {page}, and {login}."
        if token and status == 401 and "credentials" in said.lower():
            return f"{self._endpoint} refuses the token of {self._node}{words}. Set a new one: HF_TOKEN, or hf auth login."
        if code == "RevisionNotFound":
            return f"{self.named}: the model has no such branch, tag or commit. See {page}/tree/main, and mend model.revision."
        if code == "EntryNotFound":
            return f"{self._endpoint} lists a file of {self.named} that it does not have. Set model.revision to another commit."
        if status in (401, 403):
            return (
                f"{self._endpoint} does not show {self.named} to {self._node}{words}: it does not exist, or is private. Check "
                f"its name, or {login}."
            )
        if status == 404:
            return (
                f"{self.named} is neither a folder on {self._node} nor a model on {self._endpoint}. Check its name; if it is "
                f"private, {login}."
            )
        return f"{self._endpoint} refuses {self.named}{words}."


def _hub_file(entry: dict[str, Any]) -> HubFile:
    large = entry.get("lfs")
    if large:
        return HubFile(name=entry["path"], size=int(large["size"]), digest=_plain(large["oid"]), is_large=True)
    return HubFile(name=entry["path"], size=int(entry["size"]), digest=_plain(entry["oid"]), is_large=False)


def _stays_inside(name: str) -> bool:
    """Whether a name is one of a file below a folder, whoever has written it."""
    return name.isprintable() and not {"", ".", ".."} & set(name.split("/"))


def _plain(digest: str) -> str:
    """A digest as the name of a file."""
    if not digest.isalnum():
        raise TypeError(f"{digest!r} is no digest")
    return digest


def _wait_asked_for(response: Any) -> float | None:
    """Seconds after which the hub wants to be asked again, if it says so."""
    if (after := response.headers.get("retry-after", "").strip()).isdigit():
        return float(after)
    rate = parse_ratelimit_headers(response.headers)
    return float(rate.reset_in_seconds) if rate and not rate.remaining else None
