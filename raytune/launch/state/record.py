"""run.json: which run lives in a folder, how far it came, and whether a new command may continue it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Literal, Self

from pydantic import ValidationError

import raytune
from raytune.config.problems import shown
from raytune.config.sections.run import RunConfig
from raytune.errors import UserError
from raytune.plan.identity.identity import differences, identity_of
from raytune.plan.identity.settings import certain_changes, changes_in_keys, key_of
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import RunFolder
from raytune.storage import exists, read_bytes, read_json, write_bytes, write_json
from raytune.training.checkpoints.commit import committed

State = Literal["running", "interrupted", "failed", "finished"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What run.json holds. `attempts` counts starts of a worker group over the life of the run."""

    name: str
    state: State
    attempts: int
    created: float
    """Seconds since 1970."""
    config: dict
    versions: dict[str, str]
    failure: str | None = None

    @classmethod
    def read(cls, folder: RunFolder) -> Self | None:
        """The record of the run in this folder, or None for a new run.

        Raises:
            UserError: if another raytune wrote it.
        """
        if not exists(folder.run):
            return None
        with readable(folder.run, folder):
            return cls(**read_json(folder.run))

    def write(self, folder: RunFolder) -> None:
        write_json(folder.run, asdict(self))

    def next_attempt(self, at_least: int) -> "RunRecord":
        """The record of another attempt, numbered above all known ones and no lower than `at_least`."""
        return replace(self, attempts=max(self.attempts + 1, at_least), state="running", failure=None)


def read_plan(folder: RunFolder) -> RunPlan:
    """The plan that a run was started with.

    Raises:
        UserError: if another raytune wrote it.
    """
    with readable(folder.plan, folder):
        return RunPlan.model_validate_json(read_bytes(folder.plan))


@contextmanager
def readable(path: str, folder: RunFolder) -> Iterator[None]:
    """Say what to do where a file of the run cannot be understood: raytune promises that of its own version's files only."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        writer = _writer(folder)
        by = f"raytune {writer} wrote it" if writer else "another raytune wrote it, or it was edited"
        raise UserError(
            f"{path} is not what raytune {raytune.__version__} reads: {_misfits(error)}. Probably {by}. Continue or read this "
            f"run with the raytune that wrote it, or give a new run another name (name=...)."
        ) from error


def _misfits(error: Exception) -> str:
    """What does not fit, in a line."""
    if isinstance(error, ValidationError):
        problems = [f"{'.'.join(map(str, problem['loc'])) or 'the file'}: {problem['msg']}" for problem in error.errors()]
        return "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
    return f"{error} is missing" if isinstance(error, KeyError) else str(error).removeprefix("RunRecord.__init__() ")


def _writer(folder: RunFolder) -> str | None:
    """Version of the raytune that started a run, as far as its record tells."""
    try:
        return str(read_json(folder.run)["versions"]["raytune"])
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


def write_plan(folder: RunFolder, plan: RunPlan) -> None:
    write_bytes(folder.plan, plan.model_dump_json(indent=2).encode())


def refuse_another_run(folder: RunFolder, plan: RunPlan, config: RunConfig | None = None) -> None:
    """Refuse to continue a run whose steps would compute something else.

    Args:
        config: that the plan was made of, in whose words the differences are told.

    Raises:
        UserError: naming every difference, old and new.
    """
    if not exists(folder.plan):
        _refuse_other_commits(folder, plan)
        return
    before = _config_of(folder)
    configs = (before, config) if before and config else (RunConfig(), RunConfig())
    refuse_changes("run", plan.name, folder.storage, changes_in_keys(read_plan(folder), plan, *configs))


def _refuse_other_commits(folder: RunFolder, plan: RunPlan) -> None:
    """Refuse a plan whose steps would compute something else than those of the newest checkpoint, which alone tells them."""
    newest = max(committed(folder), key=lambda commit: commit.step, default=None)
    if newest:
        found = differences(newest.fingerprint, identity_of(plan))
        changes = [(key_of(leaf), old, new) for leaf, (old, new) in found.items()]
        refuse_changes("run", plan.name, folder.storage, changes)


def refuse_changed_settings(folder: RunFolder, config: RunConfig) -> None:
    """Refuse what makes another run of a config whatever machines and rows there are, before either is looked at.

    Raises:
        UserError: naming every difference, old and new.
    """
    before = _config_of(folder)
    if before is not None and exists(folder.plan):
        changes = certain_changes(read_plan(folder), before, config)
        refuse_changes("run", config.name, folder.storage, changes)


def _config_of(folder: RunFolder) -> RunConfig | None:
    """The config that a run was started with; None if there is none that this raytune reads."""
    record = RunRecord.read(folder)
    try:
        return RunConfig.model_validate(record.config) if record else None
    except ValidationError:
        return None


def refuse_changes(kind: str, name: str, storage: str, changes: Sequence[tuple[str, object, object]]) -> None:
    """Refuse to continue a run or a sweep with other settings: (dotted key, old value, new value).

    Raises:
        UserError: if there are any.
    """
    if changes:
        lines = "\n".join(f"  {key}: {_plain(old)} -> {_plain(new)}" for key, old, new in changes)
        raise UserError(
            f"{kind.capitalize()} {name!r} in {storage} was started with other settings:\n{lines}\n"
            f"Continuing it would mix two {kind}s. Give this one another name (name=...), or restore the settings.",
            keys=tuple(key for key, _, _ in changes),
        )


def _plain(value: object) -> str:
    return value if isinstance(value, str) else shown(value)
