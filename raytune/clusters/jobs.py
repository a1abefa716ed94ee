"""Jobs of a cluster that is elsewhere: submit, look, read logs, stop. What `ray job` does, with raytune's exit codes.

A job is `python launch.py train ...` in a working directory of its own on the cluster. A target is where a cluster's dashboard
listens: on this machine, or at the end of a tunnel (`ray dashboard`, `kubectl port-forward`), or behind HTTPS.
"""

import asyncio
import ipaddress
import logging
import os
import secrets
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.dashboard.utils import ray_address_to_api_server_url
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

import raytune
from raytune.clusters.working_dir import contents, named_by, pack, path_in_job
from raytune.config.load import as_one_run, load_config
from raytune.errors import EXIT_FAILED, EXIT_RETRY_LATER, ClusterError, RaytuneError, UserError
from raytune.launch.record import RunRecord, read_plan
from raytune.metrics import History
from raytune.run_folder import RunFolder
from raytune.storage import is_local
from raytune.token_file import close_token, token_path
from raytune.units import format_seconds

LOCAL = "local"
ENVIRONMENT = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Where a target may be named, first found first; `ray job` reads the same."""

# A run that is asked to end closes its workers, within 20 s, and its record; Ray kills it after 3 s by default. It also waits
# this long in vain where nobody buries dead processes, as in a container without an init.
STOP_WAIT_S = 30
STOP_TIMEOUT_S = 90.0
EXIT_STOPPED = 143
"""Of a job that was stopped, as of a process that SIGTERM ended."""

_PUSH_CPUS = 0.01
_POLL_S = 1.0
_START_WAIT_S = 60.0
_PATIENCE_S = 120.0
"""Longest silence of a dashboard while logs are followed."""

_log = logging.getLogger(__name__)


# --- Where -------------------------------------------------------------------------------------------------------------------


def named_target(target: str | None, environ: Mapping[str, str]) -> str:
    """The target that an option or the environment names: `local`, a URL, or a Ray address from the environment.

    Raises:
        UserError: if the option is neither.
    """
    if target is None or target == "auto":
        return next((environ[name] for name in ENVIRONMENT if environ.get(name)), LOCAL)
    if target == LOCAL or target.startswith(("http://", "https://")):
        return target.rstrip("/")
    hint = f" Did you mean http://{target}?" if "://" not in target else ""
    raise UserError(f"Target {target!r} is neither local, auto, nor an http:// or https:// address of a dashboard.{hint}")


def refuse_open(url: str, *, has_token: bool, insecure: bool) -> str | None:
    """Refuse to send code and a config over a network to a dashboard that asks nobody who they are.

    Returns:
        What is risked, where it was allowed by `insecure`; None where nothing is.

    Raises:
        UserError: where it was not.
    """
    host = urlsplit(url).hostname or ""
    if url.startswith("https://") or has_token or _is_loopback(host):
        return None
    why = (
        f"{url} is neither this machine nor HTTPS, and no token is set: whoever reaches that port can run code on the cluster as "
        f"you do now, and whoever is on the way reads what you send (CVE-2023-48022)."
    )
    if insecure:
        return why
    raise UserError(
        f"{why} Nothing was sent. Reach it through a tunnel (`ray dashboard CLUSTER.yaml`, `kubectl port-forward "
        f"service/HEAD-SERVICE 8265`, `ssh -L 8265:localhost:8265 HEAD`) and target http://127.0.0.1:8265, or start the cluster "
        f"with RAY_AUTH_MODE=token and have its token in ~/.ray/auth_token. --insecure goes on all the same."
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Jobs:
    """The jobs of one cluster.

    Args:
        target: as a user names it; None reads the environment.
        insecure: go on where `refuse_open` would not.

    Raises:
        UserError: if it may not be used, or refuses this token.
        ClusterError: if nothing answers there.
    """

    def __init__(self, target: str | None = None, *, insecure: bool = False) -> None:
        for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(name).setLevel(logging.ERROR)
        close_token(token_path())
        has_token = maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        self.url = _url(named_target(target, os.environ))
        risk = refuse_open(self.url, has_token=has_token, insecure=insecure)
        if risk:
            _log.warning("%s Going on because of --insecure.", risk)
        with _answered(self.url), _no_other_address():
            self._client = JobSubmissionClient(self.url)

    def submit(self, entrypoint: str, package: Path, submission_id: str, metadata: dict[str, str]) -> None:
        """Start a job.

        Args:
            entrypoint: a shell command.
            package: the zip that becomes its working directory.

        Raises:
            UserError: if there is a job of that name.
        """
        deadline = time.monotonic() + _START_WAIT_S
        while True:
            try:
                with _answered(self.url):
                    self._client.submit_job(
                        entrypoint=entrypoint,
                        submission_id=submission_id,
                        # Everybody who reaches the dashboard reads these: nothing secret belongs here.
                        runtime_env={"working_dir": str(package), "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}},
                        metadata=metadata,
                        **entrypoint_place(self._nodes()),
                    )
                return
            except RuntimeError as error:
                if "already exists" in str(error):
                    raise UserError(f"There is a job {submission_id} on {self.url}. Give this one another --name.") from error
                # A head that has just started has a dashboard a few seconds before it takes jobs.
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise ClusterError(f"{self.url} did not take the job: {error}") from error
            time.sleep(_POLL_S)

    def _nodes(self) -> list[dict[str, Any]]:
        """Living nodes as the dashboard lists them; none if it does not tell."""
        answer = self._client._do_request(
            "GET", "/api/v0/nodes?detail=true&limit=10000&filter_keys=state&filter_predicates=%3D&filter_values=ALIVE"
        )
        if answer.status_code != 200:
            return []
        return answer.json()["data"]["result"]["result"]

    def all(self) -> list["Job"]:
        """Those of raytune, the newest first."""
        with _answered(self.url):
            details = self._client.list_jobs()
        jobs = [_job(one) for one in details if one.submission_id and _is_ours(one)]
        return sorted(jobs, key=lambda job: job.started or 0.0, reverse=True)

    def find(self, name: str | None) -> "Job":
        """The job that a name means.

        Raises:
            UserError: if there is none.
        """
        jobs = self.all()
        found = meant(jobs, name)
        if found is not None:
            return found
        known = ", ".join(job.id for job in jobs[:10]) or "none"
        raise UserError(f"No job {name or 'of raytune'} on {self.url}. Jobs of raytune there: {known}.")

    def look(self, submission_id: str) -> "Job":
        with _answered(self.url):
            return _job(self._client.get_job_info(submission_id))

    def logs(self, submission_id: str) -> str:
        """Everything that a job has written so far."""
        with _answered(self.url):
            return self._client.get_job_logs(submission_id)

    def follow(self, submission_id: str, write: Callable[[str], None], tail: int | None = None) -> "Job":
        """Hand on what a job writes until it ends. A connection that breaks is made again, and nothing is written twice.

        Args:
            tail: how many of the lines that are there already; None: all.

        Raises:
            ClusterError: if the dashboard stays silent.
        """
        seen, silent_since = 0, None
        if tail is not None:
            so_far = self.logs(submission_id)
            seen = len(so_far)
            write(last_lines(so_far, tail))
        while True:
            try:
                for piece in self._tail(submission_id, seen):
                    seen, silent_since = seen + len(piece), None
                    write(piece)
                job = self.look(submission_id)
                if job.has_ended:
                    write(self.logs(submission_id)[seen:])  # what came between the last piece and the end
                    return job
                silent_since = None
            except (ClusterError, RuntimeError, OSError) as error:
                now = time.monotonic()
                silent_since = silent_since or now
                if now - silent_since > _PATIENCE_S:
                    raise ClusterError(
                        f"{self.url} has not answered for {format_seconds(_PATIENCE_S)} ({error}). Job {submission_id} may go on "
                        f"without it: `raytune logs {submission_id} --follow` when it is back."
                    ) from error
            time.sleep(_POLL_S)

    def _tail(self, submission_id: str, seen: int) -> Iterator[str]:
        """Pieces of a job's output from character `seen` on, until the connection ends."""
        pieces = self._client.tail_job_logs(submission_id)
        to_skip = seen

        async def following() -> str | None:
            return await anext(pieces, None)

        with asyncio.Runner() as runner:
            while (piece := runner.run(following())) is not None:
                new, to_skip = piece[to_skip:], max(0, to_skip - len(piece))
                if new:
                    yield new

    def stop(self, submission_id: str, timeout_s: float = STOP_TIMEOUT_S) -> "Job":
        """Ask a job to end, as SIGTERM does, and wait until it has.

        Raises:
            ClusterError: if it has not after `timeout_s`.
        """
        with _answered(self.url):
            self._client.stop_job(submission_id)
        deadline = time.monotonic() + timeout_s
        while not (job := self.look(submission_id)).has_ended:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"Job {submission_id} was asked to end {format_seconds(timeout_s)} ago and has not. Look again with `raytune "
                    f"status {submission_id}`; Ray kills it {STOP_WAIT_S} s after it was asked, unless its node is gone."
                )
            time.sleep(_POLL_S)
        return job


def _url(target: str) -> str:
    """Address of the dashboard of a target."""
    if target.startswith(("http://", "https://")):
        return target
    address = "auto" if target == LOCAL else target
    try:
        with _no_other_address():
            url = ray_address_to_api_server_url(address)
    except Exception as error:  # Ray raises what it likes here: ConnectionError, ValueError, RpcError
        where = "on this machine" if target == LOCAL else f"at {target}"
        raise ClusterError(
            f"No Ray cluster with a dashboard was found {where} ({type(error).__name__}: {str(error).splitlines()[0]}). Start "
            f"one (`ray start --head`), or name the dashboard of another: --target http://127.0.0.1:8265. To train on this "
            f"machine without a cluster: `raytune train`."
        ) from error
    return url.rstrip("/")


@contextmanager
def _no_other_address() -> Iterator[None]:
    """Ray's client prefers these variables to what it is given."""
    before = {name: os.environ.pop(name) for name in ENVIRONMENT if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


@contextmanager
def _answered(url: str) -> Iterator[None]:
    """Say what to do where a dashboard does not answer, or does not know us."""
    try:
        yield
    except AuthenticationError as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"{url} does not let this user in ({first}). Put the cluster's token into ~/.ray/auth_token (mode 600), or name its "
            f"file in RAY_AUTH_TOKEN_PATH, and set RAY_AUTH_MODE=token."
        ) from error
    except (ConnectionError, requests.exceptions.RequestException) as error:
        raise ClusterError(
            f"No dashboard answers at {url} ({type(error).__name__}: {str(error).splitlines()[0]}). Is the cluster up, and the "
            f"tunnel to it open (`ray dashboard CLUSTER.yaml`, `kubectl port-forward service/HEAD-SERVICE 8265`)?"
        ) from error


# --- What --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job as the cluster knows it."""

    id: str
    run: str | None
    """Name of its run; None for a job that plain `ray job submit` started."""
    storage: str | None
    status: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    message: str | None
    error_type: str | None
    entrypoint: str
    started: float | None
    """Seconds since 1970."""
    ended: float | None
    driver_exit_code: int | None

    @property
    def has_ended(self) -> bool:
        return JobStatus(self.status).is_terminal()

    @property
    def exit_code(self) -> int | None:
        """What the same command would have returned here; None while it runs.

        A job that ended without an exit code was lost by the cluster, and can be submitted again.
        """
        if not self.has_ended:
            return None
        if self.status == JobStatus.STOPPED:
            return EXIT_STOPPED
        if self.status == JobStatus.SUCCEEDED:
            return 0
        if self.driver_exit_code:
            # Ended by a signal: as a shell counts it.
            return self.driver_exit_code if self.driver_exit_code > 0 else 128 - self.driver_exit_code
        return EXIT_FAILED if self.error_type in _NOT_TO_BE_REPEATED else EXIT_RETRY_LATER

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "exit_code": self.exit_code}


_NOT_TO_BE_REPEATED = ("RUNTIME_ENV_SETUP_FAILURE", "JOB_ENTRYPOINT_COMMAND_START_ERROR", "JOB_ENTRYPOINT_COMMAND_ERROR")


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run is, read from its folder."""

    state: str
    step: int
    num_steps: int


def progress_of(job: Job) -> Progress | None:
    """How far the run of a job is; None if its folder cannot be seen from here."""
    if job.run is None or job.storage is None:
        return None
    folder = RunFolder(job.storage, job.run)
    try:
        record = RunRecord.read(folder)
        if record is None:
            return None
        step = History.read(folder.metrics).last_step
        return Progress(state=record.state, step=step, num_steps=read_plan(folder).optimization.num_steps)
    except (RaytuneError, OSError, ImportError):  # another raytune's, a storage out of reach or without its package: not seen
        return None


def entrypoint_place(nodes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Where a job's own process runs: off a head that has no CPUs, because it is small and its loss should not end the run.

    Args:
        nodes: living ones, as Ray's state API lists them.

    Returns:
        Arguments of Ray's `submit_job`. A label costs no CPU that a worker may need; where no other node is there yet, a sliver
        of a CPU makes the autoscaler bring one.
    """
    heads = [node for node in nodes if node.get("is_head_node")]
    if not heads or any(node["resources_total"].get("CPU", 0) > 0 for node in heads):
        return {}
    if any(node["resources_total"].get("CPU", 0) > 0 for node in nodes):
        return {"entrypoint_label_selector": {"ray.io/node-id": f"!{heads[0]['node_id']}"}}
    return {"entrypoint_num_cpus": _PUSH_CPUS}


def submit(
    jobs: Jobs, verb: str, files: Sequence[str], overrides: Sequence[str], *, working_dir: Path, name: str | None
) -> tuple[Job, list[str]]:
    """Check a config here, and start it as a job.

    Args:
        files, overrides: as `raytune train` takes them.
        working_dir: what the job takes along.
        name: of the job; by default the run's, and something random.

    Returns:
        The job, and what to say of the files: what was left out and why, and which are large.

    Raises:
        UserError: before anything is sent, if the config or the folder does not allow it.
    """
    config = load_config(files, overrides)
    if verb == "train":
        as_one_run(config)
    if is_local(config.storage) and not config.storage.startswith(("/", "~", "file:///")):
        raise UserError(
            f"storage is {config.storage!r}, relative to a working directory that ends with the job. Name a folder that every "
            f"node sees, or a bucket: storage=/shared/runs, storage=s3://bucket/runs."
        )
    inside = [path_in_job(working_dir, file) for file in files]
    packed = contents(working_dir, named_by(config))
    missing = [file for file in inside if file not in packed.files]
    if missing:
        raise UserError(
            f"{', '.join(missing)} would not be sent with the job: it is ignored by .gitignore or .rayignore, or looks like a "
            f"secret or a run. Rename or move it."
        )
    submission_id = name or f"{config.name}-{secrets.token_hex(3)}"
    with tempfile.TemporaryDirectory(prefix="raytune-") as folder:
        package = Path(folder) / "working_dir.zip"
        pack(packed, package)
        jobs.submit(
            entrypoint=shlex.join([*packed.command, verb, *inside, *overrides]),
            package=package,
            submission_id=submission_id,
            metadata={"raytune": raytune.__version__, "run": config.name, "storage": config.storage, "verb": verb},
        )
    return jobs.look(submission_id), packed.notes


def _job(details: JobDetails) -> Job:
    metadata = details.metadata or {}
    return Job(
        id=str(details.submission_id),
        run=metadata.get("run"),
        storage=metadata.get("storage"),
        status=JobStatus(details.status).value,
        message=details.message,
        error_type=details.error_type,
        entrypoint=details.entrypoint,
        started=details.start_time / 1000 if details.start_time else None,
        ended=details.end_time / 1000 if details.end_time else None,
        driver_exit_code=details.driver_exit_code,
    )


def _is_ours(details: JobDetails) -> bool:
    words = details.entrypoint.split()
    return "raytune" in (details.metadata or {}) or any(
        word.endswith("launch.py") or word in ("raytune", "raytune.cli") for word in words
    )


def meant(jobs: Sequence[Job], name: str | None) -> Job | None:
    """The job of that name; of the run of that name the one that has not ended, else the newest; without a name alike, of all.

    Args:
        jobs: the newest first.
    """
    named = [job for job in jobs if name is not None and name == job.id]
    of_run = named or [job for job in jobs if name is None or name == job.run]
    return next((job for job in of_run if not job.has_ended), next(iter(of_run), None))


def status_text(jobs: Sequence[Job], now: float) -> str:
    """One line per job: name, status, age, run, and how far the run is where its folder can be seen."""
    if not jobs:
        return "no jobs of raytune"
    rows = [("job", "status", "since", "run", "step")]
    for job in jobs:
        progress = progress_of(job)
        step = f"{progress.step}/{progress.num_steps} ({progress.state})" if progress else "-"
        since = format_seconds(max(0.0, (job.ended or now) - job.started)) if job.started else "-"
        code = f" ({job.exit_code})" if job.exit_code not in (None, 0) else ""
        rows.append((job.id, job.status.lower() + code, since, job.run or "-", step))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def last_lines(text: str, num_lines: int | None) -> str:
    """The end of a log; all of it for None."""
    if num_lines is None:
        return text
    lines = text.splitlines(keepends=True)
    return "".join(lines[len(lines) - min(num_lines, len(lines)) :])
