"""What a checkpoint contains, when it counts, which ones stay.

    local and NFS    checkpoints/step-00000100.tmp-2/rank-0/...   --rename-->   checkpoints/step-00000100/
    object store     checkpoints/step-00000100/fence-2/rank-0/...   and last of all   step-00000100/MANIFEST.json

Every rank writes its own files, and training goes on while a thread brings them to the disk, hashes, uploads and reads them
back. Rank 0 then writes MANIFEST.json with the size and hash of every file; the rename, or the manifest object, is the commit.
Before that moment the checkpoint does not exist, after it every byte of it was seen on the storage. Whatever fails on one rank
fails on all of them, and the commit before stays as it was.

The fence is the number of the attempt: the newest attempt writes its number into FENCE.json, and an orphaned process of an
older one finds a larger number there when it comes to commit.

DeepSpeed's shards are pickles, and loading a stranger's pickle runs the stranger's code. A shard is loaded only when the folder
holds exactly the files of the manifest, with their hashes. This is protection against damage and against files slipped in, not
against somebody who may rewrite the whole folder: whoever writes to the storage is trusted.
"""

import hashlib
import json
import math
import os
import posixpath
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from raytune import storage
from raytune.errors import CheckpointError, PlanError, RaytuneError, StorageFullError
from raytune.metrics import decode_number, encode_number
from raytune.plan.run_plan import CheckpointPlan
from raytune.run_folder import DAMAGED_FOLDER, DAMAGED_MANIFEST, MANIFEST, STEP_FOLDER, UNFINISHED_FOLDER, RunFolder, step_folder
from raytune.storage import Digest
from raytune.units import MIB, format_bytes

if TYPE_CHECKING:
    from raytune.training.engine import Engine

FORMAT = 1
# Libraries whose arithmetic or file formats a checkpoint depends on.
_LIBRARIES = ("raytune", "torch", "transformers", "peft", "deepspeed", "bitsandbytes", "ray")
# Saves differ a little in size from one to the next: JSON, and DeepSpeed's own bookkeeping.
_ROOM_FACTOR = 1.02

T = TypeVar("T")
Report = Callable[..., None]
"""`EventLog.write`, or anything else that takes an event's name and its facts by keyword."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedFile:
    """One file of a checkpoint; `name` is relative to the folder of its rank."""

    rank: int
    name: str
    size: int
    sha256: str

    def __post_init__(self) -> None:
        """Raises ValueError for a name that leads out of the folder: manifests are read from storage that others may write."""
        if not self.name or self.name.startswith("/") or "\\" in self.name or posixpath.normpath(self.name) != self.name:
            raise ValueError(f"{self.name!r} is no file name inside a checkpoint")
        if self.name.split("/")[0] == "..":
            raise ValueError(f"{self.name!r} leads out of the checkpoint")


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """A checkpoint that counts, as its manifest describes it."""

    path: str
    step: int
    """Optimizer steps that went into it."""
    world_size: int
    fence: int
    """Number of the attempt that wrote it."""
    parent: int | None
    """Step of the checkpoint before it in this attempt or, first of all, the one the attempt resumed from."""
    created: float
    metrics: dict[str, float]
    run_state: dict[str, Any]
    """What the policy of the run remembers: best value so far, counters of the stop rules."""
    fingerprint: dict[str, Any]
    """What must not change between saving and resuming: hashes of data, base model, settings that shape the curve."""
    versions: dict[str, str]
    shards_folder: str
    """Folder of the rank folders, relative to `path`: empty on a file system, `fence-2/` in an object store."""
    files: tuple[SavedFile, ...]

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self.files)

    def shard(self, rank: int) -> str:
        """Folder of what one rank saved."""
        return f"{self.path}/{self.shards_folder}rank-{rank}"

    def to_manifest(self) -> bytes:
        """The content of MANIFEST.json, with a hash of itself: a flipped digit in a manifest is damage too."""
        body = {"format": FORMAT, **asdict(self), "metrics": {name: encode_number(value) for name, value in self.metrics.items()}}
        del body["path"]
        return json.dumps({**body, "sha256": _json_hash(body)}, indent=1, allow_nan=False).encode()

    @classmethod
    def from_manifest(cls, path: str, data: bytes) -> Self:
        """Read a manifest.

        Raises:
            ValueError: if it is damaged.
            CheckpointError: if a newer raytune wrote it.
        """
        try:
            body = json.loads(data)
            if isinstance(body, dict) and int(body.get("format", FORMAT)) > FORMAT:
                raise CheckpointError(
                    f"{path} has checkpoint format {body['format']}, written by raytune {body.get('versions', {}).get('raytune')}; "
                    f"this raytune reads up to {FORMAT}. Resume with that version."
                )
            if body.pop("sha256") != _json_hash(body):
                raise ValueError("the manifest does not agree with its own hash")
            del body["format"]
            metrics = {name: decode_number(value) for name, value in body.pop("metrics").items()}
            files = tuple(SavedFile(**file) for file in body.pop("files"))
            return cls(path=path, metrics=metrics, files=files, **body)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the manifest is incomplete: {error!r}") from error


def _json_hash(body: object) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, allow_nan=False).encode()).hexdigest()


# --- Which checkpoints stay (pure) -------------------------------------------------------------------------------------------


def best_commit(commits: Sequence[Commit], metric: str, mode: Literal["min", "max"]) -> Commit | None:
    """The commit whose model is the result: best by metric, the earliest of equal ones; the newest if none was measured."""
    ranked = _ranked(commits, metric, mode)
    return ranked[0] if ranked else max(commits, key=lambda commit: commit.step, default=None)


def retain(commits: Sequence[Commit], policy: CheckpointPlan) -> tuple[list[Commit], list[Commit]]:
    """Split commits into those that stay and those that go, each by step: the newest and the best stay."""
    newest = sorted(commits, key=lambda commit: commit.step)[-policy.keep_last :]
    best = _ranked(commits, policy.metric, policy.mode)[: policy.keep_best]
    kept_steps = {commit.step for commit in (*newest, *best)}
    by_step = sorted(commits, key=lambda commit: commit.step)
    return [commit for commit in by_step if commit.step in kept_steps], [c for c in by_step if c.step not in kept_steps]


def _ranked(commits: Sequence[Commit], metric: str, mode: Literal["min", "max"]) -> list[Commit]:
    """Commits with a finite value of the metric, best first. A model with a loss of NaN or infinity is never the best."""
    measured = [commit for commit in commits if math.isfinite(commit.metrics.get(metric, math.nan))]
    sign = 1 if mode == "min" else -1
    return sorted(measured, key=lambda commit: (sign * commit.metrics[metric], commit.step))


# --- Room on the disk --------------------------------------------------------------------------------------------------------


def required_bytes(checkpoint_bytes: int, policy: CheckpointPlan) -> int:
    """Bytes that the checkpoints of a run take at most: all that are kept, and one that is being written."""
    return (policy.keep_last + policy.keep_best + 1) * checkpoint_bytes


def refuse_small_disk(folder: RunFolder, checkpoint_bytes: int, policy: CheckpointPlan) -> None:
    """Refuse a run whose checkpoints cannot fit, before anything starts; checkpoints that are already there count as room.

    Raises:
        PlanError: with the numbers and the settings that would fit.
    """
    free = storage.free_bytes(folder.checkpoints)
    if free is None:
        return
    there = sum(storage.file_sizes(folder.checkpoints).values())
    needed = required_bytes(checkpoint_bytes, policy)
    if needed > free + there:
        raise PlanError(
            f"The checkpoints of this run need {policy.keep_last} + {policy.keep_best} + 1 x {format_bytes(checkpoint_bytes)} = "
            f"{format_bytes(needed)} in {folder.checkpoints}, where {format_bytes(free + there)} are free. "
            f"Lower checkpoint.keep_last or checkpoint.keep_best, or choose a larger storage."
        )


# --- What is there -----------------------------------------------------------------------------------------------------------


def committed(folder: RunFolder) -> list[Commit]:
    """Every commit with a readable manifest, by step. The files themselves are not looked at."""
    return [entry for entry in _entries(folder).values() if isinstance(entry, Commit)]


def next_fence(folder: RunFolder) -> int:
    """A number for the next attempt, larger than that of any attempt before, by whatever command it was started."""
    return _newest_fence(folder) + 1


def damage(commit: Commit, rank: int) -> list[str]:
    """What is wrong with the files of one rank where they lie, a phrase per file; reads every byte."""
    return _differences(commit, rank, storage.file_sizes(commit.shard(rank)), lambda name: f"{commit.shard(rank)}/{name}")


def _differences(commit: Commit, rank: int, sizes: Mapping[str, int], path_of: Callable[[str], str]) -> list[str]:
    expected = {file.name: Digest(file.size, file.sha256) for file in commit.files if file.rank == rank}
    problems = [f"rank-{rank}/{name} is missing" for name in expected.keys() - sizes.keys()]
    # DeepSpeed loads whatever matches its pattern, so that a file too many is as bad as a wrong one.
    problems += [f"rank-{rank}/{name} does not belong there" for name in sizes.keys() - expected.keys()]
    same_size = []
    for name in sorted(expected.keys() & sizes.keys()):
        if sizes[name] == expected[name].size:
            same_size.append(name)
        else:
            problems.append(f"rank-{rank}/{name} has {sizes[name]} bytes instead of {expected[name].size}")
    digests = storage.in_parallel(lambda name: storage.file_digest(path_of(name)), same_size)
    problems += [f"rank-{rank}/{name} has other content" for name, digest in zip(same_size, digests) if digest != expected[name]]
    return sorted(problems)


def _entries(folder: RunFolder) -> dict[int, Commit | str]:
    """By step: the commit, or what is wrong with its manifest."""
    entries: dict[int, Commit | str] = {}
    for name in storage.list_folder(folder.checkpoints):
        if not (match := STEP_FOLDER.match(name)):
            continue
        step, path = int(match.group(1)), f"{folder.checkpoints}/{name}"
        try:
            entries[step] = Commit.from_manifest(path, storage.read_bytes(f"{path}/{MANIFEST}"))
            if entries[step].step != step:
                entries[step] = f"the manifest is that of step {entries[step].step}"
        except FileNotFoundError:
            # On a file system the folder gets its name with the manifest inside; in an object store it is only not committed.
            if storage.is_local(path):
                entries[step] = f"{MANIFEST} is missing"
        except ValueError as error:
            entries[step] = f"{MANIFEST} is damaged: {error}"
    return dict(sorted(entries.items()))


def _newest_fence(folder: RunFolder) -> int:
    try:
        return int(storage.read_json(folder.fence)["fence"])
    except FileNotFoundError:
        return 0
    except (ValueError, KeyError, TypeError):
        # Torn by something other than us: the manifests carry the number too.
        return max((commit.fence for commit in committed(folder)), default=0)


def library_versions() -> dict[str, str]:
    """Installed versions of what a checkpoint depends on."""
    found = {"python": f"{os.sys.version_info.major}.{os.sys.version_info.minor}"}
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


# --- Saving and loading, on every rank ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Saving:
    """A save between the engine's part and the commit."""

    step: int
    metrics: dict[str, float]
    run_state: dict[str, Any]
    local_folder: Path
    """Where this rank's engine wrote."""
    engine_error: Exception | None = None
    finished: threading.Event = field(default_factory=threading.Event)
    commit: Commit | None = None
    error: Exception | None = None


class Checkpoints:
    """The checkpoints of one run, as one attempt at it reads and writes them.

    Built on every rank; methods marked "all ranks" must be called by every rank at the same point. Building claims the run for
    this attempt and removes what older attempts left unfinished.

    Args:
        fence: number of this attempt, from `next_fence`.
        fingerprint: JSON values that must equal those of a checkpoint for it to be resumed.
        report: told about saves, skips, damage; called on rank 0 only, from any thread.
        scratch: node-local folder for what is on its way to or from an object store.
        timeout_s: how long a rank waits for the others to finish their part of a save.
        clock: seconds since 1970.

    Raises:
        CheckpointError: if a newer attempt has taken the run over.
    """

    def __init__(
        self,
        folder: RunFolder,
        engine: "Engine",
        *,
        fence: int,
        policy: CheckpointPlan,
        fingerprint: Mapping[str, Any],
        report: Report,
        scratch: Path | None = None,
        timeout_s: float = 1800.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder, self._engine, self._policy = folder, engine, policy
        self._fence, self._fingerprint, self._clock = fence, dict(fingerprint), clock
        self._report = report if engine.rank == 0 else _say_nothing
        self._is_local = storage.is_local(folder.checkpoints)
        # Two groups: while the thread of a save talks to its peers, the training thread may have something to agree on.
        self._foreground = _Peers(engine.rank, engine.world_size, timeout_s)
        self._background = _Peers(engine.rank, engine.world_size, timeout_s)
        self._scratch = (
            (scratch or _scratch_root()) / hashlib.sha256(folder.path.encode()).hexdigest()[:16] / f"rank-{engine.rank}"
        )
        self._saving: _Saving | None = None
        self._newest: Commit | None = None
        self._previous_failed = False
        self._own_bytes = 0
        self._foreground.together(lambda: storage.remove_folder(self._scratch, self._scratch.parent))
        self._foreground.decide(self._claim)

    def load_newest(self) -> Commit | None:
        """Load the newest intact commit into the engine; None if the run has none yet. All ranks.

        Damaged commits on the way are set aside and reported; every rank has checked its own files before any rank loads.

        Raises:
            CheckpointError: if there are checkpoints but none is intact, or the newest does not fit this run.
            ClusterError: if the storage does not answer; a run is never started from scratch for that reason.
        """
        while True:
            commit = self._foreground.decide(self._newest_readable)
            if commit is None:
                return None
            problems = [problem for own in self._foreground.together(lambda c=commit: self._fetch(c)) for problem in own]
            if not problems:
                self._load_fetched(commit)
                self._newest = commit
                return commit
            self._foreground.decide(lambda c=commit, p=problems: self._set_aside(c.step, p))

    def load(self, commit: Commit) -> None:
        """Load a certain commit into the engine, such as the best one at the end of a run. All ranks.

        Raises:
            CheckpointError: if it is damaged or does not fit this run.
        """
        self._foreground.decide(lambda: self._refuse_stranger(commit))
        problems = [problem for own in self._foreground.together(lambda: self._fetch(commit)) for problem in own]
        if problems:
            raise CheckpointError(f"{commit.path} is damaged: {'; '.join(problems[:5])}.")
        self._load_fetched(commit)

    def best(self) -> Commit | None:
        """The commit whose model is the result of the run so far. All ranks."""
        return self._foreground.decide(lambda: best_commit(committed(self._folder), self._policy.metric, self._policy.mode))

    def save(
        self,
        step: int,
        *,
        metrics: Mapping[str, float],
        run_state: Mapping[str, Any],
        may_skip: bool = False,
        expected_bytes: int = 0,
    ) -> bool:
        """Save what the engine holds after `step`; returns when the engine has written it, before it is committed. All ranks.

        A save that fails on its way to the commit is reported; the next call then waits for its own commit, so that only a
        second failure in a row ends the run.

        Args:
            metrics: ranks checkpoints and is kept with this one. Flush the metrics file first.
            run_state: JSON values to get back from `load_newest`.
            may_skip: return False, saving nothing, while the save before is still on its way. Otherwise wait for it.
            expected_bytes: size of this rank's files, where it is known before the first save.

        Raises:
            StorageFullError: if there is no room, before anything was written.
            CheckpointError, UserError, ClusterError: on every rank, if this is the second failure in a row.
        """
        if may_skip and not all(self._foreground.together(lambda: self._saving is None or self._saving.finished.is_set())):
            self._report("checkpoint_skipped", step=step, reason="the save before is still on its way to the storage")
            return False
        try:
            self.wait()
        except RaytuneError:
            if self._previous_failed:
                raise
            self._previous_failed = True  # already reported; this save takes its place
        self._make_room(step, max(self._own_bytes, expected_bytes))
        saving = _Saving(step, dict(metrics), dict(run_state), self._drafts(step) / f"rank-{self._engine.rank}")
        try:
            with storage.local_errors(saving.local_folder):
                saving.local_folder.mkdir(parents=True)
                self._engine.save(saving.local_folder)
        except Exception as error:  # told to the other ranks by the thread, which raises it on all of them
            saving.engine_error = error
        self._saving = saving
        threading.Thread(target=self._finish, args=(saving,), name=f"checkpoint {step}", daemon=True).start()
        if self._previous_failed:
            self.wait()
        return True

    def wait(self) -> Commit | None:
        """Wait until the save in flight is committed; the newest commit that this attempt has loaded or made. All ranks.

        Raises:
            StorageFullError, CheckpointError, UserError, ClusterError: the same on every rank, if the save failed.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.finished.wait()
            if saving.error is not None:
                raise saving.error
            self._newest, self._previous_failed = saving.commit, False
        return self._newest

    # --- Steps of a save ---

    def _make_room(self, step: int, own_bytes: int) -> None:
        """See that every disk has room for the next save before anybody writes; removes leftovers of the same step."""
        self._foreground.decide(lambda: self._remove_drafts(step))
        target = self._drafts(step)
        for attempt in ("first", "after clearing"):
            asked = self._foreground.together(
                lambda: (
                    "storage" if self._is_local else os.uname().nodename,
                    own_bytes,
                    storage.free_bytes(target) or 0,
                )
            )
            short = []
            for disk in sorted({disk for disk, _, _ in asked}):
                needed = round(_ROOM_FACTOR * sum(need for name, need, _ in asked if name == disk))
                free = min(free for name, _, free in asked if name == disk)
                if needed > free:
                    short.append(f"{target.parent} ({disk}) needs {format_bytes(needed)}, {format_bytes(free)} are free")
            if not short:
                return
            if attempt == "first":
                self._foreground.decide(self._clear)
        raise StorageFullError(
            f"There is no room for the checkpoint of step {step}: {'; '.join(short)}. The checkpoints before it are intact. "
            f"Free some space or lower checkpoint.keep_last, then run the same command again."
        )

    def _finish(self, saving: _Saving) -> None:
        """From what the engines wrote to the commit; runs in a thread on every rank."""
        try:
            files = [file for own in self._background.together(lambda: self._store(saving)) for file in own]
            saving.commit = self._background.decide(lambda: self._commit(saving, files))
        except Exception as error:  # raised again by `wait`
            saving.error = error
            with suppress(RaytuneError):  # the reason for the failure is often the reason for this one; the next start clears up
                if self._engine.rank == 0:
                    self._remove_drafts(saving.step)
            self._report("checkpoint_failed", step=saving.step, kind=type(error).__name__, reason=str(error))
        else:
            self._own_bytes = sum(file.size for file in files if file.rank == self._engine.rank)
            self._report("checkpoint_saved", step=saving.step, num_bytes=saving.commit.num_bytes, path=saving.commit.path)
            if self._engine.rank == 0:
                self._delete_old()
        finally:
            if not self._is_local:
                with suppress(RaytuneError):
                    storage.remove_folder(saving.local_folder, self._scratch.parent)
            saving.finished.set()

    def _store(self, saving: _Saving) -> list[SavedFile]:
        """Bring this rank's files to the storage; what is there then."""
        if saving.engine_error is not None:
            raise _explained(saving.engine_error, saving.local_folder) from saving.engine_error
        if self._is_local:
            storage.sync_local_folder(saving.local_folder)
            names = list(storage.file_sizes(saving.local_folder))
            digests = dict(zip(names, storage.in_parallel(lambda name: storage.file_digest(saving.local_folder / name), names)))
        else:
            digests = storage.upload_folder(saving.local_folder, f"{self._target(saving.step)}/rank-{self._engine.rank}")
        return [
            SavedFile(rank=self._engine.rank, name=name, size=digest.size, sha256=digest.sha256)
            for name, digest in digests.items()
        ]

    def _commit(self, saving: _Saving, files: list[SavedFile]) -> Commit:
        """Write the manifest and make it count; rank 0."""
        target, path = self._target(saving.step), self._folder.checkpoint(saving.step)
        seen = storage.file_sizes(target)
        unseen = [f"rank-{file.rank}/{file.name}" for file in files if seen.get(f"rank-{file.rank}/{file.name}") != file.size]
        if unseen:
            raise CheckpointError(
                f"Files that other ranks saved are not in {target} as rank 0 on {os.uname().nodename} sees it: {', '.join(unseen[:5])}. "
                f"Is {self._folder.storage} the same shared folder on every node?"
            )
        commit = Commit(
            path=path,
            step=saving.step,
            world_size=self._engine.world_size,
            fence=self._fence,
            parent=self._newest.step if self._newest else None,
            created=self._clock(),
            metrics=saving.metrics,
            run_state=saving.run_state,
            fingerprint=self._fingerprint,
            versions=library_versions(),
            shards_folder="" if self._is_local else f"fence-{self._fence}/",
            files=tuple(files),
        )
        self._refuse_newer_fence()
        if self._is_local:
            storage.write_bytes(f"{target}/{MANIFEST}", commit.to_manifest())
            self._discard(path)  # there only if an older attempt committed it and this one resumed from before it
            storage.move_local_folder(storage.local_path(target), storage.local_path(path))
        else:
            storage.write_bytes(f"{path}/{MANIFEST}", commit.to_manifest())
        return commit

    def _delete_old(self) -> None:
        """Remove what the policy does not keep; rank 0. The newest commit was just verified, so that one good one always stays."""
        try:
            for commit in retain(committed(self._folder), self._policy)[1]:
                self._discard(commit.path)
                self._report("checkpoint_deleted", step=commit.step)
        except RaytuneError as error:  # the save itself succeeded; what stays now goes after the next one
            self._report("checkpoint_not_deleted", reason=str(error))

    # --- Steps of a load ---

    def _newest_readable(self) -> Commit | None:
        """The newest commit with a readable manifest, or None for a run without any; rank 0."""
        for step, entry in reversed(_entries(self._folder).items()):
            if isinstance(entry, Commit):
                self._refuse_stranger(entry)
                return entry
            self._set_aside(step, [entry])
        if damaged := _damaged(self._folder):
            raise CheckpointError(
                f"{self._folder.checkpoints} holds no intact checkpoint, but {len(damaged)} damaged: {', '.join(damaged)}. "
                f"To start from scratch, choose another run name or remove that folder."
            )
        return None

    def _refuse_stranger(self, commit: Commit) -> None:
        """Raise unless this attempt can go on from a commit; rank 0."""
        keys = sorted(commit.fingerprint.keys() | self._fingerprint.keys())
        changed = [key for key in keys if commit.fingerprint.get(key) != self._fingerprint.get(key)]
        if changed:
            changes = "; ".join(f"{key}: {commit.fingerprint.get(key)!r} -> {self._fingerprint.get(key)!r}" for key in changed)
            raise CheckpointError(
                f"{commit.path} belongs to a run with other settings ({changes}). Undo the change, or choose another name."
            )
        if commit.world_size != self._engine.world_size:
            raise CheckpointError(
                f"{commit.path} was saved by {commit.world_size} workers and this attempt has {self._engine.world_size}. "
                f"Set cluster.workers to {commit.world_size}."
            )
        now = library_versions()
        moved = {name: (then, now.get(name)) for name, then in commit.versions.items() if now.get(name) != then}
        major = [name for name, (then, here) in moved.items() if here is None or here.split(".")[0] != then.split(".")[0]]
        changes = "; ".join(f"{name} {then} -> {here or 'not installed'}" for name, (then, here) in moved.items())
        if major:
            raise CheckpointError(
                f"{commit.path} was saved under other major versions ({changes}). Install the versions it was saved with."
            )
        if moved:
            self._report("versions_changed", step=commit.step, changes=changes)

    def _fetch(self, commit: Commit) -> list[str]:
        """Have this rank's files at hand and checked; what is wrong with them."""
        rank = self._engine.rank
        if self._is_local:
            return damage(commit, rank)
        target = self._shard(commit)
        storage.remove_folder(target, self._scratch.parent)
        with storage.local_errors(target):
            target.mkdir(parents=True)
        own = [file for file in commit.files if file.rank == rank]
        sizes = storage.file_sizes(commit.shard(rank))
        wrong = [file.name for file in own if sizes.get(file.name) != file.size]
        if not wrong:
            # Only files of the manifest are taken along, and they are hashed where they will be loaded from.
            storage.in_parallel(
                lambda name: str(storage.download_file(f"{commit.shard(rank)}/{name}", target / name)), [f.name for f in own]
            )
            sizes = storage.file_sizes(target)
        return _differences(commit, rank, sizes, lambda name: str(target / name))

    def _load_fetched(self, commit: Commit) -> None:
        def load() -> None:
            try:
                self._engine.load(self._shard(commit))
            except RaytuneError:
                raise
            except Exception as error:
                raise CheckpointError(
                    f"{commit.path} is intact but could not be loaded: {type(error).__name__}: {error}"
                ) from error
            finally:
                if not self._is_local:
                    storage.remove_folder(self._shard(commit), self._scratch.parent)

        self._foreground.together(load)

    def _set_aside(self, step: int, problems: list[str]) -> None:
        """Uncommit a damaged checkpoint but keep it for whoever wants to know why; rank 0."""
        path = self._folder.checkpoint(step)
        if self._is_local:
            aside = f"{path}.damaged"
            storage.remove_folder(aside, self._folder.checkpoints)
            storage.move_local_folder(storage.local_path(path), storage.local_path(aside))
        else:
            aside = f"{path}/{DAMAGED_MANIFEST}"
            storage.write_bytes(aside, storage.read_bytes(f"{path}/{MANIFEST}"))
            storage.remove_folder(f"{path}/{MANIFEST}", path)
        self._report("checkpoint_damaged", step=step, problems=problems[:10], moved_to=aside)

    # --- The folder ---

    def _claim(self) -> None:
        """Write the fence and clear what older attempts left; rank 0."""
        self._refuse_newer_fence()
        storage.write_json(self._folder.fence, {"fence": self._fence})
        self._clear()

    def _refuse_newer_fence(self) -> None:
        newest = _newest_fence(self._folder)
        if newest > self._fence:
            raise CheckpointError(
                f"Attempt {newest} has taken over {self._folder.path}; this is attempt {self._fence}, which may write no more. "
                f"Nothing to do: the newer attempt goes on."
            )

    def _clear(self) -> None:
        """Remove what no commit refers to; rank 0."""
        for name in storage.list_folder(self._folder.checkpoints):
            path = f"{self._folder.checkpoints}/{name}"
            if (match := UNFINISHED_FOLDER.match(name)) and int(match.group(1)) <= self._fence:
                storage.remove_folder(path, self._folder.checkpoints)
            elif STEP_FOLDER.match(name) and not self._is_local:
                self._clear_objects(path)

    def _clear_objects(self, path: str) -> None:
        """Remove the shards of attempts that did not commit this step."""
        try:
            commit = Commit.from_manifest(path, storage.read_bytes(f"{path}/{MANIFEST}"))
        except FileNotFoundError:
            if not storage.exists(f"{path}/{DAMAGED_MANIFEST}"):
                storage.remove_folder(path, self._folder.checkpoints)
            return
        except ValueError:
            return  # set aside when it comes to loading
        for name in storage.list_folder(path):
            if name.startswith("fence-") and f"{name}/" != commit.shards_folder:
                storage.remove_folder(f"{path}/{name}", path)

    def _discard(self, path: str) -> None:
        """Uncommit a checkpoint in one step, then remove it at leisure; rank 0."""
        if not self._is_local:
            storage.remove_folder(f"{path}/{MANIFEST}", path)
            storage.remove_folder(path, self._folder.checkpoints)
        elif storage.exists(path):
            doomed = f"{path}.deleted-{self._fence}"
            storage.remove_folder(doomed, self._folder.checkpoints)
            storage.move_local_folder(storage.local_path(path), storage.local_path(doomed))
            storage.remove_folder(doomed, self._folder.checkpoints)

    def _target(self, step: int) -> str:
        """Folder of the rank folders of a step while it is being written."""
        path = self._folder.checkpoint(step)
        return f"{path}.tmp-{self._fence}" if self._is_local else f"{path}/fence-{self._fence}"

    def _drafts(self, step: int) -> Path:
        """Local folder that the engines write into."""
        return storage.local_path(self._target(step)) if self._is_local else self._scratch / step_folder(step)

    def _remove_drafts(self, step: int) -> None:
        """Remove what an uncommitted save of this step left; rank 0."""
        storage.remove_folder(self._target(step), self._folder.checkpoints)

    def _shard(self, commit: Commit) -> Path:
        """Local folder that this rank's engine loads from."""
        if self._is_local:
            return storage.local_path(commit.shard(self._engine.rank))
        return self._scratch / f"load-{step_folder(commit.step)}"


def _damaged(folder: RunFolder) -> list[str]:
    names = storage.list_folder(folder.checkpoints)
    if storage.is_local(folder.checkpoints):
        return [name for name in names if DAMAGED_FOLDER.match(name)]
    return [
        name for name in names if STEP_FOLDER.match(name) and storage.exists(f"{folder.checkpoints}/{name}/{DAMAGED_MANIFEST}")
    ]


def _explained(error: Exception, folder: Path) -> RaytuneError:
    """What the engine raised while saving, as an error that says where and why."""
    if isinstance(error, RaytuneError):
        return error
    free = storage.free_bytes(folder) or 0
    # safetensors and torch.save do not pass the errno on.
    if "No space left" in str(error) or "os error 28" in str(error) or free < MIB:
        return StorageFullError(
            f"The disk of {folder} filled up while rank's state was saved ({format_bytes(free)} free; {type(error).__name__}: {error}). "
            f"The checkpoints before it are intact. Free some space or lower checkpoint.keep_last, then run the same command again."
        )
    return CheckpointError(f"Could not save into {folder}: {type(error).__name__}: {error}")


def _scratch_root() -> Path:
    """A folder on this node that only this user can write to: what lies there is loaded, pickles among it."""
    root = Path(tempfile.gettempdir()) / f"raytune-{os.getuid()}"
    with storage.local_errors(root):
        root.mkdir(mode=0o700, exist_ok=True)
        facts = root.lstat()
    if facts.st_uid != os.getuid() or root.is_symlink() or facts.st_mode & 0o077:
        raise CheckpointError(
            f"{root} belongs to somebody else or is open to others. Remove it, or set TMPDIR to a private folder."
        )
    return root


def _say_nothing(event: str, **facts: object) -> None:
    """The report of ranks other than 0."""


class _Peers:
    """The ranks of a run, as far as they have to agree: what one of them raises, all of them raise."""

    def __init__(self, rank: int, world_size: int, timeout_s: float) -> None:
        self._rank, self._world_size = rank, world_size
        self._group: Any = None
        if world_size > 1:
            import torch.distributed  # not at the top: the launcher lists checkpoints without waiting for torch

            self._group = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def together(self, work: Callable[[], T]) -> list[T]:
        """Do something on every rank; the results of all, in the order of ranks, once every rank is done.

        Raises:
            RaytuneError: the error of the lowest rank that failed, on every rank.
        """
        result, failure, cause = None, None, None
        try:
            result = work()
        except RaytuneError as error:
            failure = cause = error
        except Exception as error:
            cause = error
            failure = CheckpointError(f"Rank {self._rank} on {os.uname().nodename}: {type(error).__name__}: {error}")
        outcomes: list[Any] = [(result, failure)]
        if self._group is not None:
            import torch.distributed

            outcomes = [None] * self._world_size
            torch.distributed.all_gather_object(outcomes, (result, failure), group=self._group)
        first = next((error for _, error in outcomes if error is not None), None)
        if first is not None:
            raise first from cause if cause is not first else first.__cause__
        return [result for result, _ in outcomes]

    def decide(self, work: Callable[[], T]) -> T:
        """Do something on rank 0; its result on every rank."""
        return self.together(lambda: work() if self._rank == 0 else None)[0]  # pyright: ignore[reportReturnType]
