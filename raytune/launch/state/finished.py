"""A run that has finished: read again from its folder, without a cluster, its data or its base, unless its files were damaged."""

import glob
import logging
from collections.abc import Iterator, Sequence
from json import JSONDecodeError
from pathlib import Path

from pydantic import ValidationError

from raytune.config.load import config_diff
from raytune.config.sections.row_sources import named_code, named_models, named_tasks, row_sources
from raytune.config.sections.run import RunConfig
from raytune.errors import UserError
from raytune.launch.state.record import RunRecord, read_plan
from raytune.launch.state.result import RunResult
from raytune.metrics.history import History
from raytune.plan.identity.settings import asks_for
from raytune.plan.strategies.stopping import rules_of
from raytune.run_folder import RunFolder
from raytune.storage import exists, file_sizes, is_local, local_path, read_json
from raytune.training.checkpoints.commit import committed
from raytune.training.steps.stopping import Curve, Findings, verdict

RULES = ("training.early_stopping", "training.overfitting")
TEST = "data.test"
FREE = (
    *("version", "name", "preset", "storage", "sweep", "checkpoint.", "evaluation.", "training.logging_steps", "data.store"),
    *("data.limits", "training.divergence", "callbacks", "tracking", TEST),
    *RULES,
)
"""Beginnings of keys that change neither what a step computes nor how it is divided."""

IDLE = ("checkpoint.", "evaluation.", "training.divergence", TEST)
"""Of these, what would have changed the run that has finished, and changes it no more."""

_log = logging.getLogger(__name__)


def answer(config: RunConfig, folder: RunFolder) -> RunResult | None:
    """The result of the finished run that a config asks for, from its folder alone.

    What was asked then is compared with what is asked now. Of data and base it only looks at the dates of files that are still
    there.

    Returns:
        None if there is no such run, if its files are damaged, if it goes on under the rules of the config, if the config differs
        in more than what changes no numbers, or if a file that it names has changed since: whether it asks for another run is
        then for the plan to say.

    Raises:
        UserError: if it is damaged beyond repair.
    """
    record = RunRecord.read(folder)
    if record is None or record.state != "finished":
        return None
    try:
        asked_then = RunConfig.model_validate(record.config)
    except ValidationError:  # the config of another raytune; the plan is compared by what both know
        return None
    if exists(folder.plan) and not asks_for(read_plan(folder), asked_then, config, may_change=FREE):
        return None
    if _has_changed(config, record.created) or not is_finished(folder, config):
        return None
    rules = () if read_plan(folder).stopping == rules_of(config) else RULES  # a run that went on was last asked for otherwise
    changes = config_diff(asked_then, config)
    if idle := [f"{key} ({old} -> {new})" for key, old, new in changes if key.startswith((*IDLE, *rules))]:
        _log.warning("Run %r has finished before; what has changed since is not applied to it: %s.", folder.name, ", ".join(idle))
    return RunResult.read(folder)


def _has_changed(config: RunConfig, since: float) -> bool:
    """Whether a local file of data, model, teacher or objective was written, replaced or moved there after `since` (seconds since
    1970)."""
    code = [file for key, file in named_code(config) if not key.startswith(FREE)]
    rows = (source.path for key, sources in row_sources(config).items() if key != TEST for source in sources)
    paths = [path for path in (*named_models(config).values(), *named_tasks(config).values(), *rows, *code) if is_local(path)]
    named = [Path(name) for path in paths for name in glob.glob(str(local_path(path)), recursive=True)]
    # Folders and links too: another one that was moved to this name brings files that are older.
    entries = [entry.lstat() for name in named for entry in (name, *name.rglob("*")) if entry.is_dir() or entry.is_file()]
    return any(max(entry.st_mtime, entry.st_ctime) > since for entry in entries)


def goes_on(folder: RunFolder, config: RunConfig) -> bool:
    """Whether a finished run is to be trained further: a rule ended it early, the rules of the config would not have, and the
    checkpoint that it ended with is still there."""
    record = RunRecord.read(folder)
    if record is None or record.state != "finished" or not (exists(folder.plan) and exists(folder.result)):
        return False
    try:
        stopped = Findings.from_json(read_json(folder.result)).stopped
    except (ValueError, TypeError):  # it is torn, and exported again first
        return False
    if stopped is None or max((commit.step for commit in committed(folder)), default=0) != stopped.step:
        return False
    curve = Curve.of(read_plan(folder)).read(History.read(folder.metrics), stopped.step)
    return verdict(curve, rules_of(config), stopped.step).stopped is None


def is_finished(folder: RunFolder, config: RunConfig) -> bool:
    """Whether a run has finished and what it left is still there; a damaged one has to be exported again, and one that a rule
    ended may have to go on.

    Raises:
        UserError: if it is damaged and no checkpoint is left to export it from.
    """
    record = RunRecord.read(folder)
    if record is None or record.state != "finished" or goes_on(folder, config):
        return False
    problems = list(damage(folder))
    if not problems:
        return True
    if not committed(folder):
        raise UserError(
            f"{damage_text(folder, problems)} No checkpoint is left to export the model from. Put the files back, or train it "
            f"again under another name (name=...)."
        )
    return False


def damage_text(folder: RunFolder, problems: Sequence[str]) -> str:
    """What `damage` found, as a sentence."""
    return f"Run {folder.name!r} in {folder.storage} had finished, but {'; '.join(problems[:5])}."


def damage(folder: RunFolder) -> Iterator[str]:
    """What is missing or torn of what a finished run leaves, a phrase per file. Weights are judged by their sizes."""
    if not exists(folder.plan):
        yield f"{folder.plan} is missing"
    try:
        expected = read_json(folder.result)["model_files"]
    except FileNotFoundError:
        yield f"{folder.result} is missing"
        return
    except (JSONDecodeError, UnicodeDecodeError) as error:
        yield f"{folder.result} is torn ({error})"
        return
    except (KeyError, TypeError):  # an earlier raytune did not write down what the model consists of
        return
    found = file_sizes(folder.model)
    for name, size in expected.items():
        path = f"{folder.model}/{name}"
        if name not in found:
            yield f"{path} is missing"
        elif found[name] != size and not (name.endswith(".json") and _is_json(path)):  # small files may be edited by hand
            yield f"{path} has {found[name]} bytes instead of {size}"


def _is_json(path: str) -> bool:
    try:
        read_json(path)
    except ValueError:
        return False
    return True
