"""How a checkpoint comes to count, is found again and goes: the commit protocol, on every rank.

    local and NFS    checkpoints/step-00000100.tmp-2/{rank-0/..., rank-1/...}  -> state/...   --rename-->   step-00000100/
    object store     checkpoints/step-00000100/state-2/...   and last of all   step-00000100/MANIFEST.json

Every rank copies its state into memory of the host, and training goes on while a thread writes it into files, brings these to
the disk, hashes, uploads and reads them back. Without such memory training waits until the files are written. Rank 0 then
writes MANIFEST.json with the size and hash of every file; the rename, or the manifest object, is the commit. Before that moment
the checkpoint does not exist, after it every byte of it was seen on the storage. Whatever fails on one rank fails on all of
them, and the commit before stays as it was.

The fence is the number of the attempt: the newest attempt writes its number into FENCE.json, and an orphaned process of an
older one finds a larger number there when it comes to commit.

DeepSpeed's shards are pickles, and loading a stranger's pickle runs the stranger's code. A state is loaded only when its folder
holds exactly the files of the manifest, with their hashes. This protects against damage and against files slipped in, not
against somebody who may rewrite manifest and files together: whoever can write to the storage is trusted.

Long because a save and a load are one protocol between ranks: what one of them waits for, another has to reach, and both are
read side by side. What needs no other rank is in `commit` and `checkpoint_folder`.
"""

import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raytune import storage
from raytune.errors import CheckpointError, RaytuneError, StorageFullError, UnfitCheckpointError
from raytune.local_files import is_full, local_errors, sync_local_folder
from raytune.plan.identity.identity import differences
from raytune.plan.run_plan import CheckpointPlan
from raytune.run_folder import RunFolder, step_folder
from raytune.training.checkpoints.checkpoint_folder import CheckpointFolder
from raytune.training.checkpoints.commit import (
    Commit,
    SavedFile,
    altered,
    best_commit,
    bring,
    committed,
    damaged,
    entries,
    measured,
    misplaced,
    retain,
)
from raytune.training.checkpoints.peers import Peers, gather_in_own_group
from raytune.training.checkpoints.snapshot import HostMemory, Snapshot
from raytune.training.engines.engine import Engine
from raytune.training.engines.state_files import write_now
from raytune.units import MIB, format_bytes
from raytune.versions import library_versions

# Saves differ a little in size from one to the next: JSON, and DeepSpeed's own bookkeeping.
_ROOM_FACTOR = 1.02

Report = Callable[..., None]
"""`EventLog.write`, or anything else that takes the name of an event and its facts by keyword."""


def load_state(engine: Engine, commit: Commit, at_hand: Path) -> None:
    """Load the files of a commit, which are intact, into this rank's engine.

    Raises:
        CheckpointError: whatever the engine raises.
    """
    try:
        engine.load(at_hand)
    except RaytuneError:
        raise
    except Exception as error:
        raise CheckpointError(f"{commit.path} is intact but cannot be loaded: {type(error).__name__}: {error}") from error


class Checkpoints:
    """The checkpoints of one run, as one attempt at it reads and writes them.

    Every rank builds one and calls its methods at the same points. Building claims the run for this attempt and removes what
    older attempts left unfinished.

    Args:
        attempt: number of this attempt, from `next_attempt`.
        fingerprint: the identity of the run (plan.identity), which must equal that of a checkpoint for it to be resumed.
        prepare: called on every rank with the step of a commit before that is loaded into the engine.
        report: told about saves, skips and damage; called on rank 0 only, from any thread.
        scratch: private folder on this node for what is on its way to or from an object store.
        timeout_s: how long a rank waits for the others to finish their part of a save.
        clock: seconds since 1970.

    Raises:
        CheckpointError: if a newer attempt has taken the run over.
    """

    def __init__(
        self,
        folder: RunFolder,
        engine: Engine,
        *,
        attempt: int,
        policy: CheckpointPlan,
        fingerprint: Mapping[str, Any],
        report: Report,
        prepare: Callable[[int], None] = lambda step: None,
        scratch: Path | None = None,
        timeout_s: float = 1800.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder, self._engine, self._policy = folder, engine, policy
        self._attempt, self._clock = attempt, clock
        self._prepare = prepare
        self._fingerprint = json.loads(json.dumps(fingerprint))  # as a manifest gives it back: lists for tuples
        self._report = report if engine.rank == 0 else _say_nothing
        self._place = CheckpointFolder(folder, attempt)
        self._peers = Peers(engine.rank, engine.gather_objects, CheckpointError)
        # A group of its own: while the thread of a save talks to its peers, the training thread goes on using the engine's.
        self._saving_peers = Peers(engine.rank, gather_in_own_group(engine.world_size, timeout_s), CheckpointError)
        self._saving: _Saving | None = None
        self._newest: Commit | None = None
        self._previous_failed = False
        room = policy.snapshot
        self._memory = HostMemory(room.bytes_of(engine.rank), engine.device) if room else None
        self._own_bytes = 0
        self._known_later: dict[int, dict[str, float]] = {}
        name = hashlib.sha256(folder.path.encode()).hexdigest()[:16]
        self._scratch = Path("/")  # of no use on local storage
        if not self._place.is_local:
            self._scratch = self._peers.together(scratch_root)[engine.rank] if scratch is None else scratch
            self._scratch = self._scratch / name / f"rank-{engine.rank}"
            self._peers.together(lambda: storage.remove_folder(self._scratch, self._scratch.parent))
        self._peers.decide(self._place.claim)

    def load_newest(self) -> Commit | None:
        """Load the newest intact commit into the engine; None if the run has none yet.

        Damaged commits on the way are set aside and reported; every rank has checked its own files before any rank loads.

        Raises:
            CheckpointError: if there are checkpoints but none is intact, or the newest does not fit this run.
            ClusterError: if the storage does not answer; no run starts from scratch for that reason.
        """
        while True:
            commit = self._peers.decide(self._newest_readable)
            if commit is None:
                return None
            problems = self._fetch(commit)
            if not problems:
                self._prepare(commit.step)
                self._load_fetched(commit, self._engine)
                self._newest = commit
                return commit
            self._peers.decide(lambda c=commit, p=problems: self._set_aside(c.step, p))

    def load(self, commit: Commit, engine: Engine) -> None:
        """Load a certain commit into an engine, such as the best one at the end of a run.

        Raises:
            CheckpointError: if it is damaged or does not fit this run.
        """
        self._peers.decide(lambda: self._refuse_stranger(commit))
        if problems := self._fetch(commit):
            raise CheckpointError(f"{commit.path} is damaged: {'; '.join(problems[:5])}.")
        self._load_fetched(commit, engine)

    def go_back(self, bad_step: int) -> Commit | None:
        """Load the newest intact commit that a bad step does not speak against, and uncommit later ones. Every rank calls it.

        A step measures the weights that it begins with, so that those right before it are no good either. Whoever is killed on
        the way goes on from what is still there, and meets the same again.

        Args:
            bad_step: counted from 1.

        Returns:
            None if there is no such commit; then nothing was loaded or uncommitted.

        Raises:
            CheckpointError: if none of them is intact, or a newer attempt has taken the run over.
        """
        try:
            self.wait()
        except RaytuneError:
            self._previous_failed = True  # reported already
        if not self._peers.decide(lambda: any(commit.step < bad_step - 1 for commit in committed(self._folder))):
            return None
        self._peers.decide(lambda: self._uncommit_from(bad_step - 1))
        commit = self.load_newest()
        reached = commit.step if commit else -1
        # Later steps are made again, to other weights.
        self._known_later = {step: values for step, values in self._known_later.items() if step <= reached}
        return commit

    def _uncommit_from(self, step: int) -> None:
        """Remove the commits from a step on, the newest first; rank 0."""
        self._place.refuse_newer_attempt()
        for commit in reversed(committed(self._folder)):
            if commit.step >= step:
                self._place.discard(commit.path)
                self._report("checkpoint_deleted", step=commit.step)

    def best(self) -> Commit | None:
        """The commit whose model is the result of the run so far."""
        return self._peers.decide(lambda: best_commit(self._measured(), self._policy.metric, self._policy.mode))

    def learn(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take what else was measured of a step, whether or not it is saved yet; rank 0. It counts once a checkpoint is there."""
        self._known_later[step] = self._known_later.get(step, {}) | dict(metrics)

    def _measured(self) -> list[Commit]:
        return measured(committed(self._folder), self._known_later)

    def save(self, step: int, *, metrics: Mapping[str, float], position: dict[str, Any] | None = None) -> None:
        """Save what the engine holds after `step`; returns when it is copied, or where there is no memory for that written.

        A save that fails on its way to the commit is reported; the next call then waits for its own commit, so that only a
        second failure in a row ends the run.

        Args:
            metrics: ranks checkpoints and is kept with this one. Flush the metrics file first.
            position: as of `Commit`.

        Raises:
            StorageFullError: if there is no room, before anything was written.
            CheckpointError, UserError, ClusterError: on every rank, at the second failure in a row.
        """
        try:
            self.wait()
        except RaytuneError:
            self._previous_failed = True  # reported already; this save takes its place
        self._make_room(step)
        saving = _Saving(step, dict(metrics), self._draft(step), position)
        try:
            with local_errors(saving.draft):
                storage.remove_folder(saving.draft, saving.draft.parent)
                saving.draft.mkdir(parents=True)
                saving.snapshot = Snapshot(self._memory) if self._memory else None
                self._engine.save(saving.draft, saving.snapshot or write_now)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the thread tells the other ranks and raises it on all of them
            saving.engine_error = error
        self._saving = saving
        threading.Thread(target=self._finish, args=(saving,), name=f"checkpoint {step}", daemon=True).start()
        if self._previous_failed:
            self.wait()

    def wait(self) -> Commit | None:
        """Wait until the save in flight is committed; the newest commit that this attempt has loaded or made.

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

    def release(self) -> None:
        """Let go of the memory that states are copied into: nothing is saved any more."""
        if self._memory:
            self._memory.release()

    # --- Steps of a save -----------------------------------------------------------------------------------------------------

    def _make_room(self, step: int) -> None:
        """See that every disk has room for the next save before anybody writes."""
        self._peers.decide(lambda: self._place.remove_unfinished(step))
        short = self._short_of_room(step)
        if short:
            self._peers.decide(self._place.clear)
            short = self._short_of_room(step)
        if short:
            raise StorageFullError(
                f"There is no room for the checkpoint of step {step}: {'; '.join(short)}. The checkpoints before it are intact. "
                f"Free some space or lower checkpoint.keep_last, then run the same command again."
            )

    def _short_of_room(self, step: int) -> list[str]:
        """Disks that the next save does not fit on, a phrase each; the same on every rank."""
        draft = self._draft(step)
        disk = str(draft.parent.parent) if self._place.is_local else f"{self._scratch.parent} of {os.uname().nodename}"
        asked = self._peers.together(lambda: (disk, self._own_bytes, storage.free_bytes(draft) or 0))
        short = []
        for name in sorted({name for name, _, _ in asked}):
            needed = round(_ROOM_FACTOR * sum(wanted for other, wanted, _ in asked if other == name))
            free = min(free for other, _, free in asked if other == name)
            if needed > free:
                short.append(f"{name} needs {format_bytes(needed)} and has {format_bytes(free)} free")
        return short

    def _finish(self, saving: "_Saving") -> None:
        """From what the engines wrote to the commit; runs in a thread on every rank."""
        try:
            stored = self._saving_peers.together(lambda: self._store(saving))
            files = [file for own in stored for file in own]
            saving.commit = self._saving_peers.decide(lambda: self._commit(saving, files))
        except BaseException as error:  # raised again by `wait`, which takes a save without an error for a good one
            saving.error = error
            if self._engine.rank == 0:
                with suppress(RaytuneError):  # what made the save fail may stop this too; the next save or start clears up
                    self._place.remove_unfinished(saving.step)
            self._report("checkpoint_failed", step=saving.step, kind=type(error).__name__, reason=str(error))
        else:
            self._own_bytes = sum(file.size for file in stored[self._engine.rank])
            self._report("checkpoint_saved", step=saving.step, num_bytes=saving.commit.num_bytes, path=saving.commit.path)
            if self._engine.rank == 0:
                self._delete_old()
        finally:
            if not self._place.is_local:
                with suppress(RaytuneError):
                    storage.remove_folder(saving.draft, self._scratch.parent)
            saving.finished.set()

    def _store(self, saving: "_Saving") -> list[SavedFile]:
        """Bring this rank's files to the storage, beside those of the others; what is there then."""
        if saving.engine_error is not None:
            raise _explained(saving.engine_error, saving) from saving.engine_error
        if saving.snapshot:
            try:
                with local_errors(saving.draft):
                    saving.snapshot.write()
            except Exception as error:
                raise _explained(error, saving) from error
        if self._place.is_local:
            sync_local_folder(saving.draft)
            names = list(storage.file_sizes(saving.draft))
            digests = dict(zip(names, storage.in_parallel(lambda name: storage.file_digest(saving.draft / name), names)))
            state = storage.local_path(self._place.state_of_step(saving.step))
            for name in names:
                (state / name).parent.mkdir(parents=True, exist_ok=True)
                os.rename(saving.draft / name, state / name)
            storage.remove_folder(saving.draft, self._place.path)
        else:
            digests = storage.upload_folder(saving.draft, self._place.state_of_step(saving.step))
        return [SavedFile(rank=self._engine.rank, name=name, size=d.size, sha256=d.sha256) for name, d in digests.items()]

    def _commit(self, saving: "_Saving", files: list[SavedFile]) -> Commit:
        """Write the manifest and make it count; rank 0."""
        state = self._place.state_of_step(saving.step)
        assert len({file.name for file in files}) == len(files), f"two ranks saved a file of the same name: {files}"
        commit = Commit(
            path=self._place.of_step(saving.step),
            step=saving.step,
            world_size=self._engine.world_size,
            attempt=self._attempt,
            parent=self._newest.step if self._newest else None,
            created=self._clock(),
            metrics=saving.metrics,
            fingerprint=self._fingerprint,
            position=saving.position,
            versions=library_versions(),
            folder=state.rpartition("/")[2],
            files=tuple(files),
        )
        if problems := misplaced(commit, storage.file_sizes(state)):
            raise CheckpointError(
                f"{state} does not hold what the ranks saved, as rank 0 on {os.uname().nodename} sees it: "
                f"{'; '.join(problems[:5])}. Is {self._folder.storage} the same shared folder on every node?"
            )
        self._place.commit(commit)
        return commit

    def _delete_old(self) -> None:
        """Remove what the policy does not keep; rank 0. The newest commit was just verified: a good one always stays."""
        try:
            for commit in retain(self._measured(), self._policy)[1]:
                self._place.discard(commit.path)
                self._report("checkpoint_deleted", step=commit.step)
        except RaytuneError as error:  # the save itself succeeded; what stays now goes after the next one
            self._report("checkpoint_not_deleted", reason=str(error))

    # --- Steps of a load -----------------------------------------------------------------------------------------------------

    def _newest_readable(self) -> Commit | None:
        """The newest commit with a readable manifest, or None for a run without any; rank 0."""
        for step, entry in reversed(entries(self._folder).items()):
            if isinstance(entry, Commit):
                self._refuse_stranger(entry)
                return entry
            self._set_aside(step, [entry])
        if names := damaged(self._folder):
            raise CheckpointError(
                f"{self._folder.checkpoints} holds no intact checkpoint, but {len(names)} damaged: {', '.join(names)}. "
                f"To start from scratch, choose another run name or remove that folder."
            )
        return None

    def _refuse_stranger(self, commit: Commit) -> None:
        """Raise unless this attempt may go on from a commit; rank 0. Other numbers of workers are the engine's to judge."""
        if changed := differences(commit.fingerprint, self._fingerprint):
            changes = "; ".join(f"{key}: {old!r} -> {new!r}" for key, (old, new) in changed.items())
            raise UnfitCheckpointError(
                f"{commit.path} belongs to a run with other settings ({changes}). Undo the change, or choose another run name."
            )
        now = library_versions()
        moved = {name: (then, now.get(name)) for name, then in commit.versions.items() if now.get(name) != then}
        changes = "; ".join(f"{name} {then} -> {here or 'not installed'}" for name, (then, here) in moved.items())
        if any(here is None or here.split(".")[0] != then.split(".")[0] for then, here in moved.values()):
            raise UnfitCheckpointError(
                f"{commit.path} was saved under other major versions ({changes}). Install the versions that it was saved with."
            )
        if moved:
            self._report("versions_changed", step=commit.step, changes=changes)

    def _fetch(self, commit: Commit) -> list[str]:
        """Have every rank's files at hand and checked; what is wrong with them, the same on every rank."""
        listing = self._peers.decide(lambda: misplaced(commit, storage.file_sizes(commit.state)))
        if listing:
            return listing
        wrong = self._peers.together(lambda: self._check_in_place(commit) if self._place.is_local else self._download(commit))
        return sorted({problem for own in wrong for problem in own})

    def _check_in_place(self, commit: Commit) -> list[str]:
        """Which of this rank's share of the files are damaged; all ranks together look at every file once."""
        share = [file for file in commit.files if file.rank % self._engine.world_size == self._engine.rank]
        return altered(share, lambda file: f"{commit.state}/{file.name}")

    def _download(self, commit: Commit) -> list[str]:
        """Bring what this rank loads to this node; which of it is damaged. Hashed where it will be loaded from."""
        target = self._at_hand(commit)
        storage.remove_folder(target, self._scratch.parent)
        with local_errors(target):
            target.mkdir(parents=True)
        return bring(commit, self._engine.rank, target)

    def _load_fetched(self, commit: Commit, engine: Engine) -> None:
        def load() -> None:
            try:
                load_state(engine, commit, self._at_hand(commit))
            finally:
                if not self._place.is_local:
                    storage.remove_folder(self._at_hand(commit), self._scratch.parent)

        self._peers.together(load)

    def _set_aside(self, step: int, problems: list[str]) -> None:
        aside = self._place.set_aside(step)
        self._report("checkpoint_damaged", step=step, problems=problems[:10], set_aside=aside)

    # --- Folders of this rank ------------------------------------------------------------------------------------------------

    def _draft(self, step: int) -> Path:
        """Local folder that this rank's engine writes into."""
        folder = self._place.draft_of_step(step) if self._place.is_local else self._scratch / step_folder(step)
        return folder / f"rank-{self._engine.rank}"

    def _at_hand(self, commit: Commit) -> Path:
        """Local folder that this rank's engine loads from."""
        return storage.local_path(commit.state) if self._place.is_local else self._scratch / f"load-{step_folder(commit.step)}"


@dataclass(slots=True)
class _Saving:
    """A save between the engine's part and the commit."""

    step: int
    metrics: dict[str, float]
    draft: Path
    """Where the files of this rank's engine are written."""
    position: dict[str, Any] | None = None
    snapshot: Snapshot | None = None
    """What this rank's engine gave, until it is written there."""
    engine_error: BaseException | None = None
    finished: threading.Event = field(default_factory=threading.Event)
    commit: Commit | None = None
    error: BaseException | None = None


def _explained(error: BaseException, saving: _Saving) -> RaytuneError:
    """What an engine raised while saving, as an error that says where and why."""
    if isinstance(error, RaytuneError):
        return error
    step, draft = saving.step, saving.draft
    free, cause = storage.free_bytes(draft) or 0, f"{type(error).__name__}: {error}"
    if is_full(error) or free < MIB:
        return StorageFullError(
            f"The disk filled up while step {step} was saved into {draft} ({format_bytes(free)} free; {cause}). The checkpoints "
            f"before it are intact. Free some space or lower checkpoint.keep_last, then run the same command again."
        )
    return CheckpointError(f"Could not save step {step} into {draft} on {os.uname().nodename}: {cause}")


def scratch_root() -> Path:
    """A folder on this node that only this user can write to: what lies there is loaded, pickles among it."""
    root = Path(tempfile.gettempdir()) / f"raytune-{os.getuid()}"
    with local_errors(root):
        root.mkdir(mode=0o700, exist_ok=True)
        facts = root.lstat()
    if root.is_symlink() or facts.st_uid != os.getuid() or facts.st_mode & 0o022:
        raise CheckpointError(f"{root} belongs to somebody else, or others may write to it. Set TMPDIR to a private folder.")
    return root


def _say_nothing(event: str, **facts: object) -> None:
    """The report of ranks other than 0."""
