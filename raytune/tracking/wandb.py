"""Weights & Biases. Online, its own process sends what it is told; offline, it writes files that are sent later."""

import os
import shutil
from collections.abc import Mapping, Sequence
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from raytune.config.sections.tracking import WandbSection
from raytune.run_folder import RunFolder
from raytune.storage import is_local, local_path
from raytune.tracking.tracker import Happening, Row, Started, Status, TrackedRun

START_TIMEOUT_S = 20.0
_EXIT_CODES = {"finished": 0, "stopped": 0, "failed": 1, "interrupted": 255}


def environment(section: WandbSection, storage: str) -> dict[str, str]:
    """Of the process that talks to it."""
    return {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}


def problem(section: WandbSection, storage: str) -> str | None:
    """What is not right with the options, and what to do."""
    if section.folder is None and not is_local(storage):
        return f"storage is {storage}, where wandb writes no files. Set tracking.wandb.folder to a local folder."
    if section.mode == "online" and not _has_key():
        return "there is no API key for W&B. Set WANDB_API_KEY, or `wandb login`, or tracking.wandb.mode=offline."
    return None


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        return netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, NetrcParseError):
        return False


class Wandb:
    """See `Tracker`. A line has its step as a value, `step`, along which everything is drawn: W&B's own steps only rise, and
    training may go back. Files are written anew by each command, and where training went back, as long as none was sent; what was
    sent stays, so that there both values of a step are shown."""

    def __init__(self, section: WandbSection, folder: RunFolder, storage: str) -> None:
        self._section = section
        self._folder = local_path(section.folder or folder.path).absolute()
        self.place = f"{section.mode} {section.entity or ''}/{section.project}"
        self._told: TrackedRun | None = None
        self._run: Any = None

    def start(self, run: TrackedRun, run_id: str | None) -> Started:
        import wandb

        self._finish(0)
        keeps = run_id is not None and not self._discard(run_id)
        run_id = run_id or run.key
        self._told = run
        self._folder.mkdir(parents=True, exist_ok=True)
        is_online = self._section.mode == "online"
        self._run = wandb.init(
            project=self._section.project,
            entity=self._section.entity,
            mode=self._section.mode,
            dir=str(self._folder),
            id=run_id,
            name=run.name,
            group=run.group,
            tags=[f"{name}={value}"[:64] for name, value in run.tags.items()],
            config=dict(run.settings),
            resume="allow" if is_online else None,
            reinit="create_new",  # beside those of other trials
            settings=wandb.Settings(
                console="off",
                disable_code=True,
                disable_git=True,
                disable_job_creation=True,
                init_timeout=START_TIMEOUT_S,
                x_disable_stats=True,
                x_disable_meta=True,
            ),
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        return Started(run_id=run_id, keeps=keeps)

    def metrics(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._run.log({"step": row.step, **row.values})

    def happened(self, happenings: Sequence[Happening], num_known: int) -> None:
        for one in happenings[num_known:]:
            self._run.log({"step": one.step, "event": one.text})

    def forget(self, first_step: int) -> bool:
        if self._section.mode == "online":
            return True
        assert self._told is not None
        return self.start(self._told, self._run.id).keeps

    def result(self, numbers: Mapping[str, float], step: int, time: float) -> None:
        self._run.summary.update(dict(numbers))

    def files(self, files: Sequence[Path], model: Path | None) -> None:
        import wandb

        kinds = {"run": files, "model": [model] if model else []}
        for kind, paths in kinds.items():
            if paths:
                artifact = wandb.Artifact(f"{kind}-{self._run.id}", type=kind)
                for path in paths:
                    (artifact.add_dir if path.is_dir() else artifact.add_file)(str(path), policy="immutable")
                self._run.log_artifact(artifact)

    def end(self, status: Status | None) -> None:
        self._finish(_EXIT_CODES[status] if status else 0)

    def _finish(self, exit_code: int) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.finish(exit_code=exit_code)

    def _discard(self, run_id: str) -> bool:
        """Remove what was written of a run and not sent yet. Whether nothing was sent."""
        parts = list((self._folder / "wandb").glob(f"offline-run-*-{run_id}"))
        if self._section.mode == "online" or any(list(part.glob("*.synced")) for part in parts):
            return False
        for part in parts:
            shutil.rmtree(part)
        return True
