"""Jobs of a cluster that is elsewhere: submit, look, read logs, stop. What `ray job` does, with raytune's exit codes.

A job is `python launch.py train ...` in a working directory of its own on the cluster.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.job_submission import JobStatus, JobSubmissionClient

from raytune.clusters.dashboard import (
    answered,
    dashboard_url,
    named_target,
    no_other_address,
    refuse_open,
    refuse_what_is_no_dashboard,
)
from raytune.clusters.job import Job, is_ours, meant
from raytune.clusters.submission import Submission
from raytune.errors import ClusterError, UserError
from raytune.printable import in_a_line
from raytune.token_file import close_token, token_path
from raytune.units import format_seconds

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
        self.url = dashboard_url(named_target(target, os.environ))
        risk = refuse_open(self.url, has_token=has_token, insecure=insecure)
        if risk:
            _log.warning("%s Going on because of --insecure.", risk)
        refuse_what_is_no_dashboard(self.url)
        with answered(self.url), no_other_address():
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
                with answered(self.url):
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

    def all(self) -> list[Job]:
        """Those of raytune, the newest first."""
        with answered(self.url):
            details = self._client.list_jobs()
        jobs = [Job.of(one) for one in details if one.submission_id and is_ours(one)]
        return sorted(jobs, key=lambda job: job.started or 0.0, reverse=True)

    def find(self, name: str | None) -> Job:
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

    def look(self, submission_id: str) -> Job:
        with answered(self.url):
            return Job.of(self._client.get_job_info(submission_id))

    def logs(self, submission_id: str) -> str:
        """Everything that a job has written so far.

        Raises:
            ClusterError: if it cannot be read.
        """
        try:
            with answered(self.url):
                return self._client.get_job_logs(submission_id)
        except RuntimeError as error:  # Ray's for every answer that is none
            raise ClusterError(
                f"What job {submission_id} has written cannot be read ({_what_ray_says(error)}): the node that it ran on may be "
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
            say(f"the end of what job {submission_id} has written is missing here ({_what_ray_says(error)})")

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

    def stop(self, submission_id: str, timeout_s: float = STOP_TIMEOUT_S) -> Job:
        """Ask a job to end, as SIGTERM does, and wait until it has.

        Raises:
            ClusterError: if it has not after `timeout_s`.
        """
        with answered(self.url):
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
        why = f": {_what_ray_says(job.message)}" if job.message else ""
        return f"job {job.id} waits for a node to run on, {since} so far, limit {format_seconds(PENDING_LIMIT_S)}{why}"
    unread = f"; its output cannot be read ({_what_ray_says(trouble)})" if trouble else ""
    return f"job {job.id} is {job.status.lower()}, {since} so far{unread}"


def _what_ray_says(text: object) -> str:
    """In a line, without the traceback of its own processes."""
    return in_a_line(str(text).partition("Traceback")[0]).rstrip(": ")


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


def last_lines(text: str, num_lines: int | None) -> str:
    """The end of a log; all of it for None."""
    if num_lines is None:
        return text
    lines = text.splitlines(keepends=True)
    return "".join(lines[len(lines) - min(num_lines, len(lines)) :])
