"""A model to where others load it from: looked at first, sent whole, and read back."""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from raytune import storage
from raytune.config.sections.model import is_written_as_path
from raytune.credentials import find_secret
from raytune.errors import UserError
from raytune.hub.upload import FileToSend
from raytune.launch.export.push_targets import MANIFEST, Sent, Target, ToHub, ToStorage, manifest_of
from raytune.launch.state.finished import damage, damage_text
from raytune.launch.state.record import RunRecord
from raytune.model.card import placed
from raytune.model.files.export import ADAPTER_CONFIG
from raytune.model.files.saved_files import SavedModel, look_at_saved, without_local_base
from raytune.object_store import shown
from raytune.run_folder import MODEL_CARD, RunFolder
from raytune.units import MIB, format_bytes

HUB = "hub://"
_CHUNK_BYTES = 8 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class PushOptions:
    """How a model is pushed."""

    private: bool = True
    """On a hub."""
    revision: str | None = None
    """Branch of a hub; None: main."""
    message: str | None = None
    """Of the commit on a hub."""
    replace: bool = False
    """Write over what raytune has not pushed."""
    base: str | None = None
    """What an adapter calls its base there; None: its id on a hub, or the name of its folder."""
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """A model that was pushed."""

    source: str
    where: str
    commit: str | None
    """On a hub."""
    files: dict[str, int]
    """Bytes by name."""
    num_sent: int
    """Files that were not there already."""
    notes: tuple[str, ...]
    """What is to be known of it, in sentences."""

    @property
    def lines(self) -> list[str]:
        at = f", commit {self.commit}" if self.commit else ""
        there = len(self.files) - self.num_sent
        size = format_bytes(sum(self.files.values()))
        return [
            f"pushed   {len(self.files)} files, {size}, to {self.where}{at}" + (f"; {there} were there already" if there else ""),
            "checked  sizes and hashes of all of them, read back from there",
            *(f"note     {note}" for note in self.notes),
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "where": self.where,
            "commit": self.commit,
            "files": self.files,
            "num_sent": self.num_sent,
            "notes": list(self.notes),
        }


def push(model: str, target: str, options: PushOptions, leave_card: Callable[[RunFolder], object]) -> Pushed:
    """Push a saved model.

    Args:
        model: a run folder, or the folder of a model or an adapter; a URL of one.
        target: id on a hub, a URL, or a folder that is written as a path.
        leave_card: writes the card of a run's model, where it has none.

    Raises:
        UserError: before anything is sent, if the model is damaged, the target is none, may not be written to, or holds what
            raytune has not pushed there.
        ClusterError: if the target does not answer; the same command goes on.
    """
    found = _target(target, options)
    source = _source(model, leave_card)
    _refuse_overlap(source, target)
    with ExitStack() as stack:
        folder = storage.local_path(source)
        if not storage.is_local(source):
            folder = Path(stack.enter_context(TemporaryDirectory()))
            storage.download_folder(source, folder)
        saved = look_at_saved(folder, trust_remote_code=options.trust_remote_code)
        scratch = Path(stack.enter_context(TemporaryDirectory()))
        changed, notes = _for_others(saved, found, options, scratch)
        files = {name: _file(changed.get(name, folder / name)) for name in saved.names}
        manifest = scratch / MANIFEST
        manifest.write_text(json.dumps(manifest_of(files), indent=2) + "\n")
        if saved.is_adapter and not saved.is_held_against_base:
            notes = (*notes, "whether the adapter fits its base was not looked at: that is not here, or is not as its files are")
        notes = (*notes, *found.prepare(replace=options.replace))
        sent = found.send(files | {MANIFEST: _file(manifest)}, options.message or f"{_title(model)}, pushed by raytune")
    return _pushed(source, files, sent, (*notes, *_left_out(saved)))


def _target(target: str, options: PushOptions) -> Target:
    if find_secret(target):
        raise UserError(
            f"The target holds a credential: {shown(target)}. It belongs in this machine's own login: the environment, or a file "
            f"of the cloud's tools."
        )
    name = target.removeprefix(HUB)
    if target.startswith(HUB) or ("://" not in target and not is_written_as_path(target)):
        if target and not target.startswith(HUB) and Path(target).exists():
            raise UserError(
                f"{target} is a folder here, and is written like the id of a model on a hub. Write ./{target} for the folder, or "
                f"{HUB}{target}."
            )
        return ToHub(name, options.revision, private=options.private)
    of_hub = {"--revision": options.revision, "--message": options.message, "--public": None if options.private else "public"}
    if given := [option for option, value in of_hub.items() if value is not None]:
        raise UserError(f"{given[0]} is for a target on a hub (owner/name), and {shown(target)} is none. Leave it out.")
    if not target.partition("://")[2 if "://" in target else 0].strip("/"):
        raise UserError(f"{target!r} names no place below it. Give a bucket and a folder, as s3://bucket/folder.")
    return ToStorage(target)


def _source(model: str, leave_card: Callable[[RunFolder], object]) -> str:
    """The folder of the model: that of a finished run whose files are all there, or the one that is named."""
    path = storage.absolute(model)
    if not storage.exists(f"{path}/run.json"):
        return path
    root, _, name = path.rpartition("/")
    folder = RunFolder(root, name)
    record = RunRecord.read(folder)
    state = record.state if record else "unknown"
    if state != "finished":
        raise UserError(f"Run {path} has not finished (it is {state}), so it has no model yet. The same `raytune train` goes on.")
    if problems := list(damage(folder)):
        raise UserError(f"{damage_text(folder, problems)} The same `raytune train` exports it again from its best checkpoint.")
    leave_card(folder)
    return folder.model


def _refuse_overlap(source: str, target: str) -> None:
    if target.startswith(HUB) or ("://" not in target and not is_written_as_path(target)):
        return
    one, other = (f"{_real(path)}/" for path in (source, target))
    if one.startswith(other) or other.startswith(one):
        raise UserError(
            f"{shown(target)} and the model in {shown(source)} are one folder, or one lies in the other. Name another."
        )


def _real(path: str) -> str:
    return str(storage.local_path(path).resolve()) if storage.is_local(path) else storage.absolute(path)


def _for_others(
    saved: SavedModel, target: Target, options: PushOptions, scratch: Path
) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Files that are sent otherwise than they lie here, and what is to be said of it: a card that names the place, and a name for
    the base of an adapter that others can use."""
    changed, notes = {}, []
    card = saved.folder / MODEL_CARD
    if not card.is_file():
        notes.append(f"no {MODEL_CARD} lies beside the model, so that nothing tells what it is (a run's own: raytune report RUN)")
    elif (text := card.read_text(encoding="utf-8", errors="replace")) != (new := placed(text, target.loaded_from, options.base)):
        changed[MODEL_CARD] = scratch / MODEL_CARD
        changed[MODEL_CARD].write_text(new, encoding="utf-8")
    if options.base and not saved.is_adapter:
        raise UserError(f"--base is {options.base}, and {saved.folder} holds a whole model, which names no base. Leave it out.")
    if saved.is_adapter and (named := without_local_base(saved.folder, options.base)):
        name, text = named
        changed[ADAPTER_CONFIG] = scratch / ADAPTER_CONFIG
        changed[ADAPTER_CONFIG].write_text(text)
        hint = "" if options.base else ": its folder on this machine means nothing elsewhere. --base gives it an id of a hub"
        notes.append(f"the adapter there calls its base {name!r}{hint}")
    return changed, tuple(notes)


def _file(path: Path) -> FileToSend:
    """A file with its hashes, read through once."""
    size = path.stat().st_size
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            sha256.update(chunk)
            git.update(chunk)
    return FileToSend(path=path, size=size, sha256=sha256.hexdigest(), git_sha1=git.hexdigest())


def _left_out(saved: SavedModel) -> list[str]:
    if not saved.others:
        return []
    some = ", ".join(saved.others[:3]) + (f" and {len(saved.others) - 3} others" if len(saved.others) > 3 else "")
    return [f"left out, since they are no part of the model: {some}"]


def _pushed(source: str, files: Mapping[str, FileToSend], sent: Sent, notes: tuple[str, ...]) -> Pushed:
    return Pushed(
        source=shown(source),
        where=sent.where,
        commit=sent.commit,
        files={name: file.size for name, file in files.items()},
        num_sent=sent.num_sent,
        notes=notes,
    )


def _title(model: str) -> str:
    *_, above, last = ["", *storage.absolute(model).split("/")]
    return above if last == "model" and above else last
