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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import requests
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.dashboard.utils import ray_address_to_api_server_url
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

import raytune
from raytune.clusters.dashboard import refuse_what_is_no_dashboard
from raytune.clusters.job import Job, progress_of
from raytune.clusters.submission import Submission
from raytune.clusters.working_dir import contents, named_by, pack, path_in_job
from raytune.config.load import as_one_run, load_config
from raytune.errors import ClusterError, UserError
from raytune.printable import first_line
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
PENDING_LIMIT_S = 900.0
"""How long Ray lets a job wait for a node (RAY_JOB_START_TIMEOUT_SECONDS of the head)."""

_PUSH_CPUS = 0.01
_POLL_S = 1.0
_SAY_EVERY_S = 30.0
"""Longest wait without a word while a job writes nothing."""
_START_WAIT_S = 60.0
_PATIENCE_S = 120.0
"""Longest silence of a dashboard while logs are followed."""

_BROKEN = (ClusterError, RuntimeError, OSError, aiohttp.ClientError)
"""What Ray's client raises where a dashboard, or the node that a job runs on, does not answer."""

_log = logging.getLogger(__name__)


# --- Where -------------------------------------------------------------------------------------------------------------------


def named_target(target: str | None, environ: Mapping[str, str]) -> str:
    """The target that an option or the environment names: `local`, a URL, or a Ray address from the environment.

    Raises:
        UserError: if the option is neither.
    """
    if target is None or target == "auto":
        return next((environ[name] for name in ENVIRONMENT if environ.get(name)), LOCAL)
    if target == LOCAL or (target.startswith(("http://", "https://")) and urlsplit(target).hostname):
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
        refuse_what_is_no_dashboard(self.url)
        with _answered(self.url), _no_other_address():
            self._client = JobSubmissionClient(self.url)

    def submit(
        self,
        entrypoint: str,
        package: Path,
        submission_id: str,
        metadata: dict[str, str],
        runtime_env: Mapping[str, Any] | None = None,
    ) -> None:
        """Start a job.

        Args:
            entrypoint: a shell command.
            package: the zip that becomes its working directory.
            runtime_env: more of what Ray is to prepare, as `job_environment.runtime_environment` returns it.

        Raises:
            UserError: if there is a job of that name.
        """
        given = dict(runtime_env or {})
        # Everybody who reaches the dashboard reads these: nothing secret belongs here.
        given["env_vars"] = {**given.get("env_vars", {}), "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}
        deadline = time.monotonic() + _START_WAIT_S
        while True:
            try:
                with _answered(self.url):
                    self._client.submit_job(
                        entrypoint=entrypoint,
                        submission_id=submission_id,
                        runtime_env={**given, "working_dir": str(package)},
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

    def start(self, submission: Submission, name: str | None = None) -> Job:
        """Start what was prepared, under its own name or another.

        Raises:
            UserError: if there is a job of that name.
        """
        name = name or submission.id
        self.submit(submission.entrypoint, submission.package, name, dict(submission.metadata), submission.runtime_env)
        return self.look(name)

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
        """Everything that a job has written so far.

        Raises:
            ClusterError: if it cannot be read.
        """
        try:
            with _answered(self.url):
                return self._client.get_job_logs(submission_id)
        except RuntimeError as error:  # Ray's for every answer that is none
            raise ClusterError(
                f"What job {submission_id} has written cannot be read ({_in_a_line(error)}): the node that it ran on may be "
                f"gone, and its log with it. `raytune status {submission_id}` says how it ended; the run's folder has its "
                f"metrics."
            ) from error

    def follow(
        self,
        submission_id: str,
        write: Callable[[str], None],
        tail: int | None = None,
        say: Callable[[str], None] = _log.warning,
    ) -> Job:
        """Hand on what a job writes until it ends. A connection that breaks is made again, and nothing is written twice.

        How the job ended is asked of the cluster, whatever became of the output.

        Args:
            tail: how many of the lines that are there already; None: all.
            say: takes a line now and then about what is waited for.

        Raises:
            ClusterError: if the dashboard stays silent.
        """
        now = time.monotonic()
        seen, silent_since, said = 0, None, now
        if tail is not None:
            with suppress(ClusterError):  # the loop says so if it stays like that
                so_far = self.logs(submission_id)
                seen = len(so_far)
                write(last_lines(so_far, tail))
        while True:
            trouble: Exception | None = None
            try:
                for piece in self._tail(submission_id, seen):
                    if not piece:
                        break
                    seen, silent_since, said = seen + len(piece), None, time.monotonic()
                    write(piece)
            except _BROKEN as error:
                trouble = error
            try:
                job = self.look(submission_id)
            except _BROKEN as error:
                now = time.monotonic()
                silent_since = silent_since or now
                if now - silent_since > _PATIENCE_S:
                    raise ClusterError(
                        f"{self.url} has not answered for {format_seconds(_PATIENCE_S)} ({error}). Job {submission_id} may go on "
                        f"without it: `raytune logs {submission_id} --follow` when it is back."
                    ) from error
            else:
                silent_since = None
                if job.has_ended:
                    self._write_rest(submission_id, seen, write, say)
                    return job
                if time.monotonic() - said >= _SAY_EVERY_S:
                    said = time.monotonic()
                    say(_waiting(job, trouble))
            time.sleep(_POLL_S)

    def _write_rest(self, submission_id: str, seen: int, write: Callable[[str], None], say: Callable[[str], None]) -> None:
        """What came between the last piece and the end."""
        try:
            write(self.logs(submission_id)[seen:])
        except _BROKEN as error:
            say(f"the end of what job {submission_id} has written is missing here ({_in_a_line(error)})")

    def _tail(self, submission_id: str, seen: int) -> Iterator[str]:
        """Pieces of a job's output from character `seen` on, until the connection ends; an empty one when it has been quiet."""
        pieces = self._client.tail_job_logs(submission_id)
        to_skip = seen

        async def next_piece() -> str | None:
            return await anext(pieces, None)

        async def following() -> str | None:
            """A job that waits for a node keeps the connection open and sends nothing."""
            task = asyncio.ensure_future(next_piece())
            done, _ = await asyncio.wait({task}, timeout=_SAY_EVERY_S)
            return task.result() if done else ""

        with asyncio.Runner() as runner:
            while (piece := runner.run(following())) is not None:
                new, to_skip = piece[to_skip:], max(0, to_skip - len(piece))
                if new or not piece:
                    yield new
                if not piece:
                    return

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


def _waiting(job: Job, trouble: Exception | None) -> str:
    """A line about a job that has written nothing for a while."""
    since = format_seconds(max(0.0, time.time() - job.started)) if job.started else "a moment"
    if job.status == JobStatus.PENDING:
        why = f": {_in_a_line(job.message)}" if job.message else ""
        return f"job {job.id} waits for a node to run on, {since} so far, limit {format_seconds(PENDING_LIMIT_S)}{why}"
    unread = f"; its output cannot be read ({_in_a_line(trouble)})" if trouble else ""
    return f"job {job.id} is {job.status.lower()}, {since} so far{unread}"


def _in_a_line(text: object) -> str:
    """What Ray says, without the traceback of its own processes."""
    return " ".join(str(text).partition("Traceback")[0].split()).rstrip(": ")[:300]


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
            f"No Ray cluster with a dashboard was found {where} ({type(error).__name__}: {first_line(error)}). Start "
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
        first = first_line(error)
        raise UserError(
            f"{url} does not let this user in ({first}). Put the cluster's token into ~/.ray/auth_token (mode 600), or name its "
            f"file in RAY_AUTH_TOKEN_PATH, and set RAY_AUTH_MODE=token."
        ) from error
    except (ConnectionError, requests.exceptions.RequestException) as error:
        raise ClusterError(
            f"No dashboard answers at {url} ({type(error).__name__}: {first_line(error)}). Is the cluster up, and the "
            f"tunnel to it open (`ray dashboard CLUSTER.yaml`, `kubectl port-forward service/HEAD-SERVICE 8265`)?"
        ) from error


# --- What --------------------------------------------------------------------------------------------------------------------


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
    jobs: Jobs,
    verb: str,
    files: Sequence[str],
    overrides: Sequence[str],
    *,
    working_dir: Path,
    name: str | None,
    runtime_env: Mapping[str, Any] | None = None,
) -> tuple[Job, Submission]:
    """Check a config here, and start it as a job.

    Args:
        files, overrides: as `raytune train` takes them.
        working_dir: what the job takes along.
        name: of the job; by default the run's, and something random.
        runtime_env: as for `Jobs.submit`.

    Returns:
        The job, and what it was started from, to be closed; its notes are to be said.

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
    submission = Submission(
        id=name or f"{config.name}-{secrets.token_hex(3)}",
        entrypoint=shlex.join([*packed.command, verb, *inside, *overrides]),
        metadata={"raytune": raytune.__version__, "run": config.name, "storage": config.storage, "verb": verb},
        runtime_env=dict(runtime_env or {}),
        notes=tuple(packed.notes),
        folder=tempfile.TemporaryDirectory(prefix="raytune-"),
    )
    try:
        pack(packed, submission.package)
        return jobs.start(submission), submission
    except BaseException:
        submission.close()
        raise


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
        verb=metadata.get("verb"),
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
        step = str(progress) if progress else "-"
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
