"""From the hub to this machine: what describes a model (kilobytes to megabytes), and whichever of its files are asked for.

Whole or not at all: a file gets its name when its content is what the hub says, and `config.json` gets its own after all others
that describe the model, so that who finds a config finds them too. Any number of processes may ask at once.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from raytune.errors import ClusterError, ModelError, RaytuneError
from raytune.hub.cache import (
    CONFIG,
    beginning_of,
    cached_snapshot,
    default_hub_cache,
    held,
    note_commit,
    put_into_snapshot,
    repository,
)
from raytune.hub.client import Hub, HubFile, Patience
from raytune.local_files import FULL
from raytune.units import format_bytes, format_seconds

DESCRIBING = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "additional_chat_templates/*.jinja")
"""Files beside a model's weights that transformers may read. None of them can run code."""
MOST_BYTES = 256 << 20
"""Of a file that describes a model; a larger one is somebody's data."""
TOKENIZERS = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
PARALLEL_FILES = 4
REPORT_EVERY_S = 1.0
LINES_EVERY_S = 10.0
SPARE_BYTES = 64 << 20
"""Room that a download leaves: links, and what other processes write meanwhile."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a download is."""

    base: str
    node: str
    done_bytes: int
    total_bytes: int
    """Of the files that were not here when it began."""
    num_done: int
    num_files: int
    bytes_per_s: float
    """Since it began; what an earlier process had downloaded does not count."""
    is_waiting: bool = False
    """For another process that downloads the same model."""

    @property
    def text(self) -> str:
        """Size, rate, which file, time left."""
        if self.is_waiting:
            return f"{self.base}: another process on {self.node}, or on its shared cache, is downloading it"
        left = (self.total_bytes - self.done_bytes) / self.bytes_per_s if self.bytes_per_s else None
        return (
            f"{self.base}: {format_bytes(self.done_bytes)} of {format_bytes(self.total_bytes)}, file "
            f"{min(self.num_done + 1, self.num_files)} of {self.num_files}, {format_bytes(self.bytes_per_s)}/s"
            + ("" if left is None else f", {format_seconds(left)} left")
        )


Report = Callable[[Progress], None]
Wanted = Callable[[Sequence[HubFile]], Sequence[HubFile]]
"""Chooses from all files of a model."""


def say_nothing(progress: Progress) -> None:
    """A report to nobody."""


def in_lines(say: Callable[[str], object], every_s: float = LINES_EVERY_S) -> Report:
    """A report in lines, not too many of them, and none of what is over soon."""
    told = time.monotonic()

    def report(progress: Progress) -> None:
        nonlocal told
        if time.monotonic() - told >= every_s:
            told = time.monotonic()
            say(f"downloading {progress.text}")

    return report


def described(
    base: str, revision: str | None, *, with_code: bool = False, report: Report = say_nothing, patience: Patience | None = None
) -> str:
    """Make sure that config, tokenizer and template of a hub model are here.

    A branch or tag that was asked for once stands for the same commit from then on, until it is removed from the cache: a run
    that goes on is not to meet another model. What is here is used without a network.

    Args:
        base: id on the hub.
        revision: branch, tag or commit; None: main.
        with_code: whether the Python files beside it are wanted, too; then `revision` is a commit.

    Returns:
        The commit.

    Raises:
        ModelError: if there is no such model, it may not be seen from here, or there is no room for it.
        ClusterError: if the hub cannot be reached, or gives up too often.
    """
    snapshot = cached_snapshot(base, revision)
    if snapshot is not None and _is_described(snapshot, with_code):
        return snapshot.name
    try:
        hub = Hub(base, revision, patience)
        commit = snapshot.name if snapshot else hub.commit()
        _fetch(hub, commit, lambda files: _describing(files, base, with_code), report)
    except ClusterError as error:  # unreachable or busy; what it refuses, a full disk and missing code stay what they are
        if snapshot is None or with_code:
            raise
        _log.warning("using %s as it is in the cache (commit %s), without asking for the rest: %s", base, snapshot.name, error)
        return snapshot.name
    note_commit(base, revision, commit)
    return commit


def fetch(base: str, commit: str, wanted: Wanted, report: Report = say_nothing, patience: Patience | None = None) -> Path:
    """Make sure that some files of a hub model are here.

    Returns:
        The folder of the model at that commit.

    Raises:
        ModelError, ClusterError: as `described` does.
    """
    return _fetch(Hub(base, commit, patience), commit, wanted, report)


def _is_described(snapshot: Path, with_code: bool) -> bool:
    """Whether everything that describes a model is here, as far as can be seen without the hub."""
    if not any((snapshot / name).is_file() for name in TOKENIZERS):  # another tool may have asked for the config alone
        return False
    if not with_code:
        return True
    try:
        return "auto_map" not in json.loads((snapshot / CONFIG).read_text()) or any(snapshot.rglob("*.py"))
    except (OSError, ValueError):
        return False


def _describing(files: Sequence[HubFile], base: str, with_code: bool) -> list[HubFile]:
    """Files that describe a model, the config last."""
    names = {file.name for file in files}
    if CONFIG not in names:
        what = "an adapter, not a whole model" if "adapter_config.json" in names else "no model in the format of transformers"
        raise ModelError(f"model.base {base!r} holds no config.json on the hub, so it is {what}. Give the id of a whole model.")

    def describes(name: str) -> bool:
        return any(_is_beside(name, pattern) for pattern in DESCRIBING) or (with_code and name.endswith(".py"))

    chosen = [file for file in files if file.size <= MOST_BYTES and describes(file.name)]
    return sorted(chosen, key=lambda file: (file.name == CONFIG, file.name))


def _is_beside(name: str, pattern: str) -> bool:
    """Whether a file lies where a pattern looks: fnmatch alone would look into every folder."""
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)


def _fetch(hub: Hub, commit: str, wanted: Wanted, report: Report) -> Path:
    folder = repository(hub.base) / "snapshots" / commit
    files = [file for file in wanted(hub.files(commit)) if not (folder / file.name).exists()]
    if not files:
        return folder
    try:
        with held(hub.base, lambda: report(_waiting(hub.base, files))):
            missing = [file for file in files if not (folder / file.name).exists()]
            if missing:
                _download(hub, commit, missing, report)
    except OSError as error:
        raise _no_place(hub, error, sum(file.size for file in files) - _bytes_here(hub.base, files)) from error
    return folder


def _download(hub: Hub, commit: str, files: Sequence[HubFile], report: Report) -> None:
    """Bring files here, several at once, and name them in the order given when all are here."""
    blobs = repository(hub.base) / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    tally = _Tally(hub.base, files)
    lacking = list({file.digest: file for file in files if not (blobs / file.digest).exists()}.values())  # equal files are one
    tally.num_done, tally.done_bytes = len(files) - len(lacking), _bytes_here(hub.base, files)
    _refuse_small_disk(hub, tally.total_bytes - tally.done_bytes)
    pool = ThreadPoolExecutor(PARALLEL_FILES, thread_name_prefix="hub")
    try:
        pending: set[Future] = {pool.submit(_blob, hub, commit, file, blobs / file.digest, tally) for file in lacking}
        while pending:
            done, pending = wait(pending, timeout=REPORT_EVERY_S)
            for future in done:
                future.result()
            report(tally.progress())
    finally:
        hub.stopped.set()
        pool.shutdown(cancel_futures=True)
    for file in files:
        put_into_snapshot(hub.base, commit, file.name, file.digest)


def _blob(hub: Hub, commit: str, file: HubFile, blob: Path, tally: "_Tally") -> None:
    """Download what a file of the hub holds.

    Raises:
        ClusterError: if it arrived damaged twice.
    """
    for is_last in (False, True):
        beginning = beginning_of(hub.base, file.digest)
        hub.append(commit, file, beginning, tally.arrived)
        if hub.stopped.is_set():
            return
        if _is_whole(beginning, file):
            beginning.replace(blob)
            tally.file_done()
            return
        _log.warning(
            "%s of %s is not what the hub says it is%s", file.name, hub.base, "" if is_last else "; downloading it again"
        )
        tally.arrived(-_size(beginning))
        beginning.unlink()
    raise ClusterError(
        f"{file.name} of {hub.named} arrived twice with another content than the hub names (SHA-256 {file.digest}). Something "
        f"between {os.uname().nodename} and the hub, or its disk, changes it. Try again later, or from another network."
    )


def _is_whole(path: Path, file: HubFile) -> bool:
    if path.stat().st_size != file.size:
        return False
    with path.open("rb") as stream:
        return not file.is_large or hashlib.file_digest(stream, "sha256").hexdigest() == file.digest


def _refuse_small_disk(hub: Hub, num_bytes: int) -> None:
    cache = repository(hub.base)
    free = shutil.disk_usage(cache).free
    if num_bytes + SPARE_BYTES > free:
        raise ModelError(_room(hub, num_bytes, f"has {format_bytes(free)} free"))


def _room(hub: Hub, num_bytes: int, has: str) -> str:
    return (
        f"The Hugging Face cache {default_hub_cache()} on {os.uname().nodename} {has}, and {hub.named} needs "
        f"{format_bytes(num_bytes)} more there. Free some space, or set HF_HUB_CACHE to a folder on a larger disk."
    )


def _no_place(hub: Hub, error: OSError, num_bytes: int) -> RaytuneError:
    if error.errno in FULL:
        return ModelError(_room(hub, num_bytes, "is full"))
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return ModelError(
            f"{hub.named} cannot be put into the Hugging Face cache {default_hub_cache()} on {os.uname().nodename}: "
            f"{error.strerror}. Set HF_HUB_CACHE to a folder that this user may write to."
        )
    return ClusterError(
        f"The Hugging Face cache {default_hub_cache()} on {os.uname().nodename} fails ({error.strerror or error}). Is its disk "
        f"still there?"
    )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _bytes_here(base: str, files: Sequence[HubFile]) -> int:
    """What is here of some files, whole ones and beginnings."""
    blobs = repository(base) / "blobs"
    return sum(_size(blobs / file.digest) or _size(beginning_of(base, file.digest)) for file in files)


def _waiting(base: str, files: Sequence[HubFile]) -> Progress:
    return _Tally(base, files).progress(is_waiting=True)


@dataclass
class _Tally:
    """Counts what arrives in several threads."""

    base: str
    files: Sequence[HubFile]
    num_done: int = 0
    done_bytes: int = 0
    _own_bytes: int = 0
    _began: float = field(default_factory=time.monotonic)
    _adding: Any = field(default_factory=threading.Lock)

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)

    def arrived(self, num_bytes: int) -> None:
        with self._adding:
            self.done_bytes += num_bytes
            self._own_bytes = max(0, self._own_bytes + num_bytes)

    def file_done(self) -> None:
        with self._adding:
            self.num_done += 1

    def progress(self, *, is_waiting: bool = False) -> Progress:
        elapsed = time.monotonic() - self._began
        return Progress(
            base=self.base,
            node=os.uname().nodename,
            done_bytes=self.done_bytes,
            total_bytes=self.total_bytes,
            num_done=self.num_done,
            num_files=len(self.files),
            bytes_per_s=self._own_bytes / elapsed if elapsed > 0 else 0.0,
            is_waiting=is_waiting,
        )
