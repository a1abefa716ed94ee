"""What a job is started from, kept until its run has come to an end, so that the same can be started again."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """Everything that a job is started from. Its files are kept until `close`, so that the same can be started again."""

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
