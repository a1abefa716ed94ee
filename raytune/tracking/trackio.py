"""Trackio: an SQLite database, by its own storage. A run is written anew by each command, and is whole."""

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from raytune.config.sections.tracking import TrackioSection
from raytune.run_folder import RunFolder
from raytune.storage import is_local, local_path
from raytune.tracking.tracker import Happening, Row, Started, Status, TrackedRun

SUBFOLDER = "trackio"


def environment(section: TrackioSection, storage: str) -> dict[str, str]:
    """Of the process that writes it."""
    return {"TRACKIO_DIR": _database(section, storage)}


def problem(section: TrackioSection, storage: str) -> str | None:
    """What is not right with the options, and what to do."""
    if section.folder is None and not is_local(storage):
        return f"storage is {storage}, where no database can be. Set tracking.trackio.folder to a local folder."
    return None


def _database(section: TrackioSection, storage: str) -> str:
    return str(local_path(section.folder or f"{storage}/{SUBFOLDER}").absolute())


class Trackio:
    """See `Tracker`. Its storage is used rather than its `init`, which writes in a thread, with the time of writing, and goes on
    where that fails."""

    def __init__(self, section: TrackioSection, folder: RunFolder, storage: str) -> None:
        self._project = section.project
        self.place = f"{_database(section, storage)} {section.project}"
        self._run: TrackedRun | None = None
        self._run_id = self._created = ""

    @property
    def _storage(self) -> Any:
        from trackio.sqlite_storage import SQLiteStorage

        return SQLiteStorage

    def start(self, run: TrackedRun, run_id: str | None) -> Started:
        if run_id is not None:
            self._storage.delete_run(self._project, run.name, run_id=run_id)
        self._run, self._run_id, self._created = run, run_id or run.key, _iso(time.time())
        return Started(run_id=self._run_id, keeps=False)

    def metrics(self, rows: Sequence[Row]) -> None:
        assert self._run is not None
        own = {"_Group": self._run.group, "_Username": None, "_Created": self._created}
        self._storage.bulk_log(
            self._project,
            self._run.name,
            [dict(row.values) for row in rows],
            steps=[row.step for row in rows],
            timestamps=[_iso(row.time) for row in rows],
            config={**self._run.settings, **self._run.tags, **own},
            run_id=self._run_id,
        )

    def happened(self, happenings: Sequence[Happening], num_known: int) -> None:
        assert self._run is not None
        new = happenings[num_known:]
        self._storage.bulk_alert(
            self._project,
            self._run.name,
            titles=[one.text for one in new],
            texts=[None] * len(new),
            levels=["info"] * len(new),
            steps=[one.step for one in new],
            timestamps=[_iso(one.time) for one in new],
            run_id=self._run_id,
        )

    def forget(self, first_step: int) -> bool:
        assert self._run is not None
        return self.start(self._run, self._run_id).keeps

    def result(self, numbers: Mapping[str, float], step: int, time: float) -> None:
        self.metrics([Row(step=step, time=time, values=numbers)])

    def files(self, files: Sequence[Path], model: Path | None) -> None:
        """It keeps artefacts of its own runs only."""

    def end(self, status: Status | None) -> None:
        """There is nothing to close."""


def _iso(when: float) -> str:
    return datetime.fromtimestamp(when, UTC).isoformat()
