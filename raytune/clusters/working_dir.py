"""What a job takes along: the working directory without runs, caches and secrets, and raytune where it is not in it, as one zip.

Equal content makes an equal zip, which Ray keeps under its hash: submitting again uploads nothing.
"""

import logging
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE, get_excludes_from_ignore_files

from raytune.config.section import SECRET
from raytune.errors import UserError
from raytune.local_files import local_errors
from raytune.plan.hardware import HARDWARE, PACKAGED_HARDWARE
from raytune.units import KIB, MIB, format_bytes

PACKAGE = Path(__file__).parents[1]

LAUNCHER = "launch.py"

SECRET_FILES = (
    ".env", ".env.*", "*.env", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.kdbx", "id_rsa*", "id_dsa*", "id_ecdsa*",
    "id_ed25519*", "auth_token", "*_token", "token", "tokens.json", "*credentials*", "secrets.*", "*.secret", "kubeconfig",
    ".netrc", ".pypirc", ".npmrc", ".git-credentials", ".htpasswd", "*service-account*.json", "*service_account*.json",
)  # fmt: skip
"""Names of files that hold nothing but secrets, or mostly."""
SECRET_FOLDERS = (".ssh", ".aws", ".azure", ".gcloud", ".kube", ".docker", ".gnupg")
"""Names of folders of which every file is one."""
CACHES = (
    ".git", ".hg", ".svn", "__pycache__", ".pytest_cache", ".ruff_cache", ".mypy_cache", ".hypothesis", ".tox", ".nox",
    ".ipynb_checkpoints", ".cache", "node_modules", "*.egg-info", "wandb", "mlruns",
)  # fmt: skip
"""Names of folders that no job reads."""

# Kinds of files that configs, scripts and notes are written in. Program text is left alone: it may speak of secrets.
_READ_FOR_SECRETS = (".yaml", ".yml", ".json", ".toml", ".ini", ".cfg", ".conf", ".sh", ".txt", ".md")
_READ_UP_TO = MIB
_FIRST_DATE = (1980, 1, 1, 0, 0, 0)
_NUM_NAMED = 5

_quiet = logging.getLogger(f"{__name__}.ray")
_quiet.setLevel(logging.WARNING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """The files that a job takes along."""

    files: dict[str, Path]
    """Where they lie here, by their path inside the job's working directory."""
    secrets: tuple[str, ...]
    """Left out, because they look like secrets."""
    runs: tuple[str, ...]
    """Left out: run folders, stores, checkpoints and environments, which a job cannot use there."""

    @property
    def command(self) -> tuple[str, ...]:
        """How the job starts raytune."""
        return ("python", LAUNCHER) if LAUNCHER in self.files else ("python", "-m", "raytune.cli")


@dataclass(slots=True)
class _Left:
    secrets: list[str] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)


def contents(folder: Path) -> Contents:
    """Choose what a job takes along from a working directory; .gitignore and .rayignore count as they do for `ray job submit`.

    Raises:
        UserError: if the folder is none, or a config in it holds a secret.
    """
    if not folder.is_dir():
        raise UserError(f"The working directory {folder} is not a folder. Name one that holds the config: --working-dir FOLDER.")
    left = _Left()
    with local_errors(folder):
        files = dict(_walk(folder, "", (), frozenset(), left))
        if "raytune/__init__.py" not in files:  # a folder with a config alone: the code comes from here
            files.update((f"raytune/{name}", path) for name, path in _walk(PACKAGE, "", (), frozenset(), _Left()))
            if HARDWARE.is_dir():  # of an editable installation, which has the catalogue beside the package
                files.update((f"raytune/plan/{PACKAGED_HARDWARE.name}/{path.name}", path) for path in HARDWARE.glob("*.yaml"))
        for name, path in files.items():
            _refuse_secrets_in(name, path)
    return Contents(files=dict(sorted(files.items())), secrets=tuple(sorted(left.secrets)), runs=tuple(sorted(left.runs)))


def pack(packed: Contents, target: Path, limit_bytes: int = GCS_STORAGE_MAX_SIZE) -> int:
    """Write the files into a zip, and return its size in bytes.

    Raises:
        UserError: if it grows over `limit_bytes`, with the largest files.
    """
    with local_errors(target), zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, path in packed.files.items():
            entry = zipfile.ZipInfo(name, _FIRST_DATE)  # neither times nor owners: equal content, equal zip
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (0o755 if os.access(path, os.X_OK) else 0o644) << 16
            with path.open("rb") as reader, archive.open(entry, "w", force_zip64=True) as writer:
                while piece := reader.read(MIB):
                    writer.write(piece)
                    _refuse_large(packed, archive, limit_bytes)
    size = target.stat().st_size
    if size >= limit_bytes:
        raise _too_large(packed, limit_bytes)
    return size


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


def looks_secret(name: str) -> bool:
    """Whether a file is called as files with secrets are."""
    return any(fnmatch(name.lower(), pattern) for pattern in SECRET_FILES)


# --- Details -----------------------------------------------------------------------------------------------------------------


def _walk(
    folder: Path, inside: str, ignored: Sequence[Callable[[Path], bool]], above: frozenset[Path], left: _Left
) -> Iterator[tuple[str, Path]]:
    """Files below a folder; links are followed, as Ray does, but not in circles."""
    here = folder.resolve()
    if here in above:
        return
    ignored = [*ignored, *get_excludes_from_ignore_files(folder, include_gitignore=True, logger=_quiet)]
    for path in sorted(folder.iterdir()):
        name = f"{inside}{path.name}"
        if any(is_ignored(path) for is_ignored in ignored):
            continue
        if path.is_dir():
            if path.name in SECRET_FOLDERS:
                left.secrets.append(f"{name}/")
            elif any(fnmatch(path.name, pattern) for pattern in CACHES):
                continue
            elif _is_output(path):
                left.runs.append(f"{name}/")
            else:
                yield from _walk(path, f"{name}/", ignored, above | {here}, left)
        elif looks_secret(path.name) or looks_secret(path.resolve().name):
            left.secrets.append(name)
        elif path.is_file() and path.suffix not in (".pyc", ".pyo"):
            yield name, path


def _is_output(folder: Path) -> bool:
    """Whether a folder is a run, a checkpoint, a store of tokens, or a Python environment: large, and of no use to a job."""
    return (
        (folder / "pyvenv.cfg").exists()
        or (folder / "MANIFEST.json").exists()
        or ((folder / "run.json").exists() and (folder / "plan.json").exists())
        or folder.name in ("checkpoints", "runs")
        or re.fullmatch(r"(checkpoint-\d+|step-\d{8}(\..*)?)", folder.name) is not None
    )


def _refuse_secrets_in(name: str, path: Path) -> None:
    if path.suffix.lower() not in _READ_FOR_SECRETS or path.stat().st_size > _READ_UP_TO:
        return
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        if found := SECRET.search(line):
            raise UserError(
                f"{name}:{number} holds what looks like a secret ({found[1]}...). A job's files lie readable on every node, so "
                f"nothing was sent. Log in on the nodes instead (`hf auth login`, a cloud role, a mounted file), remove it here, "
                f"or name the file in .rayignore."
            )


def _refuse_large(packed: Contents, archive: zipfile.ZipFile, limit_bytes: int) -> None:
    """While it grows: a folder with a disk image need not be packed to its end."""
    written = archive.fp.tell() if archive.fp else 0
    if written >= limit_bytes + 64 * KIB:
        raise _too_large(packed, limit_bytes)


def _too_large(packed: Contents, limit_bytes: int) -> UserError:
    sizes = sorted(((path.stat().st_size, name) for name, path in packed.files.items()), reverse=True)
    largest = ", ".join(f"{name} ({format_bytes(size)})" for size, name in sizes[:_NUM_NAMED])
    return UserError(
        f"The working directory is too large for a job: {len(sizes)} files, {format_bytes(sum(size for size, _ in sizes))}, and "
        f"Ray takes {format_bytes(limit_bytes)} compressed. The largest: {largest}. Put data and weights where every node sees "
        f"them, or name what the job does not need in .rayignore (patterns as in .gitignore)."
    )
