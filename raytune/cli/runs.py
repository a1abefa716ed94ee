"""Verbs of runs and sweeps, from the plan to the scores: plan, advise, train, sweep, score, track."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import click

from raytune.cli.group import as_json_option, debug_option, examples, files_and_overrides, load_run, run_arguments
from raytune.cli.say import say
from raytune.cli.supervise import begin_on
from raytune.errors import RaytuneError, UserError
from raytune.launch.cluster.address import named_address

if TYPE_CHECKING:
    from raytune.config.problems import Place
    from raytune.config.sections.run import RunConfig
    from raytune.plan.run_plan import RunPlan
    from raytune.sweeps.board import Board
    from raytune.sweeps.ledger import Known
    from raytune.sweeps.sweep_plan import SweepPlan


@click.command(
    epilog=examples(
        "plan run.yaml",
        "plan run.yaml cluster.instance=p5.48xlarge cluster.nodes=2 --tokens 50M",
        "plan model.base=Qwen/Qwen3-8B --tokens 50M --compare aws",
    )
)
@run_arguments
@click.option("--tokens", help="Training tokens of an epoch, such as 50M, instead of the data's; with cluster.instance.")
@click.option("--compare", metavar="NAMES", help="Rank instance types: all, a cloud (aws, gcp, azure), or names with commas.")
@as_json_option
@debug_option
def plan(arguments: tuple[str, ...], tokens: str | None, compare: str | None, as_json: bool) -> None:
    """Resolve everything and show it: batch, steps, memory per worker, time and money, and why. Trains nothing.

    With cluster.instance it needs neither the cluster nor the model's weights, and tokenises nothing: the amount of data is taken
    from --tokens or the sizes of the files. Without, it looks at the cluster (or this machine) and tokenises the data.
    """
    from raytune.config.load import as_one_run
    from raytune.plan.ahead import compare as compare_instances
    from raytune.plan.ahead import named_instances, plan_ahead
    from raytune.plan.describe import comparison_text, plan_text
    from raytune.plan.model.references import describe_base

    num_tokens = None if tokens is None else _count(tokens)
    config = as_one_run(_to_be_planned(*files_and_overrides(arguments), needs_rows=tokens is None))
    if compare is not None or config.cluster.instance:
        describe_base(config.model)
    if compare is not None:
        candidates = compare_instances(config, named_instances(compare), num_tokens)
        say(json.dumps([one.to_json() for one in candidates]) if as_json else comparison_text(candidates))
        return
    if config.cluster.instance:
        resolved = plan_ahead(config, num_tokens)
    elif tokens is not None:
        raise UserError("--tokens is for a plan without cluster and data. Set cluster.instance too, or leave it out.")
    else:
        from raytune.launch.planning import plan_run

        begin_on(named_address(config.cluster))
        resolved = plan_run(config)
    say(resolved.model_dump_json() if as_json else plan_text(resolved))


@click.command(
    epilog=examples(
        "advise --model Qwen/Qwen3-8B --data rows.jsonl --instance p5.48xlarge",
        "advise run.yaml --tokens 50M",
        "advise --model ./base --data rows.jsonl",
    )
)
@click.argument("arguments", nargs=-1, metavar="[FILE]... [KEY=VALUE]...")
@click.option("--model", metavar="BASE", help="A hub id or a folder: model.base.")
@click.option("--data", metavar="FILE", help="Training rows: data.train.")
@click.option("--instance", metavar="NAME", help="What is rented: cluster.instance. Else this machine.")
@click.option("--tokens", help="Training tokens of an epoch, such as 50M, instead of the data's.")
@as_json_option
@debug_option
def advise(
    arguments: tuple[str, ...], model: str | None, data: str | None, instance: str | None, tokens: str | None, as_json: bool
) -> None:
    """Which method? Every method's plan for a model and an amount of data: bytes, time, dollars, and what it is good for.

    No row is read and nothing is started: the amount of data is taken from --tokens or the sizes of the files.
    """
    from raytune.config.load import as_one_run
    from raytune.launch.cluster.host import this_machine
    from raytune.plan.advise import advise as advise_methods
    from raytune.plan.describe import advice_text
    from raytune.plan.model.references import describe_base

    said = {"model.base": model, "data.train": data, "cluster.instance": instance}
    files, overrides = files_and_overrides(arguments)
    overrides = [*overrides, *(f"{key}={value}" for key, value in said.items() if value is not None)]
    config = as_one_run(_to_be_planned(files, overrides, needs_rows=tokens is None))
    describe_base(config.model)
    advised = advise_methods(config, this_machine(config.cluster), None if tokens is None else _count(tokens))
    say(json.dumps(advised.to_json()) if as_json else advice_text(advised))


@click.command(
    epilog=examples(
        "train run.yaml",
        "train run.yaml name=shorter training.max_steps=200",
        "train run.yaml cluster.address=HEAD:6379 storage=/shared/runs",
        "train run.yaml --folds 5",
        "train --from-sweep runs/rank-and-rate",
    )
)
@click.argument("arguments", nargs=-1, metavar="FILE... [KEY=VALUE]...")
@click.option("--from-sweep", metavar="FOLDER", help="Train the winner of a finished sweep again, instead of a file.")
@click.option(
    "--folds",
    type=click.IntRange(2, 100),
    metavar="K",
    help="Cross-validation: K runs, each with another K-th of the rows held out, and their mean and spread.",
)
@as_json_option
@debug_option
def train(arguments: tuple[str, ...], from_sweep: str | None, folds: int | None, as_json: bool) -> None:
    """Train: plan the run, start or join a Ray cluster, and leave weights in the run folder. The same command continues a run."""
    from raytune.config.checks.asked import require_named
    from raytune.config.load import as_one_run
    from raytune.config.sections.split import overrides_of

    files, overrides = files_and_overrides(arguments)
    if folds is not None:
        if from_sweep is not None:
            raise click.UsageError("--folds and --from-sweep do not go together: name the winner's file, FOLDER/best.yaml.")
        overrides = [*overrides, *overrides_of(folds)]
    if from_sweep is None:
        if not files:
            raise click.UsageError("Name a config file, or a finished sweep with --from-sweep FOLDER.")
        config, places = _load_to_train(files, overrides)
        require_named(as_one_run(config), places=places)
    else:
        from raytune.sweeps.winner import winner_config

        config = winner_config(from_sweep, files, overrides)

    from raytune.launch.cluster.cluster_watch import watched_cluster
    from raytune.launch.folds import train_folds
    from raytune.launch.run import run
    from raytune.launch.state.progress import show_progress, show_result
    from raytune.report.at_end import leave_page

    told = begin_on(named_address(config.cluster))

    @contextmanager
    def watched(plan: "RunPlan") -> Iterator[None]:
        told.tell(storage=plan.storage, name=plan.name, resumes=config.checkpoint.resume)
        with watched_cluster(told.tell), show_progress(plan):
            yield

    if folds is not None:
        together = train_folds(config, watch=watched, leave=leave_page)
        say(json.dumps(together.to_json()) if as_json else "\n".join(together.lines))
        return
    result = run(config, watch=watched, leave=leave_page)
    facts, comparison = result.to_json(), None
    if from_sweep is not None:
        from raytune.sweeps.winner import against_trial

        comparison = against_trial(from_sweep, result)
        facts |= {"against_trial": comparison.to_json() if comparison else None}
    if as_json:
        say(json.dumps(facts))
        return
    show_result(result)
    if comparison:
        say(comparison.sentence)


@click.command(
    epilog=examples(
        "sweep sweep.yaml --dry-run",
        "sweep sweep.yaml sweep.trials=32",
    )
)
@run_arguments
@click.option("--dry-run", is_flag=True, help="Show trials, rungs and expected cost; tokenise the data, train nothing.")
@as_json_option
@debug_option
def sweep(arguments: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Search: train many variants of a run, stop early losers, rank them. The same command continues a sweep."""
    from raytune.config.checks.asked import require_named
    from raytune.config.load import dump_yaml

    config, places = load_run(*files_and_overrides(arguments), check_files=True)
    require_named(config, places=places)

    if dry_run:
        from raytune.sweeps.describe import dry_run_facts, sweep_text, trials_text
        from raytune.sweeps.planner import plan_of_sweep

        begin_on(named_address(config.cluster))
        resolved = plan_of_sweep(config, places)
        if as_json:
            say(json.dumps(dry_run_facts(resolved.plan, resolved.trials, resolved.plans)))
        else:
            say(f"{sweep_text(resolved.plan)}\n\n{trials_text(resolved.trials, resolved.plans, resolved.plan)}")
        return

    from raytune.launch.cluster.cluster_watch import watched_cluster
    from raytune.report.sweep_page import write_sweep_page
    from raytune.sweeps.final_table import show_sweep_result
    from raytune.sweeps.live import show_sweep
    from raytune.sweeps.run import sweep
    from raytune.sweeps.winner import require_winner

    told = begin_on(named_address(config.cluster))

    @contextmanager
    def watched(plan: "SweepPlan", known: "Known", board: "Board") -> Iterator[None]:
        with watched_cluster(told.tell), show_sweep(plan, known, board):
            yield

    result = sweep(config, watch=watched, places=places)
    page = write_sweep_page(result, dump_yaml(config), result.folder)
    if not as_json:
        show_sweep_result(result)
        say(f"report   {page}")
    require_winner(result)
    if as_json:
        say(json.dumps({**result.to_json(), "finished_before": result.finished_before, "report": page}))
    else:
        say(f"retrain  raytune train --from-sweep {result.folder}")


@click.command(
    epilog=examples(
        "score runs/support-bot held_out.jsonl",
        "score runs/support-bot held_out.jsonl --output losses.csv --address here",
    )
)
@click.argument("run")
@click.argument("rows", nargs=-1, required=True)
@click.option("--output", metavar="FILE", help="The table, .jsonl or .csv. Default: scores/NAME.jsonl in the run folder.")
@click.option("--format", "row_format", help="How rows are read, as data.train.format. Default: recognised by their columns.")
@click.option("--columns", metavar="NAME=COLUMN,...", help="As data.train.columns: prompt=question,completion=answer.")
@click.option(
    "--max-rows",
    type=click.IntRange(min=1),
    help="Score the first rows only, of each of ROWS: of a glob or a folder, of all its files together.",
)
@click.option("--address", help="Ray cluster instead of the run's, as cluster.address; here: one inside this machine.")
@as_json_option
@debug_option
def score(
    run: str,
    rows: tuple[str, ...],
    output: str | None,
    row_format: str | None,
    columns: str | None,
    max_rows: int | None,
    address: str | None,
    as_json: bool,
) -> None:
    """Score rows under the weights of a run: a table with the loss and the perplexity of each row.

    RUN is a run folder. A finished run is scored by its final model, another one by its best checkpoint. ROWS are files, globs,
    folders or data sets, as in data.train. They are read and cut as the run's own; what cannot be used is left out and counted.
    A loss is cross-entropy, whatever the run minimises (a teacher's part, a function of your own, weights of tokens), and that of
    the averaged weights where the run has training.averaging.
    """
    from raytune.launch.asking.score import run_to_score
    from raytune.launch.asking.score import score as score_run
    from raytune.launch.data.rows_to_score import columns_of, sources_of

    sources = sources_of(rows, row_format or "auto", max_rows, columns_of(columns))
    scored = run_to_score(run, address)
    begin_on(named_address(scored.cluster))
    scores = score_run(scored, sources, output=output)
    say(json.dumps(scores.to_json()) if as_json else "\n".join(scores.lines))


@click.command(
    epilog=examples(
        "track runs/support-bot",
        "track runs/support-bot tracking=tensorboard",
        "track runs/rank-and-rate tracking.mlflow.uri=http://mlflow.internal:5000",
    )
)
@click.argument("run")
@click.argument("overrides", nargs=-1, metavar="[tracking...=VALUE]...")
@as_json_option
@debug_option
def track(run: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Tell trackers of a run or a sweep what they do not know: what they missed, or all of it.

    RUN is its folder. Its own config says which trackers, or what is written here in its place. No command may be at work on it:
    one that trains tells them itself.
    """
    from raytune.launch.track import track as track_run

    if strangers := [override for override in overrides if not override.startswith(("tracking.", "tracking="))]:
        raise UserError(f"{strangers[0]} is nothing that trackers are told by. Write keys of tracking, or leave it out.")
    section = load_run([], overrides)[0].tracking if overrides else None
    told = track_run(run, section)
    say(json.dumps({"told": told}) if as_json else "\n".join(told))


def _to_be_planned(files: Sequence[str], overrides: Sequence[str], *, needs_rows: bool) -> "RunConfig":
    """The config of a plan, which trains nothing: settings alone are planned for the built-in toy, and that is said."""
    from raytune.config.checks.asked import NEITHER, is_settings_alone, require_named

    config, places = load_run(files, overrides, check_files=needs_rows)
    if not needs_rows:
        return require_named(config, ("model.base",), places)
    if is_settings_alone(config):
        say(f"{NEITHER} The plan is for the built-in toy.", err=True)
    return config


def _load_to_train(files: Sequence[str], overrides: Sequence[str]) -> "tuple[RunConfig, Mapping[str, Place]]":
    """The config with its files checked, which a run that has finished needs no more, and where its keys were written."""
    from raytune.config.problems import ConfigError

    try:
        return load_run(files, overrides, check_files=True)
    except ConfigError:
        from raytune.config.load import as_one_run
        from raytune.launch.state.finished import answer
        from raytune.run_folder import RunFolder
        from raytune.storage import absolute

        with suppress(RaytuneError):
            config, places = load_run(files, overrides)
            if answer(as_one_run(config), RunFolder(absolute(config.storage), config.name)):
                return config, places
        raise


def _count(text: str) -> int:
    from raytune.units import parse_count

    try:
        return parse_count(text)
    except ValueError as error:
        raise UserError(f"--tokens: {error}.") from error
