"""A committed checkpoint as its manifest describes it: read, checked, ranked. No torch: the launcher lists checkpoints too."""

import hashlib
import json
import math
import posixpath
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from raytune import storage
from raytune.errors import CheckpointError, PlanError
from raytune.metrics.json_numbers import decode_number, encode_number
from raytune.plan.run_plan import CheckpointPlan
from raytune.run_folder import DAMAGED_FOLDER, DAMAGED_MANIFEST, MANIFEST, STEP_FOLDER, RunFolder
from raytune.storage import Digest
from raytune.units import format_bytes

FORMAT = 1
# DeepSpeed's name for what only the rank that saved it will load. It saves downloads, and correctness does not hang on it.
_SHARD = re.compile(r"zero_pp_rank_\d+_")


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedFile:
    """One file of a checkpoint; `name` is relative to the folder that all ranks' files lie in."""

    rank: int
    """The rank that saved it."""
    name: str
    size: int
    sha256: str

    def __post_init__(self) -> None:
        """Raises ValueError for a name that leads out of the folder: manifests are read from storage that others may write."""
        if not self.name or "\\" in self.name or posixpath.normpath(self.name) != self.name or self.name[0] == "/":
            raise ValueError(f"{self.name!r} is no file name inside a checkpoint")
        if self.name.split("/")[0] == "..":
            raise ValueError(f"{self.name!r} leads out of the checkpoint")

    @property
    def digest(self) -> Digest:
        return Digest(self.size, self.sha256)

    def is_needed_by(self, rank: int) -> bool:
        """Whether a rank loads this file: its own ones, and whatever is not one rank's shard."""
        return self.rank == rank or not _SHARD.search(self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """A checkpoint that counts."""

    path: str
    step: int
    """Optimizer steps that went into it."""
    world_size: int
    attempt: int
    """Number of the attempt that wrote it."""
    parent: int | None
    """Step of the checkpoint before it in this attempt or, first of all, the one the attempt resumed from."""
    created: float
    metrics: dict[str, float]
    fingerprint: dict[str, Any]
    """What must not change between saving and resuming: hashes of data and base model, settings that shape the curve."""
    versions: dict[str, str]
    folder: str
    """Folder of the files inside `path`."""
    files: tuple[SavedFile, ...]
    position: dict[str, Any] | None = None
    """Where a run whose rows are streamed goes on reading (data.stream)."""

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def state(self) -> str:
        """Where the files of all ranks lie."""
        return f"{self.path}/{self.folder}"

    def to_manifest(self) -> bytes:
        """The content of MANIFEST.json, with a hash of itself: a flipped digit in a manifest is damage too."""
        body = {"format": FORMAT, **asdict(self), "metrics": {name: encode_number(value) for name, value in self.metrics.items()}}
        del body["path"]
        if self.position is None:
            del body["position"]
        body["fence"] = body.pop("attempt")  # as it is called in the file that fences older attempts off
        body = json.loads(json.dumps(body, allow_nan=False))
        return json.dumps({**body, "sha256": _json_hash(body)}, indent=1).encode()

    @classmethod
    def from_manifest(cls, path: str, data: bytes) -> Self:
        """Read a manifest.

        Raises:
            ValueError: if it is damaged.
            CheckpointError: if a newer raytune wrote it.
        """
        try:
            body = json.loads(data)
            if body.pop("sha256") != _json_hash(body):
                raise ValueError("it does not agree with its own hash")
            if body["format"] > FORMAT:
                raise CheckpointError(
                    f"{path} has checkpoint format {body['format']}, but this raytune reads formats up to {FORMAT}. "
                    f"Resume with the raytune that wrote it ({body['versions'].get('raytune', 'version unknown')})."
                )
            del body["format"]
            body["attempt"] = body.pop("fence")
            metrics = {name: decode_number(value) for name, value in body.pop("metrics").items()}
            files = tuple(SavedFile(**file) for file in body.pop("files"))
            if posixpath.basename(body["folder"]) != body["folder"] or body["folder"] in ("", ".", ".."):
                raise ValueError(f"{body['folder']!r} is no folder inside a checkpoint")
            return cls(path=path, metrics=metrics, files=files, **body)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it is incomplete: {error!r}") from error


def _json_hash(body: object) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


# --- Which checkpoints stay (pure) -------------------------------------------------------------------------------------------


def best_commit(commits: Sequence[Commit], metric: str, mode: Literal["min", "max"]) -> Commit | None:
    """The commit whose model is the result: best by metric, the earliest of equal ones; the newest if none was measured."""
    ranked = _ranked(commits, metric, mode)
    return ranked[0] if ranked else max(commits, key=lambda commit: commit.step, default=None)


def retain(commits: Sequence[Commit], policy: CheckpointPlan) -> tuple[list[Commit], list[Commit]]:
    """Split commits into those that stay and those that go, each by step: the newest and the best stay."""
    by_step = sorted(commits, key=lambda commit: commit.step)
    best = _ranked(commits, policy.metric, policy.mode)[: policy.keep_best]
    kept_steps = {commit.step for commit in (*by_step[-policy.keep_last :], *best)}
    return [c for c in by_step if c.step in kept_steps], [c for c in by_step if c.step not in kept_steps]


def _ranked(commits: Sequence[Commit], metric: str, mode: Literal["min", "max"]) -> list[Commit]:
    """Commits with a finite value of the metric, best first. A model with a loss of NaN or infinity is never the best."""
    measured = [commit for commit in commits if math.isfinite(commit.metrics.get(metric, math.nan))]
    sign = 1 if mode == "min" else -1
    return sorted(measured, key=lambda commit: (sign * commit.metrics[metric], commit.step))


# --- Room on the disk --------------------------------------------------------------------------------------------------------


def required_bytes(checkpoint_bytes: int, policy: CheckpointPlan) -> int:
    """Bytes that the checkpoints of a run take at most: all that are kept, and one that is being written.

    When the final model is written, nothing else is any more; it is smaller than a checkpoint and takes the room of that one.
    """
    return (policy.keep_last + policy.keep_best + 1) * checkpoint_bytes


def refuse_small_disk(
    folder: RunFolder, checkpoint_bytes: int, policy: CheckpointPlan, importance_bytes: int = 0, export_bytes: int = 0
) -> None:
    """Refuse a run whose checkpoints cannot fit, before anything starts; what is already there of it counts as room.

    Args:
        importance_bytes: that EWC's importance of weights takes beside them.
        export_bytes: that exports take, which are measured while training goes on.

    Raises:
        PlanError: with the numbers and the settings that would fit.
    """
    free = storage.free_bytes(folder.checkpoints)
    if free is None:
        return
    beside = {
        folder.importance: (importance_bytes, "the importance of its weights (strategy.ewc)"),
        folder.exports: (export_bytes, "models that are measured on suites (evaluation.while_training)"),
    }
    beside = {path: needed for path, needed in beside.items() if needed[0]}
    there = [folder.checkpoints, *beside]
    available = free + sum(sum(storage.file_sizes(each).values()) for each in there)
    needed = required_bytes(checkpoint_bytes, policy)
    if needed + sum(num_bytes for num_bytes, _ in beside.values()) > available:
        others = "".join(f", and {words} {format_bytes(num_bytes)} beside them" for num_bytes, words in beside.values())
        raise PlanError(
            f"The checkpoints of this run need {policy.keep_last + policy.keep_best + 1} x {format_bytes(checkpoint_bytes)} = "
            f"{format_bytes(needed)} in {folder.checkpoints} (keep_last + keep_best + the one being written){others}, but "
            f"{format_bytes(available)} are free. Lower checkpoint.keep_last or checkpoint.keep_best, or choose a larger storage."
        )


# --- What is there -----------------------------------------------------------------------------------------------------------


def committed(folder: RunFolder) -> list[Commit]:
    """Every commit with a readable manifest, by step. The files themselves are not looked at."""
    return [entry for entry in entries(folder).values() if isinstance(entry, Commit)]


def measured(commits: Sequence[Commit], values: Mapping[int, Mapping[str, float]]) -> list[Commit]:
    """Commits with what else is known of their steps by now, as of suites whose results come later than the save.

    Args:
        values: by step.
    """
    return [replace(commit, metrics=commit.metrics | dict(values.get(commit.step, {}))) for commit in commits]


def entries(folder: RunFolder) -> dict[int, Commit | str]:
    """By step: the commit, or what is wrong with its manifest."""
    found: dict[int, Commit | str] = {}
    for name in storage.list_folder(folder.checkpoints):
        if match := STEP_FOLDER.match(name):
            entry = _entry(f"{folder.checkpoints}/{name}", int(match.group(1)))
            if entry is not None:
                found[int(match.group(1))] = entry
    return dict(sorted(found.items()))


def _entry(path: str, step: int) -> Commit | str | None:
    try:
        commit = Commit.from_manifest(path, storage.read_bytes(f"{path}/{MANIFEST}"))
    except FileNotFoundError:
        # On a file system the folder gets its name with the manifest inside; in an object store it is merely not committed.
        return f"{MANIFEST} is missing" if storage.is_local(path) else None
    except ValueError as error:
        return f"{MANIFEST} is damaged: {error}"
    return commit if commit.step == step else f"{MANIFEST} is that of step {commit.step}"


def damaged(folder: RunFolder) -> list[str]:
    """Names of the checkpoints that were set aside as damaged."""
    names = storage.list_folder(folder.checkpoints)
    if storage.is_local(folder.checkpoints):
        return [name for name in names if DAMAGED_FOLDER.match(name)]
    return [
        name for name in names if STEP_FOLDER.match(name) and storage.exists(f"{folder.checkpoints}/{name}/{DAMAGED_MANIFEST}")
    ]


def next_attempt(folder: RunFolder) -> int:
    """A number for the next attempt, larger than that of any attempt before, whatever command started it."""
    return newest_attempt(folder) + 1


def newest_attempt(folder: RunFolder) -> int:
    """Number of the newest attempt that has claimed the run; 0 before the first."""
    try:
        return int(storage.read_json(folder.fence)["fence"])
    except FileNotFoundError:
        return 0
    except (ValueError, KeyError, TypeError):
        # Not our doing, since it is put in place whole: the manifests carry the number too.
        return max((commit.attempt for commit in committed(folder)), default=0)


def bring(commit: Commit, rank: int, target: Path) -> list[str]:
    """Download what a rank loads of a commit; which of it is damaged. Hashed where it will be loaded from."""
    needed = [file for file in commit.files if file.is_needed_by(rank)]
    storage.in_parallel(lambda name: storage.download_file(f"{commit.state}/{name}", target / name), [f.name for f in needed])
    return altered(needed, lambda file: str(target / file.name))


def misplaced(commit: Commit, sizes: Mapping[str, int]) -> list[str]:
    """How a listing (size by name) differs from the manifest, a phrase per file."""
    expected = {file.name: file.size for file in commit.files}
    problems = [f"{name} is missing" for name in expected.keys() - sizes.keys()]
    # DeepSpeed loads whatever matches its patterns, so that a file too many is as bad as a wrong one.
    problems += [f"{name} does not belong there" for name in sizes.keys() - expected.keys()]
    problems += [
        f"{name} has {sizes[name]} bytes instead of {expected[name]}"
        for name in expected.keys() & sizes.keys()
        if sizes[name] != expected[name]
    ]
    return sorted(problems)


def altered(files: Iterable[SavedFile], path_of: Callable[[SavedFile], str]) -> list[str]:
    """Which files do not have the content that the manifest says, a phrase each; reads every byte."""
    by_name = {file.name: file for file in files}
    digests = storage.in_parallel(lambda name: storage.file_digest(path_of(by_name[name])), by_name)
    return [f"{file.name} has other content" for file, digest in zip(by_name.values(), digests) if digest != file.digest]
