"""Where models of the Hugging Face hub lie on this machine: the layout of huggingface_hub, so that every tool finds them.

models--owner--name/refs/main                    the commit that a branch or tag stood for when it was asked for
models--owner--name/snapshots/COMMIT/NAME        a link to a blob
models--owner--name/blobs/DIGEST                 what is in a file
models--owner--name/blobs/DIGEST.NODE.raytune    the beginning of one that NODE is downloading
.locks/models--owner--name/raytune.lock          held by the process that downloads
"""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DEFAULT_REVISION = "main"
CONFIG = "config.json"
ADOPT_AFTER_S = 900.0
"""A beginning that another node has not added to for so long is taken over: pods come back under new names."""
LOOK_AGAIN_S = 0.5

_COMMIT = re.compile(r"[0-9a-f]{40}")
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EROFS, errno.EPERM)


def default_hub_cache() -> Path:
    """Where huggingface_hub keeps models (its environment variables, in its order)."""
    path = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if not path:
        home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
        path = f"{home}/hub"
    return Path(os.path.expandvars(path)).expanduser()


def is_offline() -> bool:
    """Whether the environment forbids the network, as huggingface_hub reads it (HF_HUB_OFFLINE, else TRANSFORMERS_OFFLINE)."""
    said = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return said.upper() in ("1", "ON", "YES", "TRUE")


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a full commit hash, which never means anything else."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def repository(base: str, cache: Path | None = None) -> Path:
    """The folder of a model in the cache."""
    return (cache or default_hub_cache()) / f"models--{base.replace('/', '--')}"


def cached_commit(base: str, revision: str | None, cache: Path | None = None) -> str | None:
    """The commit that a revision stood for when it was last asked for; None if it never was."""
    if is_commit(revision):
        return revision
    try:
        return (repository(base, cache) / "refs" / (revision or DEFAULT_REVISION)).read_text().strip() or None
    except OSError:
        return None


def cached_snapshot(base: str, revision: str | None, cache: Path | None = None) -> Path | None:
    """The folder of a model's files at a revision, if its config is here; the weights may be elsewhere."""
    commit = cached_commit(base, revision, cache) or revision or DEFAULT_REVISION
    folder = repository(base, cache) / "snapshots" / commit
    return folder if (folder / CONFIG).is_file() else None


def note_commit(base: str, revision: str | None, commit: str) -> None:
    """Remember what a revision stands for."""
    if revision != commit:
        reference = repository(base) / "refs" / (revision or DEFAULT_REVISION)
        reference.parent.mkdir(parents=True, exist_ok=True)
        draft = reference.with_name(f".{uuid.uuid4().hex[:12]}.draft")
        draft.write_text(commit)
        draft.replace(reference)


def put_into_snapshot(base: str, commit: str, name: str, digest: str) -> None:
    """Give a blob its name in the snapshot of a commit; a file that is there already stays."""
    place, blob = repository(base) / "snapshots" / commit / name, repository(base) / "blobs" / digest
    if place.exists():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = place.with_name(f".{uuid.uuid4().hex[:12]}.draft")
    try:
        draft.symlink_to(os.path.relpath(blob, place.parent))
    except OSError:  # a file system without links
        shutil.copyfile(blob, draft)
    draft.replace(place)


def beginning_of(base: str, digest: str) -> Path:
    """The file that this node adds to while it downloads a blob, with what was downloaded of it before.

    Every node has its own: on some shared file systems a lock of one node is none for another.
    """
    blobs = repository(base) / "blobs"
    own = blobs / f"{digest}.{os.uname().nodename}.raytune"
    if not own.exists():
        for other in blobs.glob(f"{digest}.*.raytune"):
            with suppress(FileNotFoundError):
                if time.time() - other.stat().st_mtime > ADOPT_AFTER_S:
                    other.rename(own)
                    break
    return own


@contextmanager
def held(base: str, waiting: Callable[[], None]) -> Iterator[None]:
    """Context in which no other process of this node, or of any node where the file system has locks, downloads a model.

    The system releases the lock of a process that dies.

    Args:
        waiting: called now and then while another process holds it.
    """
    descriptor = _lock_file(base)
    try:
        while not _lock(descriptor):
            waiting()
            time.sleep(LOOK_AGAIN_S)
        yield
    finally:
        os.close(descriptor)


def _lock_file(base: str) -> int:
    """An open file to lock: in the cache, or, where that has no locks or cannot be written to, in this node's own /tmp."""
    name = repository(base).name
    path = default_hub_cache() / ".locks" / name / "raytune.lock"
    descriptor = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        _lock(descriptor)
    except OSError as error:
        if descriptor is not None:
            os.close(descriptor)
        if error.errno not in _NO_LOCKS:
            raise
        digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
        own = Path(tempfile.gettempdir()) / f"raytune-{os.getuid()}-{digest}.lock"
        return os.open(own, os.O_RDWR | os.O_CREAT, 0o600)
    return descriptor


def _lock(descriptor: int) -> bool:
    """Take a lock if nobody else has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
