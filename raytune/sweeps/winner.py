"""The winner of a sweep, trained again: its config, and how the new run compares with the trial."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from raytune import __version__
from raytune.config.load import dump_written, load_config
from raytune.config.sections.model import ModelSection
from raytune.config.sections.run import RunConfig
from raytune.errors import ClusterError, ModelError, TrainingError, UserError
from raytune.launch.data.reading import show_reading
from raytune.launch.state.record import read_plan, readable
from raytune.launch.state.result import RunResult
from raytune.model.files.base_content import base_content, changes_text, content_changes, way_back
from raytune.model.files.files import resolve_model_path
from raytune.printable import plain_text
from raytune.run_folder import RunFolder, SweepFolder
from raytune.storage import absolute, download_file, exists, read_json
from raytune.sweeps.ledger import read_ledger
from raytune.sweeps.results import SweepResult
from raytune.sweeps.words import value_text


@dataclass(frozen=True, slots=True, kw_only=True)
class AgainstTrial:
    """A retrained winner beside its trial, after the last step at which both were measured."""

    trial: str
    metric: str
    step: int
    trial_value: float
    value: float

    @property
    def sentence(self) -> str:
        difference = self.value - self.trial_value
        values = f"{self.metric} {self.value:.6g} against {self.trial_value:.6g} of {self.trial}"
        return f"{values} after step {self.step}: {difference:+.2g}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def best_yaml(config: RunConfig, result: SweepResult) -> str:
    """The winner's run as a file: every key that was drawn or derived for it, whatever its default, laid over what the sweep's
    own file and the one under it say.

    Args:
        config: of the winner, as `Planner.winner` makes it.
    """
    best = result.best
    assert best is not None, "a sweep without a winner has none to write down"
    drawn = best.trial.values
    unset = [key for key in result.keys if key not in drawn]
    lines = [
        f"The winner of the sweep {result.name}: {best.trial.name}, {result.metric} {value_text(best.value)}, trained for "
        f"{best.step} of {best.num_steps} steps.",
        f"Its place in the space: {', '.join(f'{key} = {value_text(value)}' for key, value in drawn.items())}"
        + (f"; without {', '.join(unset)}, whose condition does not hold there" if unset else "")
        + ".",
        f"The other keys are those of the run that they were laid over; what is not here is a default of raytune {__version__}.",
    ]
    return "".join(f"# {' '.join(plain_text(line).split())}\n" for line in lines) + dump_written(config)


def winner_config(folder: str, overlays: Sequence[str] = (), overrides: Sequence[str] = ()) -> RunConfig:
    """The config that trains the winner of a finished sweep again, with files and overrides laid over it.

    Raises:
        UserError: if the folder holds no finished sweep, no trial won, or the base that the sweep's config names has changed.
        ConfigError: as `load_config` does.
    """
    sweep = sweep_folder(folder)
    result = read_sweep(folder)
    if result.best is None:
        raise UserError(f"No trial of the sweep in {sweep.path} has a usable value of {result.metric}: there is no winner.")
    with TemporaryDirectory() as scratch:
        best = Path(scratch) / "best.yaml"
        download_file(sweep.best, best)
        config = load_config([best, *overlays], overrides)
        if config.model == load_config([best], []).model:
            _refuse_other_base(config.model, sweep, result.best.trial.name)
        return config


def _refuse_other_base(model: ModelSection, sweep: SweepFolder, trial: str) -> None:
    """Refuse to train the winner again on other weights, if the trial's plan still says which they were."""
    run = sweep.trial(trial)
    was = read_plan(run).model.content if exists(run.plan) else None
    if was is None:
        return
    path = resolve_model_path(model.base, model.revision)
    now = base_content(path, model.revision, trust_remote_code=model.trust_remote_code, watch=partial(show_reading, path))
    if changes := content_changes(was, now):
        raise ModelError(
            f"{trial} of the sweep in {sweep.path} was trained on other weights than model.base {model.base} holds now:\n"
            f"{changes_text(changes)}\n"
            f"So its settings may not be the best ones any more. {way_back(was)}, or search again. To train with its settings "
            f"all the same: raytune train {sweep.best}"
        )


def against_trial(folder: str, run: RunResult) -> AgainstTrial | None:
    """How a retrained winner compares with its trial, by the metric of the sweep; None where no step was measured in both."""
    result = read_sweep(folder)
    assert result.best is not None, "it was just trained"
    of_trial, of_run = dict(result.best.curve), dict(run.history.series(result.metric))
    step = max(of_trial.keys() & of_run.keys(), default=None)
    if step is None:
        return None
    return AgainstTrial(
        trial=result.best.trial.name, metric=result.metric, step=step, trial_value=of_trial[step], value=of_run[step]
    )


def require_winner(result: SweepResult) -> None:
    """Say that a sweep has come to nothing, if it has.

    Raises:
        ClusterError: if no trial has a usable value, and one failed for a reason that may pass.
        TrainingError: if no trial has one.
    """
    if result.best is not None:
        return
    sweep = sweep_folder(result.folder)
    causes = sorted({trial.cause for trial in result.trials if trial.cause})
    message = "\n".join(
        [
            f"No trial of sweep {result.name!r} has a usable value of {result.metric}: there is no winner.",
            *(f"  {cause}" for cause in causes[:3]),
            *([f"  and {len(causes) - 3} other causes"] if len(causes) > 3 else []),
            f"The report in {sweep.path} has every trial.",
        ]
    )
    if read_ledger(sweep.ledger).unended:
        raise ClusterError(f"{message} The same command tries those again whose failure may pass.")
    raise TrainingError(f"{message} Change the space or the run, and give the sweep another name (name=...).")


def read_sweep(folder: str) -> SweepResult:
    """The result of a finished sweep.

    Raises:
        UserError: if the folder holds none, or another raytune wrote it.
    """
    sweep = sweep_folder(folder)
    if not exists(sweep.result):
        raise UserError(
            f"{sweep.path} holds no finished sweep (no result.json). Give the folder that `raytune sweep` has named, or run that "
            f"command again to finish it."
        )
    with readable(sweep.result, RunFolder(sweep.storage, sweep.name)):
        return SweepResult.from_json(read_json(sweep.result))


def sweep_folder(folder: str) -> SweepFolder:
    storage, _, name = absolute(folder).rpartition("/")
    return SweepFolder(storage, name)
