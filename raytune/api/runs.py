"""Verbs of runs and sweeps as functions: from what is wrong with a config to the trained model and its page."""

from collections.abc import Mapping, Sequence
from os import fspath
from typing import TYPE_CHECKING, Any, overload

from raytune.api.asked import Config, File, files_of, resolved_config
from raytune.config.checks.asked import NAMED, require_named
from raytune.config.load import as_one_run, config_from, dump_yaml
from raytune.config.words.places import errors_at
from raytune.errors import UserError
from raytune.launch.planning import plan_run
from raytune.launch.run import run
from raytune.launch.state.callbacks import Callback, check_callback
from raytune.launch.state.callbacks import RunEvent as RunEvent
from raytune.launch.state.progress import show_progress
from raytune.launch.state.result import RunResult

if TYPE_CHECKING:
    from raytune.launch.asking.score import Scores
    from raytune.launch.check import Findings
    from raytune.launch.folds import FoldsResult
    from raytune.launch.rates.found_rate import FoundRate
    from raytune.plan.advise import Advised
    from raytune.plan.rates.rate_range import Shape
    from raytune.plan.run_plan import RunPlan
    from raytune.report.comparison import RunComparison
    from raytune.sweeps.results import SweepResult


def check(config: Config, **overrides: Any) -> "Findings":
    """Find what is wrong with a run or a sweep as `raytune check` does, without its cluster. Starts nothing, leaves nothing.

    Args:
        config, overrides: as for `train`; a sweep is looked at by its first trial, and by the names and values of all.

    Returns:
        What was looked at and what could not be (`looked_at`, `not_looked_at`), and what becomes of the first rows (`losses`).

    Raises:
        raytune.errors.UserError: with every problem and what to do about it.
    """
    from raytune.sweeps.check import check_config

    return check_config(*resolved_config(config, overrides))


def make_plan(config: Config, *, tokens: int | None = None, **overrides: Any) -> "RunPlan":
    """Resolve everything as `raytune plan` does: batch, steps, memory per worker, time and money. Trains nothing.

    Args:
        config, overrides: as for `train`. With `cluster={"instance": ...}` neither the cluster nor the model's weights are
            needed, and the amount of data is taken from `tokens` or the sizes of the files. Without, the cluster (or this
            machine) is looked at and the data is tokenised.
        tokens: of an epoch.

    Returns:
        The plan; `raytune.plan.describe.plan_text` puts it into words.

    Raises:
        raytune.errors.UserError: with what does not fit and what would.
    """
    from raytune.plan.ahead import plan_ahead
    from raytune.plan.model.references import describe_base

    resolved, places = resolved_config(config, overrides)
    with errors_at(resolved, places):
        one = as_one_run(resolved)
        require_named(one, NAMED if tokens is None else NAMED[:1], places)
        if one.cluster.instance is None:
            if tokens is not None:
                raise UserError("`tokens` is for a plan without cluster and data: set cluster.instance too, or leave it out.")
            return plan_run(one)
        describe_base(one.model)
        return plan_ahead(one, tokens)


@overload
def train(
    config: Config, *, folds: None = None, progress: bool = True, callbacks: Sequence[Callback] = (), **overrides: Any
) -> RunResult: ...
@overload
def train(
    config: Config, *, folds: int, progress: bool = True, callbacks: Sequence[Callback] = (), **overrides: Any
) -> "FoldsResult": ...
def train(
    config: Config, *, folds: int | None = None, progress: bool = True, callbacks: Sequence[Callback] = (), **overrides: Any
) -> "RunResult | FoldsResult":
    """Train as `raytune train` does: plan, start or join a Ray cluster, and leave weights in the run folder.

    Args:
        folds: train as many runs, each with another part of the rows held out for validation (`data.fold`).
        config: a YAML file, several that are laid over each other, a mapping with the same keys, or a `RunConfig`.
        progress: show the run on standard error while it goes on.
        callbacks: called with a `RunEvent` for what happens, from a thread of this process (`raytune explain user_code`); those
            that the config names are called too, before them.
        overrides: keys laid over it and validated like it: `name="short", training={"max_steps": 20}`, or with dotted keys
            `**{"training.max_steps": 20}`.

    Returns:
        The finished run: `metrics`, `model_path`, `folder`, `plan`, `data_report` (what became of the rows), `history`,
        `comparisons`, `words` (time, dollars, what is better and worse), `symptoms` (what looks wrong, and which key to change).
        A finished run of the same name and settings is returned without training it again. With `folds`, those of all folds
        (`folds`), and the mean, standard deviation and values of each metric (`metrics`).

    Raises:
        raytune.errors.UserError: before anything is started, with every problem and what to do about it.
        raytune.errors.RaytuneError: if training failed.
    """
    from raytune.launch.folds import train_folds
    from raytune.report.at_end import leave_page

    resolved, places = resolved_config(config, overrides | ({"data.fold": {"index": 0, "of": folds}} if folds else {}))
    with errors_at(resolved, places):
        require_named(as_one_run(resolved), places=places)
        for callback in callbacks:
            check_callback(callback, repr(callback))
        watch = {"watch": show_progress} if progress else {}
        if folds is not None:
            return train_folds(resolved, callbacks=callbacks, leave=leave_page, **watch)
        return run(resolved, callbacks=callbacks, leave=leave_page, **watch)


def sweep(config: Config, *, progress: bool = True, **overrides: Any) -> "SweepResult":
    """Search as `raytune sweep` does: train variants of a run, stop early losers, and leave a ranked table and a page.

    Args:
        config, progress, overrides: as for `train`; the config has a `sweep` section.

    Returns:
        The finished sweep: `trials` (best first), `best`, `folder` (with best.yaml, which `train` takes, and report.html). A
        finished sweep of the same name and settings is returned without training again.

    Raises:
        raytune.errors.UserError: before anything is started, with every problem and what to do about it.
        raytune.errors.RaytuneError: after the page was written, if no trial has a usable value.
    """
    from raytune.report.sweep_page import write_sweep_page
    from raytune.sweeps.live import show_sweep
    from raytune.sweeps.run import sweep
    from raytune.sweeps.winner import require_winner

    resolved, places = resolved_config(config, overrides)
    require_named(resolved, places=places)
    with errors_at(resolved, places):
        result = sweep(resolved, watch=show_sweep) if progress else sweep(resolved)
    write_sweep_page(result, dump_yaml(resolved), result.folder)
    require_winner(result)
    return result


def find_rate(
    config: Config,
    *,
    low: float | None = None,
    high: float | None = None,
    num_steps: int = 100,
    shape: "Shape" = "exponential",
    smoothing: float = 0.9,
    stop_factor: float = 3.0,
    apply: bool = False,
    progress: bool = True,
    **overrides: Any,
) -> "FoundRate":
    """Find a learning rate as `raytune find-rate` does: a range of rates on a copy of a run, and what the losses say.

    Args:
        config, progress, overrides: as for `train`.
        low, high: of the range; by default around the usual rate of the method.
        num_steps: from one to the other, along equal factors or, with `shape="linear"`, equal differences.
        smoothing: of the losses: share of the average so far in the next one.
        stop_factor: the test ends where the smoothed loss is more than so many times its lowest value.
        apply: write the suggestion into the file that `config` names.

    Returns:
        `suggestion` (None where the curve names none), `advice` (words, steepest, safe), `cautions`, `rates`, `losses`, and
        `folder`, which has the curve, its page (`report.html`) and its picture.

    Raises:
        raytune.errors.UserError: before anything is started, with every problem and what to do about it.
        raytune.errors.RaytuneError: if the workers failed.
    """
    from raytune.config.reading.rate_in_file import file_for_rate, write_rate
    from raytune.launch.rates.find_rate import find_rate
    from raytune.plan.rates.rate_range import RangeOptions
    from raytune.report.rate_page import write_rate_page

    resolved, places = resolved_config(config, overrides)
    target = file_for_rate(files_of(config), places, resolved) if apply else None
    options = RangeOptions(low=low, high=high, num_steps=num_steps, shape=shape, smoothing=smoothing, stop_factor=stop_factor)
    with errors_at(resolved, places):
        require_named(as_one_run(resolved), places=places)
        found = (
            find_rate(resolved, options, lambda plan, heading: show_progress(plan, heading=heading, at_end="reading the curve"))
            if progress
            else find_rate(resolved, options)
        )
    write_rate_page(found)
    if target is not None and found.suggestion is not None:
        write_rate(target, found.suggestion)
    return found


def score(
    run: File,
    rows: File | Sequence[File],
    *,
    output: File | None = None,
    row_format: str = "auto",
    columns: Mapping[str, str] | None = None,
    max_rows: int | None = None,
    address: str | None = None,
) -> "Scores":
    """Score rows as `raytune score` does: the loss and the perplexity of each of them under the weights of a run.

    Args:
        run: a run folder. A finished run is scored by its final model, another one by its best checkpoint.
        rows: files, globs, folders or data sets, as in `data.train`.
        output: file for the table, .jsonl or .csv; by default `scores/NAME.jsonl` in the run folder.
        row_format, columns, max_rows: as in `data.train`.
        address: of a Ray cluster, as `cluster.address`, instead of the run's; "here": one inside this machine.

    Returns:
        The `rows` with file, number, targets, loss and perplexity, their mean `loss`, and what became of rows without a score
        (`num_lost`, `report`).

    Raises:
        raytune.errors.UserError: before anything is started, if the run has no weights or no row can be scored.
        raytune.errors.RaytuneError: if the workers failed.
    """
    from raytune.launch.asking.score import run_to_score, score
    from raytune.launch.data.rows_to_score import sources_of

    sources = sources_of(files_of(rows), row_format, max_rows, columns)
    return score(run_to_score(fspath(run), address), sources, output=None if output is None else fspath(output))


def track(run: File, **tracking: Any) -> list[str]:
    """Tell trackers of a run or a sweep as `raytune track` does what they do not know: what they missed, or all of it.

    Args:
        run: its folder.
        tracking: keys of `tracking` in place of what its config says, such as `mlflow={"uri": ...}`.

    Returns:
        What was told whom, in sentences.

    Raises:
        raytune.errors.UserError: if there is no such run, or none of its trackers can be told anything.
        raytune.errors.RaytuneError: if a command is at work on it, or a tracker does not take it.
    """
    from raytune.launch.track import track

    return track(fspath(run), config_from({"tracking": tracking}, []).tracking if tracking else None)


def write_report(run: File) -> str:
    """Write the page of a run as `raytune report` does, finished or not; of a finished one also the card of its model.

    Args:
        run: a run folder.

    Returns:
        The path of the page.

    Raises:
        raytune.errors.UserError: if there is no run.
    """
    from raytune.report.at_end import leave_card
    from raytune.report.run_page import write_run_page
    from raytune.report.run_seen import RunSeen

    page = write_run_page(fspath(run))
    leave_card(RunSeen.read(fspath(run)).folder)
    return page


def compare(runs: Sequence[File], *, output: File | None = None) -> "RunComparison":
    """Put runs side by side as `raytune compare` does.

    Args:
        runs: run folders, finished or not.
        output: a file for a page.

    Returns:
        `differences` of what was asked, `outcomes`, and `text`, the table.

    Raises:
        raytune.errors.UserError: if there are fewer than two runs.
    """
    from raytune.report.compare_page import write_compare_page
    from raytune.report.comparison import RunComparison

    compared = RunComparison.read([fspath(run) for run in runs])
    if output is not None:
        write_compare_page(compared, fspath(output))
    return compared


def advise(config: Config, *, tokens: int | None = None, **overrides: Any) -> "Advised":
    """Which method? Every method's plan, as `raytune advise` makes it. Reads no row and starts nothing.

    Args:
        config, overrides: as for `train`: at least `model={"base": ...}`, with `data={"train": ...}` or `tokens`, and
            `cluster={"instance": ...}` for machines other than this one.
        tokens: of an epoch; None: by the sizes of the files.

    Returns:
        `methods`, each with its `plan` and what it is good for (`when`), or the `refusal`; and the `assumption` about the data.

    Raises:
        raytune.errors.UserError: if the model or the amount of data is not known.
    """
    from raytune.launch.cluster.host import this_machine
    from raytune.plan.advise import advise
    from raytune.plan.model.references import describe_base

    resolved, places = resolved_config(config, overrides)
    with errors_at(resolved, places):
        require_named(as_one_run(resolved), NAMED if tokens is None else NAMED[:1], places)
        describe_base(resolved.model)
        return advise(resolved, this_machine(resolved.cluster), tokens)
