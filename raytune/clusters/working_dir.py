"""What a job takes along: code and what the config names, without runs, caches and secrets, and raytune where it is not there.

A job's files lie readable on every node and with everybody who reaches the dashboard, hence the care.
"""

import glob
import logging
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

from raytune.clusters.secret_files import SECRET_FOLDERS, looks_secret, secret_in
from raytune.config.sections.row_sources import all_sources, named_code, named_models, named_tasks
from raytune.config.sections.run import RunConfig
from raytune.errors import UserError
from raytune.local_files import local_errors
from raytune.plan.costs.hardware import HARDWARE, PACKAGED_HARDWARE
from raytune.plan.model.base_model import DEMO
from raytune.units import MIB, format_bytes
from raytune.user_code import FILE_ENDING, parts_of

PACKAGE = Path(__file__).parents[1]

LAUNCHER = "launch.py"

CACHES = (
    ".git", ".hg", ".svn", "__pycache__", ".pytest_cache", ".ruff_cache", ".mypy_cache", ".hypothesis", ".tox", ".nox",
    ".ipynb_checkpoints", ".cache", "node_modules", "*.egg-info", "wandb", "mlruns",
)  # fmt: skip
"""Names of folders that no job reads."""
CODE = (
    ".py", ".pyi", ".sh", ".bash", ".yaml", ".yml", ".toml", ".cfg", ".ini", ".json", ".jinja", ".jinja2", ".j2",
    ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp",
)  # fmt: skip
"""Endings of files that are taken without being named. In a Python package, whatever lies there is."""
LARGE = 20 * MIB
"""A file of this size is spoken of: every node unpacks it, and every other submission of changed files sends it again."""

_CODE_UP_TO = MIB
_CODE_NAMES = ("requirements*.txt", "Makefile", ".gitignore", ".rayignore")
_NUM_NAMED = 5
_WHERE_ELSE = "Log in on the nodes instead (`hf auth login`, a cloud role, a mounted file)"

_quiet = logging.getLogger(f"{__name__}.ray")
_quiet.setLevel(logging.WARNING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """The files that a job takes along."""

    files: dict[str, Path]
    """Where they lie here, by their path inside the job's working directory."""
    refused: dict[str, str]
    """Left out, and why: they look like secrets, are links out of the folder, or no files."""
    runs: tuple[str, ...]
    """Left out: run folders, stores, checkpoints and environments, which a job cannot use there."""
    unnamed: tuple[str, ...]
    """Left out: neither code nor named by the config."""
    samples: dict[str, str]
    """Rows that are sent although they hold what looks like a secret, and what: texts to be learned from show samples of such."""

    @property
    def command(self) -> tuple[str, ...]:
        """How the job starts raytune."""
        return ("python", LAUNCHER) if LAUNCHER in self.files else ("python", "-m", "raytune.cli")

    @property
    def notes(self) -> list[str]:
        """What a user should know before the files are sent, a line each."""
        lines = [f"left out: {name} ({reason})" for name, reason in self.refused.items()]
        lines += [
            f"{name}{what}: sent, because rows may show samples of such. If it is real, stop the job and change it"
            for name, what in self.samples.items()
        ]
        if self.unnamed:
            named = f"{', '.join(self.unnamed[:_NUM_NAMED])}{_and_more(self.unnamed)}"
            lines.append(f"left out, neither code nor named by the config: {named}")
        if self.runs:
            lines.append(
                f"left out, of earlier runs or of this machine: {', '.join(self.runs[:_NUM_NAMED])}{_and_more(self.runs)}"
            )
        sizes = {name: path.stat().st_size for name, path in self.files.items()}
        lines += [f"large: {name} ({format_bytes(size)}) is sent to every node" for name, size in sizes.items() if size >= LARGE]
        return lines


def _and_more(names: Sequence[str]) -> str:
    return f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""


@dataclass(slots=True)
class _Left:
    refused: dict[str, str] = field(default_factory=dict)
    runs: list[str] = field(default_factory=list)


def contents(folder: Path, named: Iterable[str], rows: Iterable[str] = ()) -> Contents:
    """Choose what a job takes along from a working directory; .gitignore and .rayignore count as they do for `ray job submit`.

    Args:
        named: files, folders and globs that the job's config names, as `named_by` gives them: of these and of code, all is taken.
        rows: those of them that are rows to train on or to answer, as `rows_named_by` gives them.

    Raises:
        UserError: if the folder is none, or what is named cannot be sent: rows where they hold a credential that is no sample,
            other files where they hold what looks like one.
    """
    if not folder.is_dir():
        raise UserError(f"The working directory {folder} is not a folder. Name one that holds the config: --working-dir FOLDER.")
    root, left = folder.resolve(), _Left()
    with local_errors(folder):
        found = dict(_walk(folder, "", root, (), frozenset(), left))
        asked = _named_files(folder, root, named, found)
        of_rows, samples = _named_files(folder, root, rows, found), {}
        is_code = {name: name in asked or _is_code(folder, name, path) for name, path in found.items()}
        files = asked | {name: path for name, path in found.items() if is_code[name]}
        for name, path in list(files.items()):
            if secret := secret_in(path, may_show_samples=name in of_rows):
                if name in of_rows and not secret.is_certain:
                    samples[name] = str(secret)
                    continue
                if name in asked:
                    raise UserError(
                        f"{name}{secret}. The config names it, but a job's files lie readable on every node; nothing was sent. "
                        f"{_WHERE_ELSE}, take the secret out, or put the file where the nodes see it and only you."
                    )
                left.refused[name] = secret.reason
                del files[name]
        unnamed = [name for name in found if not is_code[name]]
        for name in [name for name in unnamed if found[name].stat().st_size <= _CODE_UP_TO]:
            if secret := secret_in(found[name]):
                left.refused[name] = secret.reason
        if "raytune/__init__.py" not in files:  # a folder with a config alone: the code comes from here
            files.update(_own_code())
    return Contents(
        files=dict(sorted(files.items())),
        refused=dict(sorted(left.refused.items())),
        runs=tuple(sorted(left.runs)),
        unnamed=tuple(sorted(name for name in unnamed if name not in left.refused)),
        samples=dict(sorted(samples.items())),
    )


_NAME_PATHS = ("data.", "model.base", "strategy.replay", "strategy.ewc", "strategy.distillation")
"""Beginnings of keys whose values, where a sweep draws them, may be paths."""


def named_by(config: RunConfig) -> list[str]:
    """Paths that a config names and a job would look for where it runs: rows, template, models, code; also those of a sweep."""
    code = [file for _, file in named_code(config)]
    names = [*rows_named_by(config), config.data.template, *named_models(config).values(), *named_tasks(config).values(), *code]
    if config.sweep:
        drawn = [value for key, value in config.sweep.space.items() if key.startswith(_NAME_PATHS)]
        drawn_code = [value for key, value in config.sweep.space.items() if key.startswith("strategy.objective")]
        code = [parts_of(text)[0] for dimension in drawn_code for text in _texts(dimension.model_dump())]
        names += [module for module in code if module.endswith(FILE_ENDING)]
        names += [text for dimension in drawn for text in _texts(dimension.model_dump())]
        names += [text for trial in config.sweep.first for text in _texts(trial)]
    return _in_working_dir(names)


def rows_named_by(config: RunConfig) -> list[str]:
    """Of the paths that a config names, those of rows that are trained on, validated on or answered."""
    return _in_working_dir(source.path for source in all_sources(config))


def _in_working_dir(names: Iterable[str]) -> list[str]:
    """Without what lies elsewhere, or is the built-in toy's."""
    return [
        name
        for name in dict.fromkeys(names)
        if "://" not in name and not name.startswith(("/", "~", f"{DEMO}:")) and name != DEMO
    ]


def path_in_job(folder: Path, name: str) -> str:
    """A file of the working directory as the job finds it.

    Raises:
        UserError: if it does not lie there, so that the job would not have it.
    """
    path = Path(os.path.abspath(name))
    root = Path(os.path.abspath(folder))
    if not path.is_relative_to(root):
        raise UserError(
            f"{name} lies outside of {root}, the only folder that the job takes along. Copy it there, or name a folder above "
            f"both: --working-dir FOLDER."
        )
    return str(path.relative_to(root))


# --- Details -----------------------------------------------------------------------------------------------------------------


def _own_code() -> dict[str, Path]:
    """The package that runs here, as a job takes it along."""
    files = {f"raytune/{name}": path for name, path in _walk(PACKAGE, "", PACKAGE.resolve(), (), frozenset(), _Left())}
    if HARDWARE.is_dir():  # of an editable installation, which has the catalogue beside the package
        files |= {f"raytune/plan/{PACKAGED_HARDWARE.name}/{path.name}": path for path in HARDWARE.glob("*.yaml")}
    return files


def _walk(
    folder: Path,
    inside: str,
    root: Path,
    ignored: Sequence[Callable[[Path], bool]],
    above: frozenset[Path],
    left: _Left,
) -> Iterator[tuple[str, Path]]:
    """Files below a folder. Links are followed, as Ray does, but neither in circles nor out of `root`."""
    here = folder.resolve()
    if here in above:
        return
    ignored = [*ignored, *get_excludes_from_ignore_files(folder, include_gitignore=True, logger=_quiet)]
    for path in sorted(folder.iterdir()):
        name = f"{inside}{path.name}"
        if any(is_ignored(path) for is_ignored in ignored) or any(fnmatch(path.name, pattern) for pattern in CACHES):
            continue
        if reason := _why_not(path, root):
            left.refused[f"{name}/" if path.name in SECRET_FOLDERS else name] = reason
        elif path.is_dir():
            if _is_output(path):
                left.runs.append(f"{name}/")
            else:
                yield from _walk(path, f"{name}/", root, ignored, above | {here}, left)
        elif path.suffix not in (".pyc", ".pyo"):
            yield name, path


def _why_not(path: Path, root: Path) -> str:
    """Why a file or folder may not be sent, as its name and kind tell; empty: it may."""
    if path.name.encode(errors="ignore").decode() != path.name:
        return "its name is no text in UTF-8"
    try:
        target = path.resolve(strict=True)
        mode = target.stat().st_mode
    except (OSError, RuntimeError):
        return "a link that leads nowhere" if path.is_symlink() else "cannot be read"
    if not target.is_relative_to(root):
        return "a link out of the folder"
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        return "no file, but a pipe, a socket or a device"
    parts = target.relative_to(root).parts
    if path.name in SECRET_FOLDERS or any(part in SECRET_FOLDERS for part in parts):
        return "a folder of secrets" if stat.S_ISDIR(mode) else "in a folder of secrets"
    if stat.S_ISREG(mode) and (looks_secret(path.name) or looks_secret(target.name)):
        return "its name is that of a secret"
    if not os.access(target, os.R_OK):
        return "cannot be read"
    return ""


def _named_files(folder: Path, root: Path, named: Iterable[str], found: dict[str, Path]) -> dict[str, Path]:
    """Files behind the names of a config, by their path in the folder. Names that are no file here are another's business.

    Raises:
        UserError: if one of them may not be sent.
    """
    files: dict[str, Path] = {}
    for name in named:
        # As `source_files` reads them: a file that there is goes before files that its name would match.
        for match in [name] if (folder / name).exists() else sorted(glob.glob(name, root_dir=folder, recursive=True)):
            inside = os.path.normpath(match)
            path = folder / inside
            left = _Left()
            if inside.startswith(".."):
                raise UserError(f"The config names {name}, which lies outside of {folder}. {_TAKEN_ALONG}")
            if reason := _why_not(path, root):
                raise UserError(f"The config names {inside}, which is not sent with a job: {reason}. {_TAKEN_ALONG}")
            if path.is_file() and inside not in found and not _is_below_output(folder, inside):
                raise UserError(
                    f"The config names {inside}, which is not sent with a job: .gitignore or .rayignore names it. {_TAKEN_ALONG}"
                )
            files |= dict(_walk(path, f"{inside}/", root, (), frozenset(), left)) if path.is_dir() else {inside: path}
            for inner, reason in left.refused.items():
                raise UserError(f"The config names {inside}, but {inner} in it is not sent with a job: {reason}. {_TAKEN_ALONG}")
    return files


_TAKEN_ALONG = "Copy it into the folder, or put it where every node sees it and name it by its absolute path."


def _is_below_output(folder: Path, inside: str) -> bool:
    """Whether a file lies in a run or a cache of the folder, of which only what is named is sent."""
    above = [folder / parent for parent in Path(inside).parents if parent.name]
    return any(_is_output(path) or any(fnmatch(path.name, pattern) for pattern in CACHES) for path in above)


def _is_code(folder: Path, name: str, path: Path) -> bool:
    if any((folder / parent / "__init__.py").is_file() for parent in Path(name).parents if parent.name):
        return True
    return any(fnmatch(path.name, pattern) for pattern in _CODE_NAMES) or (
        path.suffix.lower() in CODE and path.stat().st_size <= _CODE_UP_TO
    )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def _is_output(folder: Path) -> bool:
    """Whether a folder is a run, a checkpoint, a store of tokens, or a Python environment: large, and of no use to a job."""
    return (
        (folder / "pyvenv.cfg").exists()
        or (folder / "MANIFEST.json").exists()
        or ((folder / "run.json").exists() and (folder / "plan.json").exists())
        or (folder.name in ("checkpoints", "runs") and not (folder / "__init__.py").exists())
        or re.fullmatch(r"(checkpoint-\d+|step-\d{8}(\..*)?)", folder.name) is not None
    )
