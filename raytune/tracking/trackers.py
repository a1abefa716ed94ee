"""Which trackers there are, and whether those of a config can be told anything."""

import socket
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

from raytune.config.sections.tracking import TrackingSection
from raytune.errors import UserError
from raytune.missing import OPTIONAL, install_command
from raytune.run_folder import RunFolder
from raytune.tracking import mlflow, tensorboard, trackio, wandb
from raytune.tracking.tracker import Tracker

ANSWERS_WITHIN_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """What tells runs to one tracker."""

    words: str
    packages: tuple[str, ...]
    """That it imports."""
    make: Callable[[Any, RunFolder, str], Tracker]
    """Of its section, a run folder and `storage`, which is another one than that of a trial's folder; imports nothing yet."""
    problem: Callable[[Any, str], str | None]
    """Of its section and `storage`: what cannot work, and what to do."""
    environment: Callable[[Any, str], dict[str, str]]
    """Of its section and `storage`: what the process that tells it has beside the command's own."""


LIBRARIES: dict[str, Library] = {
    "tensorboard": Library(
        words="TensorBoard",
        packages=("tensorboard",),
        make=tensorboard.Tensorboard,
        problem=tensorboard.problem,
        environment=tensorboard.environment,
    ),
    "mlflow": Library(
        words="MLflow",
        packages=("mlflow", "sqlalchemy", "alembic"),
        make=mlflow.Mlflow,
        problem=mlflow.problem,
        environment=mlflow.environment,
    ),
    "wandb": Library(words="W&B", packages=("wandb",), make=wandb.Wandb, problem=wandb.problem, environment=wandb.environment),
    "trackio": Library(
        words="Trackio", packages=("trackio",), make=trackio.Trackio, problem=trackio.problem, environment=trackio.environment
    ),
}


def refuse_unready(section: TrackingSection, storage: str) -> None:
    """Refuse trackers whose library is not installed here, or whose options cannot work.

    Raises:
        UserError: naming the key.
    """
    for name, options in section.chosen.items():
        library, keys = LIBRARIES[name], (f"tracking.{name}",)
        for package in library.packages:
            if find_spec(package) is None:
                raise UserError(
                    f"{library.words} is to be told of the run, and the package {package} is not installed. Install it: "
                    f"{install_command(OPTIONAL[package])}",
                    keys=keys,
                )
        if words := library.problem(options, storage):
            raise UserError(f"{library.words} is to be told of the run, and {words}", keys=keys)


def away(section: TrackingSection) -> str | None:
    """Why the server of a tracker does not answer now; None if it does, or there is none. No run waits for it."""
    url = urlsplit(section.mlflow.uri if section.mlflow and section.mlflow.uri else "")
    if url.scheme not in ("http", "https") or not url.hostname:
        return None
    try:
        socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), ANSWERS_WITHIN_S).close()
    except (OSError, ValueError) as error:
        return f"MLflow at {url.hostname} ({error}; runs do not wait for it, and tell it later)"
    return None
