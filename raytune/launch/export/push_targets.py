"""Places that a model is pushed to: a hub, which takes all files at once, and a folder or bucket, which takes them one by one.

Both hold `raytune_push.json`, which lists what was pushed with sizes and hashes: by it a place is known for one of raytune's. A
folder or a bucket has it first, as "sending", and last, as "whole"; what makes the rest a model (its config and index) goes
before anything else changes and comes back last, so that nobody loads a mixture. The same push goes on with what is lacking.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import raytune
from raytune import storage
from raytune.errors import ClusterError, ModelError, UserError
from raytune.hub.upload import FileToSend, HubTarget
from raytune.model.card import HERE, is_ours
from raytune.model.files.saved_files import LAST, is_of_model
from raytune.object_store import bucket_must_exist, shown
from raytune.run_folder import MODEL_CARD

MANIFEST = "raytune_push.json"
_IGNORED = (".gitattributes", MANIFEST)
_MOST_BYTES = 16 << 20
"""Of a manifest or a card that is read from a target."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What became of a push."""

    where: str
    """As one would type it."""
    commit: str | None
    num_sent: int
    """Files that were not there already."""


class Target(Protocol):
    """A place that a model is pushed to."""

    @property
    def loaded_from(self) -> str:
        """What code gives to transformers to load the model from there."""
        ...

    def prepare(self, *, replace: bool) -> tuple[str, ...]:
        """Look at the place, before anything is sent, and make it where it is not there; what is to be said of it.

        Raises:
            UserError: if somebody else's files are there and `replace` is not set, or it may not be written to.
        """
        ...

    def send(self, files: Mapping[str, FileToSend], message: str) -> Sent:
        """Send all files, and read back what is there then.

        Args:
            files: by name; last what makes a folder a model.
        """
        ...


class ToHub:
    """A model on a hub.

    Args:
        private: whether nobody else is to see it; an existing one has to be so already.
    """

    def __init__(self, name: str, revision: str | None, *, private: bool) -> None:
        self._hub, self._name, self._private = HubTarget(name, revision), name, private
        self._keeps_card = False

    @property
    def loaded_from(self) -> str:
        return self._name

    def prepare(self, *, replace: bool) -> tuple[str, ...]:
        is_public = self._hub.is_public()
        if is_public and self._private:
            raise UserError(
                f"{self._name} is public: everybody could load what is pushed there. If that is meant, say --public; else name "
                f"another model, or make this one private first."
            )
        self._hub.create(private=self._private)
        commit, there = self._hub.there()
        _refuse_strangers(self._name, there, replace)
        if MODEL_CARD in there and not replace:
            self._keeps_card = not is_ours(self._hub.read(commit, MODEL_CARD, _MOST_BYTES).decode(errors="replace"))
        stays_private = is_public is False and not self._private
        return ("it was private before, and stays so",) * stays_private + (_KEPT_CARD,) * self._keeps_card

    def send(self, files: Mapping[str, FileToSend], message: str) -> Sent:
        sent = {name: file for name, file in files.items() if name != MODEL_CARD or not self._keeps_card}
        before = self._hub.there()[1]
        without = [name for name in before if is_of_model(name) and name not in sent and name != MODEL_CARD]
        commit = self._hub.send(sent, without, message)
        there = {file.name: file for file in self._hub.files(commit)}
        for name, file in sent.items():
            held = there.get(name)
            if held is None or held.size != file.size or held.digest != (file.sha256 if held.is_large else file.git_sha1):
                what = "is not there" if held is None else "holds something else than was sent"
                raise ClusterError(f"{self._name} at commit {commit} is not what was pushed: {name} {what}. Push it again.")
        new = [name for name in sent if name != MANIFEST and (name not in before or before[name].digest != there[name].digest)]
        return Sent(where=f"hub://{self._name}", commit=commit, num_sent=len(new))


class ToStorage:
    """A folder or a URL.

    Args:
        path: as `storage` takes it.
    """

    def __init__(self, path: str) -> None:
        self._path = storage.absolute(path)
        self._keeps_card = False

    loaded_from = HERE  # a bucket is copied first, and whose folders are whose is nobody's business

    def prepare(self, *, replace: bool) -> tuple[str, ...]:
        storage.refuse_unusable(self._path)
        with bucket_must_exist(self._path):
            there = storage.file_sizes(self._path)
        _refuse_strangers(shown(self._path), there, replace)
        with suppress(FileNotFoundError):
            text = storage.read_bytes(f"{self._path}/{MODEL_CARD}").decode(errors="replace")
            self._keeps_card = not replace and not is_ours(text)
        return (_KEPT_CARD,) if self._keeps_card else ()

    def send(self, files: Mapping[str, FileToSend], message: str) -> Sent:
        kept = (MANIFEST, MODEL_CARD) if self._keeps_card else (MANIFEST,)
        sent = {name: file for name, file in files.items() if name not in kept}
        manifest = json.loads(files[MANIFEST].path.read_bytes())
        there = storage.file_sizes(self._path)
        same = storage.in_parallel(lambda name: self._is_there(name, sent[name], there), sent)
        lacking = [name for name, is_there in zip(sent, same, strict=True) if not is_there]
        stale = [name for name in there if is_of_model(name) and name not in sent and name != MODEL_CARD]
        if lacking or stale:
            storage.write_json(f"{self._path}/{MANIFEST}", manifest | {"state": "sending"})
            for name in LAST:
                if name in there:
                    self._remove(name)
            for name in stale:
                self._remove(name)
            first = [name for name in lacking if name not in LAST]
            storage.in_parallel(lambda name: self._send(name, sent[name]), first)
            for name in sent:
                if name in LAST:
                    self._send(name, sent[name])
        storage.write_json(f"{self._path}/{MANIFEST}", manifest)
        found = storage.file_sizes(self._path)
        wrong = [name for name, file in sent.items() if found.get(name) != file.size]
        if wrong:
            raise ClusterError(
                f"{shown(self._path)} is not what was pushed: {wrong[0]} has another size, or is not there. Push it again."
            )
        return Sent(where=shown(self._path), commit=None, num_sent=len(lacking))

    def _is_there(self, name: str, file: FileToSend, there: Mapping[str, int]) -> bool:
        return there.get(name) == file.size and storage.file_digest(f"{self._path}/{name}").sha256 == file.sha256

    def _send(self, name: str, file: FileToSend) -> None:
        """Send a file and read it back."""
        digest = storage.upload_file(file.path, f"{self._path}/{name}")
        if digest.sha256 != file.sha256:
            raise ModelError(f"{file.path} changed while it was being pushed. Push again when it is complete.")

    def _remove(self, name: str) -> None:
        storage.remove_folder(f"{self._path}/{name}", self._path)


_KEPT_CARD = f"the {MODEL_CARD} that is there was edited, or is not raytune's: it stays (--replace writes over it)"


def manifest_of(files: Mapping[str, FileToSend]) -> dict[str, Any]:
    """What a place is told of what was pushed there."""
    listed = {name: {"size": file.size, "sha256": file.sha256} for name, file in files.items()}
    return {"raytune": raytune.__version__, "state": "whole", "files": listed}


def _refuse_strangers(place: str, there: Mapping[str, Any], replace: bool) -> None:
    """Refuse a place with files that no push of raytune's has left.

    Raises:
        UserError: naming some of them.
    """
    if replace or MANIFEST in there:
        return
    if strangers := [name for name in there if name not in _IGNORED]:
        some = ", ".join(strangers[:3]) + (f" and {len(strangers) - 3} others" if len(strangers) > 3 else "")
        raise UserError(
            f"{place} holds files that raytune did not push there: {some}. Name another place; or add --replace, which writes "
            f"over files of the same names and removes other files of models there, and leaves the rest."
        )
