"""What a tracker is told, and what each of them fulfils."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

Status = Literal["finished", "failed", "interrupted", "stopped"]
"""How a run ended; a sweep has stopped a trial."""
Setting = str | int | float | bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRun:
    """Which run it is."""

    name: str
    """As it is shown."""
    key: str
    """Of this run alone: of its folder, and when it was begun there."""
    place: str
    """Below a tracker's folder: that of its run folder below `storage`."""
    group: str | None
    sweep: str | None
    """Folder of the sweep that it is a trial of."""
    tags: Mapping[str, str]
    settings: Mapping[str, Setting]
    """Of its config and its plan, by dotted name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What is new of a step."""

    step: int
    time: float
    """Seconds since 1970."""
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Happening:
    """What happened to the run."""

    step: int
    """Or the last one before it."""
    time: float
    """Seconds since 1970."""
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A run of a tracker that is open."""

    run_id: str
    keeps: bool
    """Whether it has what it was told by earlier commands; else it is told everything again."""


class Tracker(Protocol):
    """Tells one run to one library. What it raises means that the tracker is away: it is started again later, and told again what
    it had not taken by then."""

    place: str
    """Where its runs are. What was told elsewhere counts for nothing."""

    def start(self, run: TrackedRun, run_id: str | None) -> Started:
        """Open the run of this id, or a new one. May be called again."""
        ...

    def metrics(self, rows: Sequence[Row]) -> None: ...

    def happened(self, happenings: Sequence[Happening], num_known: int) -> None:
        """All that happened, of which it has been told the first ones."""
        ...

    def forget(self, first_step: int) -> bool:
        """What it was told of this step and later ones stands no more: training went back, and repeats them.

        Returns:
            Whether it has the rest still; else it is told everything again.
        """
        ...

    def result(self, numbers: Mapping[str, float], step: int, time: float) -> None:
        """What the run came to. May be told again."""
        ...

    def files(self, files: Sequence[Path], model: Path | None) -> None:
        """Files of the run folder, and the folder of the model. May be given again."""
        ...

    def end(self, status: Status | None) -> None:
        """Close the run, when all that was told has arrived. None: another command goes on with it."""
        ...
