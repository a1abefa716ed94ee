"""What a job's processes find beside their files: environment variables and packages, from the command line or a file.

Whoever reaches the dashboard reads all of it, so nothing secret may be in it.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raytune.config.problems import ConfigError, Place
from raytune.config.yaml_nodes import read_nodes
from raytune.credentials import find_secret_value, is_secret_name
from raytune.errors import UserError

TAKEN = ("env_vars", "pip", "uv", "conda", "image_uri", "config")
"""Keys of Ray's runtime environments that a job may be given."""
OURS = ("working_dir", "py_modules", "excludes")
"""Those that raytune fills itself, with what --working-dir names."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def runtime_environment(pairs: Sequence[str], file: Path | None) -> dict[str, Any]:
    """Ray's runtime environment of a job, beside its working directory.

    Args:
        pairs: `KEY=VALUE`, which win over the file's.
        file: YAML or JSON with keys of TAKEN.

    Raises:
        UserError: if something is not of that form, or looks like a secret.
    """
    given = _read(file) if file else {}
    variables = {**given.get("env_vars", {}), **dict(_pair(text) for text in pairs)}
    if not isinstance(variables, dict) or not all(isinstance(value, str) for value in variables.values()):
        raise UserError(f"{file}: env_vars must map names to texts; write numbers in quotes.")
    for name, value in variables.items():
        _refuse_secret(name, value)
    return {**given, **({"env_vars": variables} if variables else {})}


def _pair(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not _NAME.fullmatch(name):
        raise UserError(f"--env takes KEY=VALUE, such as --env NCCL_DEBUG=INFO, not {_shown(text)!r}.")
    return name, value


def _shown(text: str) -> str:
    """What may be printed of it: it may be a secret that was given the wrong way."""
    return text if len(text) < 12 else f"{text[:4]}..."


def _refuse_secret(name: str, value: str) -> None:
    if not _NAME.fullmatch(name):
        raise UserError(f"{name!r} is no name of an environment variable.")
    names_a_file = value.startswith("~/") or (value.startswith("/") and value.count("/") > 1)
    if not find_secret_value(name, value) and not (is_secret_name(name) and not names_a_file):
        return
    raise UserError(
        f"{name} looks like a secret. Everybody who reaches the dashboard can read a job's environment, so nothing was sent. Log "
        f"in on the nodes instead (`hf auth login`, a cloud role), or mount a file there and name it: HF_TOKEN_PATH=/run/token."
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The runtime environment {file} cannot be read: {error}.") from error
    node, problems = read_nodes(text, Place(str(file), 1, 1))
    if problems:
        raise ConfigError(problems)
    given = node.plain if node else {}
    if not isinstance(given, dict):
        raise UserError(f"The runtime environment {file} must map keys to values: {', '.join(TAKEN)}.")
    ours = [key for key in OURS if key in given]
    if ours:
        raise UserError(f"{file}: {', '.join(ours)}: raytune sends the files of --working-dir itself; drop it.")
    unknown = [str(key) for key in given if key not in TAKEN]
    if unknown:
        raise UserError(f"{file}: {', '.join(unknown)}: not of the runtime environment of a job, which has {', '.join(TAKEN)}.")
    for where, value in _texts(given):
        if find_secret_value(where.rpartition(".")[2], value):
            raise UserError(
                f"{file}: {where} holds what looks like a secret. Everybody who reaches the dashboard can read it, so nothing "
                f"was sent. Use a mounted file or the nodes' own login."
            )
    _refuse_what_ray_would(given, file)
    return given


def _texts(value: Any, where: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        return [text for key, one in value.items() for text in _texts(one, f"{where}.{key}".lstrip("."))]
    if isinstance(value, list):
        return [text for one in value for text in _texts(one, where)]
    return [(where, value)] if isinstance(value, str) else []


def _refuse_what_ray_would(given: Mapping[str, Any], file: Path) -> None:
    from ray.runtime_env import RuntimeEnv

    try:
        RuntimeEnv(**given)
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"{file} is no runtime environment of Ray: {' '.join(str(error).split())}") from error
