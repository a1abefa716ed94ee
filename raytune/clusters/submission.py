"""What a job is started from: checked here before anything is sent, and kept until its run has come to an end, so that the same
can be started again."""

import secrets
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import raytune
from raytune.clusters.package import pack
from raytune.clusters.working_dir import contents, named_by, path_in_job, rows_named_by
from raytune.config.load import as_one_run
from raytune.config.sections.run import RunConfig
from raytune.errors import UserError
from raytune.launch.cluster.warm import refuse_another_python
from raytune.storage import is_local


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """Everything that a job is started from. Its files are kept until `close`; as a context it closes itself."""

    id: str
    entrypoint: str
    metadata: dict[str, str]
    runtime_env: dict[str, Any]
    notes: tuple[str, ...]
    """What to say of its files: what was left out and why, and which are large."""
    folder: tempfile.TemporaryDirectory[str]

    @property
    def package(self) -> Path:
        return Path(self.folder.name) / "working_dir.zip"

    def close(self) -> None:
        self.folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def prepare_submission(
    config: RunConfig,
    verb: str,
    files: Sequence[str],
    overrides: Sequence[str],
    *,
    working_dir: Path,
    name: str | None,
    runtime_env: Mapping[str, Any] | None = None,
) -> Submission:
    """Pack what a job takes along, and say how it is started.

    Args:
        config: what files and overrides come to.
        files, overrides: as `raytune train` takes them.
        working_dir: what the job takes along.
        name: of the job; by default the run's, and something random.
        runtime_env: as for `Jobs.submit`.

    Returns:
        What the job is started from, to be closed; its notes are to be said.

    Raises:
        UserError: if the config or the folder does not allow it.
    """
    if verb == "train":
        as_one_run(config)
    if is_local(config.storage) and not config.storage.startswith(("/", "~", "file:///")):
        raise UserError(
            f"storage is {config.storage!r}, relative to a working directory that ends with the job. Name a folder that every "
            f"node sees, or a bucket: storage=/shared/runs, storage=s3://bucket/runs."
        )
    refuse_another_python(config.cluster, runtime_env or {})
    inside = [path_in_job(working_dir, file) for file in files]
    packed = contents(working_dir, named_by(config), rows_named_by(config))
    missing = [file for file in inside if file not in packed.files]
    if missing:
        raise UserError(
            f"{', '.join(missing)} would not be sent with the job: it is ignored by .gitignore or .rayignore, or looks like a "
            f"secret or a run. Rename or move it."
        )
    submission = Submission(
        id=name or f"{config.name}-{secrets.token_hex(3)}",
        entrypoint=shlex.join([*packed.command, verb, *inside, *overrides]),
        metadata={"raytune": raytune.__version__, "run": config.name, "storage": config.storage, "verb": verb},
        runtime_env=dict(runtime_env or {}),
        notes=tuple(packed.notes),
        folder=tempfile.TemporaryDirectory(prefix="raytune-"),
    )
    try:
        pack(packed, submission.package)
    except BaseException:
        submission.close()
        raise
    return submission
