"""What is in the files of a base: hashes of a folder's files, the commit of a hub model.

The content is part of a run: weights that were replaced under the same path are another base, and the same files in another
folder are not. Tokenizer and `generation_config.json` belong to it, since what a run saves holds them. A file that was hashed
once is not read again while its size, times and inode stay what they were.
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from raytune.errors import ModelError
from raytune.hub.snapshot import described
from raytune.model.files.weight_files import weight_files
from raytune.plan.model.base_model import is_on_hub, model_files
from raytune.plan.run_plan import ModelPlan
from raytune.units import MIB

Content = dict[str, str]
"""File name -> hash for a folder; `commit` -> hash for a hub model."""

Watch = Callable[[int], AbstractContextManager[Callable[[int], None]]]
"""Given how many bytes will be read, a context that lasts until they are, and what to call with each number of bytes that was."""

COMMIT = "commit"
CONTENT_FILE = "base_content.json"
"""In the folder of an adapter: the content of the base that it was trained on. Merging reads it, PEFT does not."""
SAVED_WITH_IT = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
"""Files beside the weights that decide what is trained on, or come out again beside what was trained."""
DIGEST_LENGTH = 32
"""Hexadecimal digits of a SHA-256, from its beginning, as `sha256sum` prints it."""
_CHUNK_BYTES = 8 * MIB
SETTLED_S = 2.0
"""A file that changed less than this before it was hashed is hashed again next time: the clock of a file system is too coarse to
tell two changes of one moment apart."""


def is_known_by_commit(model: ModelPlan) -> bool:
    """Whether a base is known by its commit, the same on every rank, whatever lies on its node."""
    return COMMIT in (model.content or {})


def base_content(
    path: str, revision: str | None, *, trust_remote_code: bool = False, cache: Path | None = None, watch: Watch | None = None
) -> Content:
    """The content of a base.

    Args:
        path: as `files.resolve_model_path` gives it.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: whether Python files beside the weights are run, and so belong to the model.
        cache: folder of known hashes; default: raytune's in the user's cache.
        watch: for a person who waits for it; called from several threads.

    Raises:
        ModelError: if there is no such base, or a file cannot be read.
        ClusterError: if the hub has to be asked and does not answer.
    """
    if is_on_hub(path):
        return {COMMIT: described(path, revision, with_code=trust_remote_code)}
    folder = Path(model_files(path))
    files = [folder / "config.json", *weight_files(folder)]
    files += [folder / name for name in SAVED_WITH_IT if (folder / name).is_file()]
    if trust_remote_code:
        files += sorted(folder.rglob("*.py"))
    known = _KnownHashes(cache or _default_cache())
    pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))  # hashing leaves Python's lock
    with (watch or _unwatched)(sum(map(known.unread_bytes, files))) as advance, pool:
        digests = list(pool.map(partial(known.hash_of, advance=advance), files))
    return {file.relative_to(folder).as_posix(): digest for file, digest in zip(files, digests, strict=True)}


def computing_part(content: Mapping[str, str]) -> Content:
    """What of a content decides what the model computes, from tokens to tokens."""
    return {name: digest for name, digest in content.items() if name not in SAVED_WITH_IT}


def content_changes(was: Mapping[str, str], now: Mapping[str, str]) -> list[tuple[str, str | None, str | None]]:
    """Files that differ between two contents: (name, old hash, new hash); None where a file is only in one."""
    names: Iterable[str] = [*was, *(name for name in now if name not in was)]
    return [(name, was.get(name), now.get(name)) for name in names if was.get(name) != now.get(name)]


def changes_text(changes: Iterable[tuple[str, str | None, str | None]]) -> str:
    """What `content_changes` found, a line for each file."""
    return "\n".join(f"  {name}: {old or 'absent'} -> {new or 'absent'}" for name, old, new in changes)


def way_back(was: Mapping[str, str]) -> str:
    """How to have a content again: files come from a backup, a commit is asked for."""
    return f"Set model.revision to {was[COMMIT]}" if COMMIT in was else "Put the files back"


def refuse_other_base(path: str, was: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse a base that changed while it was in use.

    Raises:
        ModelError: naming each file that did.
    """
    if changes := content_changes(was, now):
        raise ModelError(
            f"The base {path} is not what it was when this command began:\n{changes_text(changes)}\n"
            f"Going on would mix two models. {way_back(was)}, or start anew under another name (name=...)."
        )


def save_content(content: Mapping[str, str], folder: Path) -> None:
    """Write beside an adapter what its base is."""
    (folder / CONTENT_FILE).write_text(json.dumps(content, indent=2) + "\n")


def saved_content(folder: Path) -> Content | None:
    """What the base of an adapter was; None if nothing says it.

    Raises:
        ModelError: if the file cannot be read.
    """
    path = folder / CONTENT_FILE
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path} cannot be read ({error}). Remove it if you know that the base is the right one.") from error


@dataclass(frozen=True, slots=True)
class _KnownHashes:
    """Hashes of files as they were when they were last read, a small file for each."""

    folder: Path

    def unread_bytes(self, file: Path) -> int:
        """How many bytes `hash_of` would read of a file; 0 for one that is not there, which it refuses."""
        try:
            state = _state(file)
        except OSError:
            return 0
        return 0 if self._known(file, state) else state["size"]

    def hash_of(self, file: Path, advance: Callable[[int], None]) -> str:
        """
        Args:
            advance: called with each number of bytes that was read.

        Raises:
            ModelError: if it cannot be read.
        """
        try:
            before = _state(file)
            if known := self._known(file, before):
                return known
            digest = _digest(file, advance)
            if _state(file) != before:
                raise ModelError(f"{file} changed while it was being read. Start again when it is complete.")
        except OSError as error:
            raise ModelError(f"{file} cannot be read: {error}.") from error
        if time.time() - max(before["mtime_ns"], before["ctime_ns"]) / 1e9 > SETTLED_S:
            _write(self._entry(file), {"file": str(file), "state": before, "sha256": digest})
        return digest

    def _known(self, file: Path, state: Mapping[str, int]) -> str | None:
        values = _read(self._entry(file))
        return str(values["sha256"]) if values and values.get("state") == state else None

    def _entry(self, file: Path) -> Path:
        return self.folder / f"{hashlib.sha256(os.fsencode(file.resolve())).hexdigest()[:DIGEST_LENGTH]}.json"


def _state(file: Path) -> dict[str, int]:
    """What changes when a file does. The time of the inode's own change also tells of contents under an old date."""
    status = file.stat()
    return {
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
        "inode": status.st_ino,
    }


def _digest(file: Path, advance: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()[:DIGEST_LENGTH]


@contextmanager
def _unwatched(num_bytes: int) -> Iterator[Callable[[int], None]]:
    yield lambda more: None


def _read(entry: Path) -> dict | None:
    try:
        values = json.loads(entry.read_text())
    except (OSError, ValueError):
        return None  # not known, or half written by a process that died: read the file itself
    return values if isinstance(values, dict) and isinstance(values.get("sha256"), str) else None


def _write(entry: Path, values: dict) -> None:
    with suppress(OSError):  # a home that cannot be written to costs time, nothing else
        entry.parent.mkdir(parents=True, exist_ok=True)
        descriptor, unfinished = tempfile.mkstemp(dir=entry.parent, suffix=".partial")
        with os.fdopen(descriptor, "w") as stream:
            json.dump(values, stream)
        Path(unfinished).replace(entry)


def _default_cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "raytune" / "hashes"
