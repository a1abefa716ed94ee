"""The words a user types. Heavy imports happen inside verbs, so that `check` and `explain` answer at once.

Every verb has `--json` (one JSON object on standard output) and `--debug` (tracebacks). Exit codes: 0 done, 1 failed,
2 refused as written, 10 try again later, 130 interrupted.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

import raytune
from raytune.errors import RaytuneError

EXIT_INTERRUPTED = 130

_OVERRIDE = re.compile(r"\w[\w.-]*=", re.ASCII)


class Verbs(click.Group):
    """Answers an error that raytune knows with its message and exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RaytuneError as error:
            if ctx.meta.get("debug"):
                raise
            if ctx.meta.get("as_json"):
                click.echo(json.dumps(_error_facts(error)))
            else:
                click.echo(str(error), err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted; the same command continues from the newest checkpoint, if the run has one", err=True)
            ctx.exit(EXIT_INTERRUPTED)


def files_and_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tell `key.sub=value` from file names; a file whose name looks like an override is written `./a=b.yaml`."""
    overrides = [argument for argument in arguments if _OVERRIDE.match(argument)]
    return [argument for argument in arguments if not _OVERRIDE.match(argument)], overrides


def _remember(ctx: click.Context, option: click.Parameter, value: bool) -> bool:
    ctx.meta[str(option.name)] = value
    return value


def _print_version(ctx: click.Context, option: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        click.echo(f"raytune {raytune.__version__}")
        ctx.exit()


run_arguments = click.argument("arguments", nargs=-1, required=True, metavar="FILE... [KEY=VALUE]...")
as_json_option = click.option("--json", "as_json", is_flag=True, callback=_remember, help="Print one JSON object.")
debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, callback=_remember, help="Show the traceback of an error."
)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version, help="Print the version.")
def cli() -> None:
    """Fine-tune language models on a Ray cluster: one YAML in, weights and metrics out."""


@cli.command()
@run_arguments
@as_json_option
@debug_option
def check(arguments: tuple[str, ...], as_json: bool) -> None:
    """Validate files and overrides, and list every problem at once. Starts nothing."""
    from raytune.config.load import dump_yaml, load_with_places, overridden
    from raytune.config.problems import shown
    from raytune.sweeps.space import check_space

    files, overrides = files_and_overrides(arguments)
    config, places = load_with_places(files, overrides, check_files=True)
    if config.sweep is not None:
        check_space(config, places)
    changes = overridden(files, config)
    if as_json:
        named = [{"key": key, "before": before, "after": after} for key, before, after in changes]
        click.echo(json.dumps({"ok": True, "config": config.model_dump(mode="json"), "overridden": named}))
        return
    written = dump_yaml(config)
    what, how = "sweep" if config.sweep else "run", "as written here, the rest by default:" if written else "all by default"
    click.echo(f'OK: {what} "{config.name}", {how}')
    click.echo("".join(f"  {line}\n" for line in written.splitlines()), nl=False)
    if changes:
        click.echo("Changed on the command line:")
        click.echo("".join(f"  {key}: {shown(before)} -> {shown(after)}\n" for key, before, after in changes), nl=False)


@cli.command()
@click.argument("subject", default="", metavar="[KEY | ERROR]")
@as_json_option
@debug_option
def explain(subject: str, as_json: bool) -> None:
    """Say what a key (`training.learning_rate`), a section (`training`) or an error (`E101`) means."""
    from raytune.config.document import explain, explanation_facts

    click.echo(json.dumps(explanation_facts(subject)) if as_json else explain(subject))


@cli.command()
@as_json_option
@debug_option
def schema(as_json: bool) -> None:
    """Print the JSON Schema of a run config, for editors."""
    from raytune.config.document import json_schema

    click.echo(json.dumps(json_schema(), indent=None if as_json else 2))


@cli.command()
@run_arguments
@as_json_option
@debug_option
def plan(arguments: tuple[str, ...], as_json: bool) -> None:
    """Resolve everything and show it: batch, steps, memory per worker, and why. Tokenises the data, trains nothing."""
    from raytune.config.load import as_one_run, load_config

    config = as_one_run(load_config(*files_and_overrides(arguments), check_files=True))

    from raytune.launch.run import plan_run
    from raytune.plan.describe import plan_text

    resolved = plan_run(config)
    click.echo(resolved.model_dump_json() if as_json else plan_text(resolved))


@cli.command()
@click.argument("arguments", nargs=-1, metavar="FILE... [KEY=VALUE]...")
@click.option("--from-sweep", metavar="FOLDER", help="Train the winner of a finished sweep again, instead of a file.")
@as_json_option
@debug_option
def train(arguments: tuple[str, ...], from_sweep: str | None, as_json: bool) -> None:
    """Train: plan the run, start or join a Ray cluster, and leave weights in the run folder. The same command continues a run."""
    from raytune.config.load import as_one_run, load_config

    files, overrides = files_and_overrides(arguments)
    if from_sweep is None:
        if not files:
            raise click.UsageError("Name a config file, or a finished sweep with --from-sweep FOLDER.")
        config = as_one_run(load_config(files, overrides, check_files=True))
    else:
        from raytune.sweeps.winner import winner_config

        config = winner_config(from_sweep, files, overrides)

    from raytune.launch.progress import show_progress, show_result
    from raytune.launch.run import run

    result = run(config, watch=show_progress)
    facts, comparison = result.to_json(), None
    if from_sweep is not None:
        from raytune.sweeps.winner import against_trial

        comparison = against_trial(from_sweep, result)
        facts |= {"against_trial": comparison.to_json() if comparison else None}
    if as_json:
        click.echo(json.dumps(facts))
        return
    show_result(result)
    if comparison:
        click.echo(comparison.sentence)


@cli.command()
@run_arguments
@click.option("--dry-run", is_flag=True, help="Show trials, rungs and expected cost; tokenise the data, train nothing.")
@as_json_option
@debug_option
def sweep(arguments: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Search: train many variants of a run, stop early losers, rank them. The same command continues a sweep."""
    from raytune.config.load import dump_yaml, load_with_places

    config, places = load_with_places(*files_and_overrides(arguments), check_files=True)

    if dry_run:
        from raytune.sweeps.describe import dry_run_facts, sweep_text, trials_text
        from raytune.sweeps.run import plan_of_sweep

        resolved = plan_of_sweep(config, places)
        if as_json:
            click.echo(json.dumps(dry_run_facts(resolved.plan, resolved.trials, resolved.plans)))
        else:
            click.echo(f"{sweep_text(resolved.plan)}\n\n{trials_text(resolved.trials, resolved.plans, resolved.plan)}")
        return

    from raytune.report.sweep_page import write_sweep_page
    from raytune.sweeps.live import show_sweep
    from raytune.sweeps.progress import show_sweep_result
    from raytune.sweeps.run import sweep
    from raytune.sweeps.winner import require_winner

    result = sweep(config, watch=show_sweep, places=places)
    page = write_sweep_page(result, dump_yaml(config), result.folder)
    if not as_json:
        show_sweep_result(result)
        click.echo(f"report   {page}")
    require_winner(result)
    if as_json:
        click.echo(json.dumps({**result.to_json(), "report": page}))
    else:
        click.echo(f"retrain  raytune train --from-sweep {result.folder}")


@cli.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder for the merged model; new or empty.")
@click.option("--base", help="Base model, if not the one that the adapter names: a folder, a hub id, or demo.")
@click.option("--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), help="Dtype of the result. Default: that of the base.")
@click.option(
    "--original-base", is_flag=True, help="QLoRA: merge into the original weights, not into the quantised ones that training saw."
)
@as_json_option
@debug_option
def merge(adapter: Path, output: Path, base: str | None, dtype: Any, original_base: bool, as_json: bool) -> None:
    """Merge an adapter into its base, shard by shard, as a stand-alone model with tokenizer and chat template."""
    from raytune.model.merge import merge_adapter

    merge_adapter(adapter, output, base=base, dtype=dtype, dequantise=not original_base)
    click.echo(json.dumps({"model_path": str(output.resolve())}) if as_json else f"merged model: {output}")


def _error_facts(error: RaytuneError) -> dict[str, Any]:
    from raytune.config.problems import ConfigError

    facts = {"ok": False, "error": type(error).__name__, "message": str(error), "exit_code": error.exit_code}
    if isinstance(error, ConfigError):
        facts["problems"] = [
            {"id": problem.id, "file": problem.place.file, "line": problem.place.line, "column": problem.place.column}
            | {"key": problem.key, "message": problem.message}
            for problem in error.problems
        ]
    return facts


def main() -> None:
    cli(prog_name="raytune")
