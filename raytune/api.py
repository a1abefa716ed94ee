"""The verbs of the command line as functions, for scripts and notebooks."""

import json
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from raytune.config.asked import NAMED, require_named
from raytune.config.load import as_one_run, config_from, dump_yaml, load_with_places
from raytune.config.places import Places, errors_at
from raytune.config.run import RunConfig
from raytune.launch.callbacks import Callback, check_callback
from raytune.launch.callbacks import RunEvent as RunEvent
from raytune.launch.progress import show_progress
from raytune.launch.result import RunResult
from raytune.launch.run import run

if TYPE_CHECKING:
    from raytune.config.training import Precision
    from raytune.evaluation.side_by_side import Evaluation
    from raytune.launch.found_rate import FoundRate
    from raytune.launch.score import Scores
    from raytune.plan.advise import Advised
    from raytune.plan.rate_range import Shape
    from raytune.report.comparison import RunComparison
    from raytune.serving.endpoint import Endpoint
    from raytune.sweeps.results import SweepResult

File = str | PathLike[str]
Config = File | Sequence[File] | Mapping[str, Any] | RunConfig


def train(config: Config, *, progress: bool = True, callbacks: Sequence[Callback] = (), **overrides: Any) -> RunResult:
    """Train as `raytune train` does: plan, start or join a Ray cluster, and leave weights in the run folder.

    Args:
        config: a YAML file, several that are laid over each other, a mapping with the same keys, or a `RunConfig`.
        progress: show the run on standard error while it goes on.
        callbacks: called with a `RunEvent` for what happens, from a thread of this process (`raytune explain user_code`); those
            that the config names are called too, before them.
        overrides: keys laid over it and validated like it: `name="short", training={"max_steps": 20}`, or with dotted keys
            `**{"training.max_steps": 20}`.

    Returns:
        The finished run: `metrics`, `model_path`, `folder`, `plan`, `data_report` (what became of the rows), `history`,
        `comparisons`, `words` (time, dollars, what is better and worse), `symptoms` (what looks wrong, and which key to change).
        A finished run of the same name and settings is returned without training it again.

    Raises:
        raytune.errors.UserError: before anything is started, with every problem and what to do about it.
        raytune.errors.RaytuneError: if training failed.
    """
    from raytune.report.at_end import leave_page

    resolved, places = _resolved(config, overrides)
    with errors_at(resolved, places):
        require_named(as_one_run(resolved), places=places)
        for callback in callbacks:
            check_callback(callback, repr(callback))
        watch = {"watch": show_progress} if progress else {}
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

    resolved, places = _resolved(config, overrides)
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
    from raytune.config.rate_in_file import file_for_rate, write_rate
    from raytune.launch.find_rate import find_rate
    from raytune.plan.rate_range import RangeOptions
    from raytune.report.rate_page import write_rate_page

    resolved, places = _resolved(config, overrides)
    paths = [] if isinstance(config, RunConfig | Mapping) else [config] if isinstance(config, str | PathLike) else list(config)
    target = file_for_rate([fspath(path) for path in paths], places, resolved) if apply else None
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
    from raytune.launch.rows_to_score import sources_of
    from raytune.launch.score import run_to_score, score

    paths = [rows] if isinstance(rows, str | PathLike) else rows
    sources = sources_of([fspath(path) for path in paths], row_format, max_rows, columns)
    return score(run_to_score(fspath(run), address), sources, output=None if output is None else fspath(output))


def evaluate(
    model: File,
    *,
    suite: File | None = None,
    base: File | None = None,
    adapters: Mapping[str, File] | None = None,
    compare: File | None = None,
    output: File | None = None,
    template: str = "auto",
    dtype: "Precision | None" = None,
    workers: int | None = None,
    address: str | None = None,
    trust_remote_code: bool = False,
) -> "Evaluation":
    """Measure models on suites as `raytune evaluate` does: base against tuned, with intervals.

    Args:
        model: the folder of a finished run, or any folder that plain transformers or PEFT loads.
        suite: a YAML file with `suites`, as `evaluation.suites`; by default those of the run.
        base: that the model is compared with, or that an adapter is laid over.
        adapters: more of them over the same base, by name.
        compare: another model or run beside it on the same rows.
        output: folder for results and samples; by default `evaluations/NAME` in the run folder, or here without a run.
        template: chat template of a model whose tokenizer has none, as `data.template`.
        dtype: that a model is loaded in; by default that of its files.
        workers: that answer at once; by default as the run has, one per GPU, or one per node.
        address: of a Ray cluster, as `cluster.address`, instead of the run's; "here": one inside this machine.
        trust_remote_code: run the Python code that comes with a model in a folder.

    Returns:
        `values` of each model, `pairs` with gains and intervals, `models`, `num_rows`, and `output`, the folder.

    Raises:
        raytune.errors.UserError: before anything is started, if a model cannot be had or rows cannot be asked.
        raytune.errors.RaytuneError: if the workers failed; what was answered is kept, and the same call goes on.
    """
    from raytune.launch.evaluate import evaluate, prepare_evaluation
    from raytune.launch.models_to_ask import Named

    def text(path: File | None) -> str | None:
        return None if path is None else fspath(path)

    named = Named(
        model=fspath(model),
        base=text(base),
        adapters={name: fspath(path) for name, path in (adapters or {}).items()},
        compare=text(compare),
        template=template,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    prepared = prepare_evaluation(named, suite=text(suite), address=address, workers=workers)
    return evaluate(prepared, text(output))


def serve(
    model: File,
    *,
    adapters: Mapping[str, File] | None = None,
    base: File | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | None = None,
    replicas: int = 1,
    max_batch: int = 32,
    max_waiting: int = 256,
    timeout_s: float = 600.0,
    adapters_in: Sequence[File] = (),
    template: str = "auto",
    dtype: "Precision | None" = None,
    address: str | None = None,
    trust_remote_code: bool = False,
) -> "Endpoint":
    """Serve models as `raytune serve` does: an endpoint in OpenAI's form. Returns once it answers.

        with raytune.serve("runs/support-bot") as endpoint:
            client = openai.OpenAI(base_url=endpoint.url, api_key=endpoint.token)

    Args:
        model: the folder of a finished run, or any folder that plain transformers or PEFT loads.
        adapters: more over the same base, by name.
        base: that an adapter in `model` is laid over.
        host: where to listen.
        port: 0: any that is free.
        token: that whoever asks has to know. By default a new one, as long as only this machine is listened to.
        replicas: processes that hold the models.
        max_batch: answers that a replica writes at once.
        max_waiting: that wait in each replica; more are refused with 429.
        timeout_s: of one answer.
        adapters_in: folders that adapters may be loaded from at run time.
        template, dtype, address, trust_remote_code: as for `evaluate`.

    Returns:
        `url`, `token`, `models` (names) and `close()`; a context manager that closes.

    Raises:
        raytune.errors.UserError: before anything is started, if a model cannot be had, or strangers could use the endpoint.
        raytune.errors.RaytuneError: if the replicas did not become ready.
    """
    from raytune.launch.models_to_ask import Named
    from raytune.serving.endpoint import ServeOptions, prepare_serving, start_serving

    named = Named(
        model=fspath(model),
        base=None if base is None else fspath(base),
        adapters={name: fspath(path) for name, path in (adapters or {}).items()},
        template=template,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    options = ServeOptions(
        host=host,
        port=port,
        replicas=replicas,
        max_batch=max_batch,
        max_waiting=max_waiting,
        timeout_s=timeout_s,
        adapters_in=tuple(fspath(folder) for folder in adapters_in),
        address=address,
    )
    return start_serving(prepare_serving(named, options, token))


def write_report(run: File) -> str:
    """Write the page of a run as `raytune report` does, finished or not.

    Args:
        run: a run folder.

    Returns:
        The path of the page.

    Raises:
        raytune.errors.UserError: if there is no run.
    """
    from raytune.report.run_page import write_run_page

    return write_run_page(fspath(run))


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
    from raytune.launch.cluster import this_machine
    from raytune.plan.advise import advise
    from raytune.plan.references import describe_base

    resolved, places = _resolved(config, overrides)
    with errors_at(resolved, places):
        require_named(as_one_run(resolved), NAMED if tokens is None else NAMED[:1], places)
        describe_base(resolved.model)
        return advise(resolved, this_machine(resolved.cluster), tokens)


def _resolved(config: Config, overrides: Mapping[str, Any]) -> tuple[RunConfig, Places]:
    """The config, and where its keys were written, if that was in files."""
    texts = [f"{key}={json.dumps(value, default=fspath)}" for key, value in _leaves(overrides)]
    if isinstance(config, RunConfig | Mapping):
        return config_from(config, texts), {}
    paths = [config] if isinstance(config, str | PathLike) else config
    return load_with_places([str(path) for path in paths], texts)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
