"""The winner of a sweep, trained again: its config, and how the new run compares with the trial."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from raytune.config.load import load_config
from raytune.config.run import RunConfig
from raytune.errors import UserError
from raytune.launch.result import RunResult
from raytune.run_folder import SweepFolder
from raytune.storage import absolute, download_file, exists, read_json
from raytune.sweeps.results import SweepResult


@dataclass(frozen=True, slots=True, kw_only=True)
class AgainstTrial:
    """A retrained winner beside its trial."""

    trial: str
    metric: str
    trial_value: float
    value: float

    @property
    def sentence(self) -> str:
        difference = self.value - self.trial_value
        return f"{self.metric} {self.value:.6g} against {self.trial_value:.6g} of {self.trial}: {difference:+.2g}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def winner_config(folder: str, overlays: Sequence[str] = (), overrides: Sequence[str] = ()) -> RunConfig:
    """The config that trains the winner of a finished sweep again, with files and overrides laid over it.

    Raises:
        UserError: if the folder holds no finished sweep, or no trial won.
        ConfigError: as `load_config` does.
    """
    sweep = sweep_folder(folder)
    result = read_sweep(folder)
    if result.best is None:
        raise UserError(f"No trial of the sweep in {sweep.path} has a usable value of {result.metric}: there is no winner.")
    with TemporaryDirectory() as scratch:
        best = Path(scratch) / "best.yaml"
        download_file(sweep.best, best)
        return load_config([best, *overlays], overrides)


def against_trial(folder: str, run: RunResult) -> AgainstTrial:
    """How a retrained winner compares with its trial, by the metric of the sweep."""
    result = read_sweep(folder)
    best = result.best
    assert best is not None, "it was just trained"
    assert best.value is not None
    return AgainstTrial(trial=best.trial.name, metric=result.metric, trial_value=best.value, value=run.metrics[result.metric])


def read_sweep(folder: str) -> SweepResult:
    """The result of a finished sweep.

    Raises:
        UserError: if the folder holds none.
    """
    sweep = sweep_folder(folder)
    if not exists(sweep.result):
        raise UserError(
            f"{sweep.path} holds no finished sweep (no result.json). Give the folder that `raytune sweep` has named, or run that "
            f"command again to finish it."
        )
    return SweepResult.from_json(read_json(sweep.result))


def sweep_folder(folder: str) -> SweepFolder:
    storage, _, name = absolute(folder).rpartition("/")
    return SweepFolder(storage, name)
