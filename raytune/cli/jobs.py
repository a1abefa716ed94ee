"""Verbs of jobs on a cluster elsewhere: submit, status, logs, stop."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from raytune.cli.group import EXIT_INTERRUPTED, as_json_option, debug_option, examples, files_and_overrides, run_arguments

if TYPE_CHECKING:
    from raytune.clusters.jobs import Job, Jobs

target_option = click.option(
    "--target",
    metavar="TARGET",
    help="Where the cluster's dashboard listens: local (on this machine), or an http(s):// address. Default, and auto: "
    "RAY_API_SERVER_ADDRESS, else RAY_ADDRESS, else local.",
)
insecure_option = click.option(
    "--insecure", is_flag=True, help="Go on where the address is neither this machine nor HTTPS and no token is set."
)


@click.command(
    epilog=examples(
        "submit run.yaml storage=/shared/runs",
        "submit sweep.yaml --verb sweep --target http://127.0.0.1:8265 --detach",
    )
)
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
    from raytune.clusters import jobs

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


@click.command(
    epilog=examples(
        "status",
        "status support-bot --json",
    )
)
@click.argument("name", required=False, metavar="[JOB | RUN]")
@target_option
@insecure_option
@as_json_option
@debug_option
def status(name: str | None, target: str | None, insecure: bool, as_json: bool) -> None:
    """List raytune's jobs of a cluster, or one: state, exit code, run, and its step where the run folder is seen from here."""
    import time
    from dataclasses import asdict

    from raytune.clusters import jobs

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


@click.command(
    epilog=examples(
        "logs support-bot --follow",
        "logs --tail 50",
    )
)
@click.argument("name", required=False, metavar="[JOB | RUN]")
@target_option
@insecure_option
@click.option("--follow", is_flag=True, help="Go on until the job ends, and return its exit code.")
@click.option("--tail", type=click.IntRange(min=0), metavar="N", help="Only the last N lines.")
@as_json_option
@debug_option
def logs(name: str | None, target: str | None, insecure: bool, follow: bool, tail: int | None, as_json: bool) -> None:
    """Print what a job has written; the newest job's without a name."""
    from raytune.clusters import jobs

    cluster = jobs.Jobs(target, insecure=insecure)
    job = cluster.find(name)
    if follow:
        job = _follow(cluster, job.id, target, as_json, tail)
        if as_json:
            click.echo(json.dumps(job.to_json()))
        click.get_current_context().exit(job.exit_code or 0)
    text = jobs.last_lines(cluster.logs(job.id), tail)
    click.echo(json.dumps({**job.to_json(), "logs": text}) if as_json else text, nl=as_json)


@click.command(
    epilog=examples(
        "stop support-bot",
    )
)
@click.argument("name", metavar="JOB | RUN")
@target_option
@insecure_option
@as_json_option
@debug_option
def stop(name: str, target: str | None, insecure: bool, as_json: bool) -> None:
    """Ask a job to end in order, and wait until it has. The same `submit` continues its run from the newest checkpoint.

    Exit code 0: it has ended. 10: it has not yet.
    """
    from raytune.clusters import jobs

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
