"""What a job is started from, kept until its run has come to an end, so that the same can be started again."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune.units import MIB, format_bytes

LARGE_FILE, LARGE_JOB = 10 * MIB, 50 * MIB
"""From these sizes on, of a file or of all that a job takes along, a word is said. Code and configs are far smaller."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """Everything that a job is started from. Its files are kept until `close`, so that the same can be started again."""

    id: str
    entrypoint: str
    metadata: dict[str, str]
    runtime_env: dict[str, Any]
    left_out: tuple[str, ...]
    """Files that were not sent because they look like secrets."""
    large: str | None
    """A sentence about files that make the job slow to start; None: there are none."""
    folder: tempfile.TemporaryDirectory[str]

    @property
    def package(self) -> Path:
        return Path(self.folder.name) / "working_dir.zip"

    def close(self) -> None:
        self.folder.cleanup()


def large_files(files: Mapping[str, Path]) -> str | None:
    """A sentence about files that a job had better not take along; None: there are none.

    Args:
        files: that it takes along, by their names there.
    """
    sizes = sorted(((path.stat().st_size, name) for name, path in files.items()), reverse=True)
    total = sum(size for size, _ in sizes)
    if not sizes or (sizes[0][0] < LARGE_FILE and total < LARGE_JOB):
        return None
    named = ", ".join(f"{name} ({format_bytes(size)})" for size, name in sizes[:3])
    return (
        f"the job takes {format_bytes(total)} along, which every node of it fetches and unpacks; the largest: {named}. What it "
        f"does not need can be named in .rayignore, data and weights belong where every node sees them."
    )
