"""Verbs of machines and of jobs on a cluster elsewhere as functions."""

from collections.abc import Mapping, Sequence
from os import fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raytune.api.asked import File, as_overrides, files_of
from raytune.config.checks.asked import require_named
from raytune.config.load import load_with_places
from raytune.config.words.places import errors_at

if TYPE_CHECKING:
    from raytune.clusters.checks.finding import Finding
    from raytune.clusters.job import Job


def doctor(storage: File | None = None) -> "list[Finding]":
    """Check this machine as `raytune doctor` does: packages, GPUs, memory, disks, ports, tokens. Starts nothing.

    Args:
        storage: where runs will go, to look at its disk too.

    Returns:
        Findings, each with `name`, `status` (ok, warn, fail), `seen` and what to do (`fix`).
    """
    from raytune.clusters.doctor import examine_this_machine

    return examine_this_machine(None if storage is None else fspath(storage))


def preflight(
    address: str | None = None, *, storage: File | None = None, expected_bytes_per_s: float | None = None, **cluster: Any
) -> "list[Finding]":
    """Check every node of a cluster as `raytune preflight` does: versions, GPUs, disks, clocks, storage, a real all-reduce.

    Args:
        address: as `cluster.address`.
        storage: that all nodes share; None leaves it out.
        expected_bytes_per_s: bus bandwidth that nodes should reach together; None: what the catalogue says of their type.
        cluster: further keys of `cluster`.

    Returns:
        Findings, as `doctor`.

    Raises:
        raytune.errors.ClusterError: if the cluster cannot be joined.
    """
    from raytune.clusters.preflight import examine_cluster
    from raytune.config.load import config_from
    from raytune.plan.costs.hardware import load_catalogue
    from raytune.storage import absolute

    section = config_from({"cluster": {"address": address, **cluster}}, []).cluster
    if section.instance is not None:
        load_catalogue().instance(section.instance)
    where = None if storage is None else absolute(fspath(storage))
    return examine_cluster(section, where, expected_bytes_per_s=expected_bytes_per_s)


def submit(
    config: File | Sequence[File],
    *,
    target: str | None = None,
    verb: Literal["train", "sweep"] = "train",
    name: str | None = None,
    working_dir: File = ".",
    env: Mapping[str, str] | None = None,
    runtime_env: File | None = None,
    insecure: bool = False,
    **overrides: Any,
) -> "Job":
    """Submit a run as a job of a cluster elsewhere, as `raytune submit --detach` does.

    Args:
        config: files in `working_dir`, which the job takes along.
        target: where the cluster's dashboard listens: `local`, or an address; None: as the environment says.
        verb: what the job does.
        name: of the job; None: the run's, and six random digits.
        env: environment variables of the job. No secrets.
        runtime_env: a YAML or JSON file with env_vars, pip, uv, conda, image_uri, as Ray knows them.
        insecure: go on where the address is neither this machine nor HTTPS and no token is set.
        overrides: as for `train`.

    Returns:
        The job: `id`, `status`, and what it runs. `logs`, `status` and `stop` take its id.

    Raises:
        raytune.errors.UserError: before anything is sent, with what is wrong.
        raytune.errors.ClusterError: if nothing answers at `target`.
    """
    from raytune.clusters.job_environment import runtime_environment
    from raytune.clusters.jobs import Jobs
    from raytune.clusters.submission import prepare_submission

    given = runtime_environment(
        [f"{key}={value}" for key, value in (env or {}).items()], None if runtime_env is None else Path(runtime_env)
    )
    files, texts = files_of(config), as_overrides(overrides)
    resolved, places = load_with_places(files, texts)
    with errors_at(resolved, places):
        require_named(resolved, places=places)
        cluster = Jobs(target, insecure=insecure)
        with prepare_submission(
            resolved, verb, files, texts, working_dir=Path(working_dir), name=name, runtime_env=given
        ) as submission:
            return cluster.start(submission)


def status(name: str | None = None, *, target: str | None = None, insecure: bool = False) -> "list[Job]":
    """raytune's jobs of a cluster, newest first, as `raytune status` lists them.

    Args:
        name: of a job or a run; None: all.
        target, insecure: as for `submit`.

    Raises:
        raytune.errors.UserError: if there is no such job.
    """
    from raytune.clusters.jobs import Jobs

    cluster = Jobs(target, insecure=insecure)
    return cluster.all() if name is None else [cluster.find(name)]


def logs(name: str | None = None, *, tail: int | None = None, target: str | None = None, insecure: bool = False) -> str:
    """What a job has written, the newest job's without a name, as `raytune logs` prints it.

    Args:
        name: of a job or a run.
        tail: only so many lines, the last ones.
        target, insecure: as for `submit`.

    Raises:
        raytune.errors.UserError: if there is no such job.
    """
    from raytune.clusters.jobs import Jobs, last_lines

    cluster = Jobs(target, insecure=insecure)
    return last_lines(cluster.logs(cluster.find(name).id), tail)


def stop(name: str, *, target: str | None = None, insecure: bool = False) -> "Job":
    """Ask a job to end in order, as `raytune stop` does, and wait until it has.

    Args:
        name: of a job or a run.
        target, insecure: as for `submit`.

    Returns:
        The job, ended. The same `submit` continues its run from the newest checkpoint.

    Raises:
        raytune.errors.RaytuneError: if it has not ended in time.
    """
    from raytune.clusters.jobs import Jobs

    cluster = Jobs(target, insecure=insecure)
    return cluster.stop(cluster.find(name).id)
