"""The words a user types. Heavy imports happen inside verbs, so that `check` and `explain` answer at once.

Every verb has `--json` (one JSON object on standard output) and `--debug` (tracebacks). Exit codes: 0 done, 1 failed,
2 refused as written, 10 try again later, 130 interrupted.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import raytune
from raytune.errors import EXIT_FAILED, RaytuneError, UserError

if TYPE_CHECKING:
    from raytune.launch.checks.finding import Finding
    from raytune.launch.jobs import Job, Jobs

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
@click.option("--tokens", help="Training tokens of an epoch, such as 50M, instead of the data's; with cluster.instance.")
@click.option("--compare", metavar="NAMES", help="Rank instance types: all, a cloud (aws, gcp, azure), or names with commas.")
@as_json_option
@debug_option
def plan(arguments: tuple[str, ...], tokens: str | None, compare: str | None, as_json: bool) -> None:
    """Resolve everything and show it: batch, steps, memory per worker, time and money, and why. Trains nothing.

    With cluster.instance it needs neither the cluster nor the model's weights, and tokenises nothing: the amount of data is taken
    from --tokens or the sizes of the files. Without, it looks at the cluster (or this machine) and tokenises the data.
    """
    from raytune.config.load import as_one_run, load_config
    from raytune.plan.ahead import compare as compare_instances
    from raytune.plan.ahead import named_instances, plan_ahead
    from raytune.plan.describe import comparison_text, plan_text

    num_tokens = None if tokens is None else _count(tokens)
    config = as_one_run(load_config(*files_and_overrides(arguments), check_files=tokens is None))
    if compare is not None:
        candidates = compare_instances(config, named_instances(compare), num_tokens)
        click.echo(json.dumps([one.to_json() for one in candidates]) if as_json else comparison_text(candidates))
        return
    if config.cluster.instance:
        resolved = plan_ahead(config, num_tokens)
    elif tokens is not None:
        raise UserError("--tokens is for a plan without cluster and data. Set cluster.instance too, or leave it out.")
    else:
        from raytune.launch.run import plan_run

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
    facts = result.to_json()
    if from_sweep is not None:
        from raytune.sweeps.winner import against_trial

        comparison = against_trial(from_sweep, result)
        facts |= {"against_trial": comparison.to_json()}
    if as_json:
        click.echo(json.dumps(facts))
        return
    show_result(result)
    if from_sweep is not None:
        click.echo(comparison.sentence)


@cli.command()
@run_arguments
@click.option("--dry-run", is_flag=True, help="Show trials, rungs and expected cost; tokenise the data, train nothing.")
@as_json_option
@debug_option
def sweep(arguments: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Search: train many variants of a run, stop early losers, rank them. The same command continues a sweep."""
    from raytune.config.load import dump_yaml, load_with_places
    from raytune.sweeps.space import check_space

    config, places = load_with_places(*files_and_overrides(arguments), check_files=True)
    if config.sweep is not None:
        check_space(config, places)

    if dry_run:
        from raytune.sweeps.describe import dry_run_facts, sweep_text, trials_text
        from raytune.sweeps.run import plan_of_sweep

        resolved = plan_of_sweep(config)
        if as_json:
            click.echo(json.dumps(dry_run_facts(resolved.plan, resolved.trials, resolved.plans)))
        else:
            click.echo(f"{sweep_text(resolved.plan)}\n\n{trials_text(resolved.trials, resolved.plans, resolved.plan)}")
        return

    from raytune.report.sweep_page import write_sweep_page
    from raytune.sweeps.live import show_sweep
    from raytune.sweeps.progress import show_sweep_result
    from raytune.sweeps.run import sweep

    result = sweep(config, watch=show_sweep)
    page = write_sweep_page(result, dump_yaml(config), result.folder)
    if as_json:
        click.echo(json.dumps({**result.to_json(), "report": page}))
        return
    show_sweep_result(result)
    click.echo(f"report   {page}\nretrain  raytune train --from-sweep {result.folder}")


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


@cli.group()
def cluster() -> None:
    """Describe a cluster in files that Ray, KubeRay and clouds read, and start or end it with Ray's own commands."""


@cluster.command("render")
@run_arguments
@click.option(
    "--target",
    type=click.Choice(["ray-up", "network", "kuberay", "kuberay-cluster"]),
    default="ray-up",
    show_default=True,
    help="A file for `ray up`; the network and roles it stands on; a KubeRay RayJob; a RayCluster.",
)
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="File to write. Default: standard output.")
@as_json_option
@debug_option
def cluster_render(arguments: tuple[str, ...], target: Any, output: Path | None, as_json: bool) -> None:
    """Write the cluster of a run (its sections cluster and provider) as a commented file. Calls no cloud."""
    from raytune.config.load import load_config
    from raytune.launch.kuberay import kuberay_yaml
    from raytune.launch.provider import KUBERAY, cluster_spec
    from raytune.launch.ray_up import ray_up_text
    from raytune.plan.hardware import load_catalogue

    spec = cluster_spec(load_config(*files_and_overrides(arguments)), load_catalogue(), target)
    text = kuberay_yaml(spec, target) if target in KUBERAY else ray_up_text(spec, target)
    if output is not None:
        output.write_text(text, encoding="utf-8")
    if as_json:
        click.echo(json.dumps({"ok": True, "target": target, "output": output and str(output), "text": text}))
    else:
        click.echo(f"{target} file of {spec.name}: {output}" if output else text, nl=bool(output))


@cluster.command("up")
@click.argument("cluster_file", type=click.Path(path_type=Path))
@debug_option
def cluster_up(cluster_file: Path) -> None:
    """Start or update the cluster of a rendered file: `ray up`, with a token made before if there is none."""
    from raytune.launch.ray_up import up

    up(cluster_file)


@cluster.command("down")
@click.argument("cluster_file", type=click.Path(path_type=Path))
@debug_option
def cluster_down(cluster_file: Path) -> None:
    """End the cluster of a rendered file: `ray down`."""
    from raytune.launch.ray_up import down

    down(cluster_file)


def _count(text: str) -> int:
    from raytune.units import parse_count

    try:
        return parse_count(text)
    except ValueError as error:
        raise UserError(f"--tokens: {error}.") from error


@cli.command()
@click.argument("arguments", nargs=-1, metavar="[FILE]... [KEY=VALUE]...")
@click.option("--expect", metavar="RATE", help="What a node's network should give per second, such as 50GB. Default: not known.")
@as_json_option
@debug_option
def preflight(arguments: tuple[str, ...], expect: str | None, as_json: bool) -> None:
    """Check every node of the cluster: versions, GPUs, disks, clocks, shared storage, and a real all-reduce.

    Exit code 0: nothing failed. 1: something did; each line says what to do. 10: the cluster could not be reached.
    """
    from raytune.config.load import config_from, load_config
    from raytune.units import parse_size

    files, overrides = files_and_overrides(arguments)
    config = load_config(files, overrides) if files else config_from({}, overrides)
    try:
        expected = parse_size(expect.removesuffix("/s")) if expect else None
    except ValueError as error:
        raise UserError(f"--expect: {error}") from error

    from raytune.launch.preflight import examine_cluster
    from raytune.storage import absolute

    storage = absolute(config.storage) if "storage" in config.model_fields_set else None
    _show_findings(examine_cluster(config.cluster, storage, expected_bytes_per_s=expected), as_json)


@cli.command()
@click.option("--storage", help="Where runs will go, to look at its disk too.")
@as_json_option
@debug_option
def doctor(storage: str | None, as_json: bool) -> None:
    """Check this machine in a second: packages, GPUs, memory, disks, ports, tokens. Starts nothing.

    Exit code 0: nothing failed. 1: something did; each line says what to do.
    """
    from raytune.launch.doctor import examine_this_machine

    _show_findings(examine_this_machine(storage), as_json)


def _show_findings(findings: "Sequence[Finding]", as_json: bool) -> None:
    from raytune.launch.checks.finding import findings_json, findings_text, worst

    click.echo(json.dumps(findings_json(findings)) if as_json else findings_text(findings))
    if worst(findings) == "fail":
        click.get_current_context().exit(EXIT_FAILED)


target_option = click.option(
    "--target",
    metavar="TARGET",
    help="Where the cluster's dashboard listens: local (on this machine), or an http(s):// address. Default, and auto: "
    "RAY_API_SERVER_ADDRESS, else RAY_ADDRESS, else local.",
)
insecure_option = click.option(
    "--insecure", is_flag=True, help="Go on where the address is neither this machine nor HTTPS and no token is set."
)


@cli.command()
@run_arguments
@target_option
@insecure_option
@click.option("--name", metavar="ID", help="Name of the job. Default: the run's name and six random digits.")
@click.option("--verb", type=click.Choice(["train", "sweep"]), default="train", help="What the job does. Default: train.")
@click.option(
    "--working-dir", type=click.Path(path_type=Path), default=".", help="Folder that the job takes along. Default: this one."
)
@click.option("--detach", is_flag=True, help="Return when the job is submitted.")
@as_json_option
@debug_option
def submit(
    arguments: tuple[str, ...],
    target: str | None,
    insecure: bool,
    name: str | None,
    verb: str,
    working_dir: Path,
    detach: bool,
    as_json: bool,
) -> None:
    """Train as a job of a cluster elsewhere, and follow its output. Ctrl-C leaves the job alone.

    Exit codes are those of `train` (0, 1, 2, 10); 143: the job was stopped; 130: you left it.
    """
    from raytune.launch import jobs

    cluster = jobs.Jobs(target, insecure=insecure)
    job, left_out = jobs.submit(cluster, verb, *files_and_overrides(arguments), working_dir=working_dir, name=name)
    for file in left_out:
        click.echo(f"left out: {file} (looks like a secret)", err=True)
    click.echo(f"job {job.id} on {cluster.url}", err=True)
    if detach:
        click.echo(json.dumps(job.to_json()) if as_json else _how_to_come_back(job.id, target))
        return
    job = _follow(cluster, job.id, target, as_json)
    if as_json:
        click.echo(json.dumps(job.to_json()))
    else:
        click.echo(f"job {job.id} {job.status.lower()}, exit code {job.exit_code}", err=True)
    click.get_current_context().exit(job.exit_code or 0)


@cli.command()
@click.argument("name", required=False, metavar="[JOB | RUN]")
@target_option
@insecure_option
@as_json_option
@debug_option
def status(name: str | None, target: str | None, insecure: bool, as_json: bool) -> None:
    """List raytune's jobs of a cluster, or one: state, exit code, run, and its step where the run folder is seen from here."""
    import time
    from dataclasses import asdict

    from raytune.launch import jobs

    cluster = jobs.Jobs(target, insecure=insecure)
    found = [cluster.find(name)] if name else cluster.all()
    if as_json:
        progress = {job.id: jobs.progress_of(job) for job in found}
        facts = [job.to_json() | {"progress": seen and asdict(seen)} for job in found for seen in [progress[job.id]]]
        click.echo(json.dumps({"target": cluster.url, "jobs": facts}))
        return
    click.echo(jobs.status_text(found, time.time()))
    if name and found[0].message:
        click.echo(found[0].message)


@cli.command()
@click.argument("name", required=False, metavar="[JOB | RUN]")
@target_option
@insecure_option
@click.option("--follow", is_flag=True, help="Go on until the job ends, and return its exit code.")
@click.option("--tail", type=click.IntRange(min=0), metavar="N", help="Only the last N lines.")
@as_json_option
@debug_option
def logs(name: str | None, target: str | None, insecure: bool, follow: bool, tail: int | None, as_json: bool) -> None:
    """Print what a job has written; the newest job's without a name."""
    from raytune.launch import jobs

    cluster = jobs.Jobs(target, insecure=insecure)
    job = cluster.find(name)
    if follow:
        job = _follow(cluster, job.id, target, as_json, tail)
        if as_json:
            click.echo(json.dumps(job.to_json()))
        click.get_current_context().exit(job.exit_code or 0)
    text = jobs.last_lines(cluster.logs(job.id), tail)
    click.echo(json.dumps({**job.to_json(), "logs": text}) if as_json else text, nl=as_json)


@cli.command()
@click.argument("name", metavar="JOB | RUN")
@target_option
@insecure_option
@as_json_option
@debug_option
def stop(name: str, target: str | None, insecure: bool, as_json: bool) -> None:
    """Ask a job to end in order, and wait until it has. The same `submit` continues its run from the newest checkpoint.

    Exit code 0: it has ended. 10: it has not yet.
    """
    from raytune.launch import jobs

    cluster = jobs.Jobs(target, insecure=insecure)
    job = cluster.stop(cluster.find(name).id)
    click.echo(json.dumps(job.to_json()) if as_json else f"job {job.id} {job.status.lower()}")


def _follow(cluster: "Jobs", job_id: str, target: str | None, as_json: bool, tail: int | None = None) -> "Job":
    """Print a job's output until it ends; on standard error where standard output is for JSON."""
    try:
        return cluster.follow(job_id, lambda text: click.echo(text, nl=False, err=as_json), tail)
    except KeyboardInterrupt:
        click.echo(f"\njob {job_id} goes on. {_how_to_come_back(job_id, target)}", err=True)
        click.get_current_context().exit(EXIT_INTERRUPTED)


def _how_to_come_back(job_id: str, target: str | None) -> str:
    where = f" --target {target}" if target else ""
    return f"Come back: raytune logs {job_id} --follow{where}. End it: raytune stop {job_id}{where}"


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


if __name__ == "__main__":  # `python -m raytune.cli`, for jobs without a launch.py
    main()
