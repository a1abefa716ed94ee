"""Verbs of jobs on a cluster elsewhere: submit, status, logs, stop."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from raytune.cli.group import (
    EXIT_INTERRUPTED,
    as_json_option,
    debug_option,
    examples,
    files_and_overrides,
    load_run,
    run_arguments,
)
from raytune.cli.say import say
from raytune.errors import UserError

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
@click.option("--env", "env", multiple=True, metavar="KEY=VALUE", help="Environment variable of the job. No secrets. Repeatable.")
@click.option(
    "--runtime-env",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="YAML or JSON with env_vars, pip, uv, conda, image_uri, as Ray knows them.",
)
@click.option(
    "--resubmit",
    type=click.IntRange(min=0),
    default=None,
    metavar="N",
    help="How often the run is submitted again if the node of its own process is lost. Default: 3; 0: never.",
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
    env: tuple[str, ...],
    runtime_env: Path | None,
    resubmit: int | None,
    detach: bool,
    as_json: bool,
) -> None:
    """Train as a job of a cluster elsewhere, and follow its output. Ctrl-C leaves the job alone.

    While it is followed, a run whose process loses its node is submitted again, and goes on from its newest checkpoint.

    Exit codes are those of `train` (0, 1, 2, 10); 143: the job was stopped; 130: you left it.
    """
    from raytune.clusters.job_environment import runtime_environment
    from raytune.clusters.jobs import Jobs
    from raytune.clusters.resubmission import MOST_RESUBMISSIONS, follow_to_the_end
    from raytune.clusters.submission import prepare_submission
    from raytune.config.checks.asked import require_named

    given = runtime_environment(env, runtime_env)
    files, overrides = files_and_overrides(arguments)
    config, places = load_run(files, overrides)
    require_named(config, places=places)
    cluster = Jobs(target, insecure=insecure)
    with prepare_submission(config, verb, files, overrides, working_dir=working_dir, name=name, runtime_env=given) as submission:
        job = cluster.start(submission)
        for note in submission.notes:
            say(note, err=True)
        say(f"job {job.id} on {cluster.url}", err=True)
        if detach:
            say(json.dumps(job.to_json()) if as_json else _how_to_come_back(job.id, target))
            return
        most = MOST_RESUBMISSIONS if resubmit is None else resubmit
        names = [job.id]
        with _leaving(names, target):
            job = follow_to_the_end(cluster, job, submission, _writer(as_json), _say, started=names.append, most=most)
    if as_json:
        say(json.dumps(job.to_json()))
    else:
        say(f"job {job.id} {job.status.lower()}, exit code {job.exit_code}", err=True)
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

    from raytune.clusters.job_progress import progress_of, status_text
    from raytune.clusters.jobs import Jobs

    cluster = Jobs(target, insecure=insecure)
    found = [cluster.find(name)] if name else cluster.all()
    if as_json:
        progress = {job.id: progress_of(job) for job in found}
        facts = [job.to_json() | {"progress": seen and asdict(seen)} for job in found for seen in [progress[job.id]]]
        say(json.dumps({"target": cluster.url, "jobs": facts}))
        return
    say(status_text(found, time.time()))
    if name and found[0].message:
        say(found[0].message)


@click.command(
    epilog=examples(
        "logs support-bot --follow",
        "logs --tail 50",
        "logs runs/support-bot --rank 1 --attempt 2",
    )
)
@click.argument("name", required=False, metavar="[JOB | RUN | FOLDER]")
@click.option("--rank", type=click.IntRange(min=0), metavar="N", help="Of a run folder: one worker's output. Default: all.")
@click.option("--attempt", type=click.IntRange(min=1), metavar="K", help="Of a run folder. Default: the newest.")
@target_option
@insecure_option
@click.option(
    "--follow", is_flag=True, help="Go on until the job ends, and return its exit code; of a folder, until its run ends."
)
@click.option("--tail", type=click.IntRange(min=0), metavar="N", help="Only the last N lines.")
@as_json_option
@debug_option
def logs(
    name: str | None,
    rank: int | None,
    attempt: int | None,
    target: str | None,
    insecure: bool,
    follow: bool,
    tail: int | None,
    as_json: bool,
) -> None:
    """Print what a job has written, the newest job's without a name; or what the workers of a run have, by its run folder."""
    from raytune.watch.logs import print_logs, run_folder_of

    if name is not None and "/" in name:  # which no job and no run has in its name
        if (folder := run_folder_of(name)) is None:
            raise UserError(f"{name} is no run folder: it has no run.json. Name one, such as runs/quickstart, or a job.")
        print_logs(folder, attempt, rank, tail, _say_line, follow=follow, as_json=as_json)
        return
    if rank is not None or attempt is not None:
        raise click.UsageError("--rank and --attempt are for a run folder, such as runs/support-bot.")
    from raytune.clusters.jobs import Jobs, last_lines

    cluster = Jobs(target, insecure=insecure)
    job = cluster.find(name)
    if follow:
        with _leaving([job.id], target):
            job = cluster.follow(job.id, _writer(as_json), tail, _say)
        if as_json:
            say(json.dumps(job.to_json()))
        click.get_current_context().exit(job.exit_code or 0)
    text = last_lines(cluster.logs(job.id), tail)
    say(json.dumps({**job.to_json(), "logs": text}) if as_json else text, nl=as_json, is_log=not as_json)


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
    from raytune.clusters.jobs import Jobs

    cluster = Jobs(target, insecure=insecure)
    job = cluster.stop(cluster.find(name).id)
    say(json.dumps(job.to_json()) if as_json else f"job {job.id} {job.status.lower()}")


@contextmanager
def _leaving(names: Sequence[str], target: str | None) -> Iterator[None]:
    """Ctrl-C ends the following, not the job.

    Args:
        names: of the jobs that were followed, the newest last.
    """
    try:
        yield
    except KeyboardInterrupt:
        say(f"\njob {names[-1]} goes on. {_how_to_come_back(names[-1], target)}", err=True)
        click.get_current_context().exit(EXIT_INTERRUPTED)


def _writer(as_json: bool) -> Callable[[str], None]:
    """Prints a job's output; on standard error where standard output is for JSON."""
    return lambda text: say(text, nl=False, err=as_json, is_log=True)


def _say(text: str) -> None:
    say(text, err=True)


def _say_line(text: str) -> None:
    say(text, is_log=True)


def _how_to_come_back(job_id: str, target: str | None) -> str:
    where = f" --target {target}" if target else ""
    return f"Come back: raytune logs {job_id} --follow{where}. End it: raytune stop {job_id}{where}"
