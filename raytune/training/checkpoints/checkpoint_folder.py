"""The checkpoints folder of a run as one attempt writes to it: claimed, cleared, moved aside, emptied. Rank 0 calls the verbs."""

from pathlib import Path

from raytune import storage
from raytune.errors import TakenOverError
from raytune.local_files import move_local_folder, sync_local_folder
from raytune.run_folder import DAMAGED_MANIFEST, MANIFEST, STEP_FOLDER, UNFINISHED_FOLDER, RunFolder
from raytune.training.checkpoints.commit import Commit, newest_attempt


class CheckpointFolder:
    """Where the checkpoints of a run come to lie.

    Args:
        attempt: number of this attempt.
    """

    def __init__(self, folder: RunFolder, attempt: int) -> None:
        self._folder, self._attempt = folder, attempt
        self.path = folder.checkpoints
        self.is_local = storage.is_local(folder.checkpoints)

    def of_step(self, step: int) -> str:
        """Where a checkpoint lies once it is committed."""
        return self._folder.checkpoint(step)

    def state_of_step(self, step: int) -> str:
        """Where the files of all ranks come together while a step is being saved."""
        path = self.of_step(step)
        return f"{path}.tmp-{self._attempt}/state" if self.is_local else f"{path}/state-{self._attempt}"

    def draft_of_step(self, step: int) -> Path:
        """Local folder that becomes the committed one."""
        return storage.local_path(self.state_of_step(step)).parent

    def claim(self) -> None:
        """Write the fence and clear what older attempts left.

        Raises:
            TakenOverError: if a newer attempt has done so before.
        """
        self.refuse_newer_attempt()
        storage.write_json(self._folder.fence, {"fence": self._attempt})
        self.clear()

    def refuse_newer_attempt(self) -> None:
        newest = newest_attempt(self._folder)
        if newest > self._attempt:
            raise TakenOverError(
                f"Attempt {newest} has taken over {self._folder.path}; this is attempt {self._attempt} and may write no more. "
                f"There is nothing to do: the newer attempt goes on."
            )

    def clear(self) -> None:
        """Remove what no commit refers to."""
        for name in storage.list_folder(self.path):
            path = f"{self.path}/{name}"
            if (match := UNFINISHED_FOLDER.match(name)) and int(match.group(1)) <= self._attempt:
                storage.remove_folder(path, self.path)
            elif STEP_FOLDER.match(name) and not self.is_local:
                self._clear_objects(path)

    def _clear_objects(self, path: str) -> None:
        """Remove what attempts that did not commit this step have uploaded."""
        try:
            commit = Commit.from_manifest(path, storage.read_bytes(f"{path}/{MANIFEST}"))
        except FileNotFoundError:
            if not storage.exists(f"{path}/{DAMAGED_MANIFEST}"):
                storage.remove_folder(path, self.path)
            return
        except ValueError:
            return  # set aside when it comes to loading
        for name in storage.list_folder(path):
            if name not in (MANIFEST, DAMAGED_MANIFEST, commit.folder):
                storage.remove_folder(f"{path}/{name}", path)

    def commit(self, commit: Commit) -> None:
        """Make the files of a commit, which all ranks have brought here, count.

        Raises:
            TakenOverError: if a newer attempt has claimed the run.
        """
        self.refuse_newer_attempt()
        if self.is_local:
            draft = self.draft_of_step(commit.step)
            storage.write_bytes(draft / MANIFEST, commit.to_manifest())
            sync_local_folder(draft)
            # There only if an older attempt committed this step and this one resumed from before it.
            self.discard(commit.path)
            move_local_folder(draft, storage.local_path(commit.path))
        else:
            storage.write_bytes(f"{commit.path}/{MANIFEST}", commit.to_manifest())

    def discard(self, path: str) -> None:
        """Uncommit a checkpoint in one step, then remove it at leisure."""
        if not self.is_local:
            storage.remove_folder(f"{path}/{MANIFEST}", path)
            storage.remove_folder(path, self.path)
        elif storage.exists(path):
            doomed = f"{path}.deleted-{self._attempt}"
            storage.remove_folder(doomed, self.path)
            move_local_folder(storage.local_path(path), storage.local_path(doomed))
            storage.remove_folder(doomed, self.path)

    def set_aside(self, step: int) -> str:
        """Uncommit a damaged checkpoint but keep it for whoever wants to know why; where that is now."""
        path = self.of_step(step)
        if self.is_local:
            aside = f"{path}.damaged"
            storage.remove_folder(aside, self.path)
            move_local_folder(storage.local_path(path), storage.local_path(aside))
        else:
            aside = f"{path}/{DAMAGED_MANIFEST}"
            storage.write_bytes(aside, storage.read_bytes(f"{path}/{MANIFEST}"))
            storage.remove_folder(f"{path}/{MANIFEST}", path)
        return aside

    def remove_unfinished(self, step: int) -> None:
        """Remove what an uncommitted save of this step left on the storage."""
        state = self.state_of_step(step)
        storage.remove_folder(state.rpartition("/")[0] if self.is_local else state, self.path)
