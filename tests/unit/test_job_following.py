"""Following a job: its state counts, whatever becomes of its output; the run of a lost driver is sent again, with a limit."""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from raytune.clusters.jobs import Jobs
from raytune.clusters.resubmission import follow_to_the_end
from raytune.clusters.submission import prepare_submission
from raytune.config.load import load_config
from raytune.errors import ClusterError

LOST = {"status": "FAILED", "error_type": "JOB_SUPERVISOR_ACTOR_DIED", "message": "Job supervisor actor died"}
DONE = {"status": "SUCCEEDED", "driver_exit_code": 0}
REFUSED = {"status": "FAILED", "driver_exit_code": 2, "error_type": "JOB_ENTRYPOINT_COMMAND_ERROR"}
HELD = {"status": "FAILED", "driver_exit_code": 10, "error_type": "JOB_ENTRYPOINT_COMMAND_ERROR"}
STOPPED = {"status": "STOPPED"}


@dataclass
class Dashboard:
    """A dashboard whose jobs end as they are told to, and whose logs cannot be read."""

    url: str = ""
    ends: list[dict[str, Any]] = field(default_factory=list)
    """Of the jobs, in the order in which they are submitted."""
    submitted: list[dict[str, Any]] = field(default_factory=list)


@pytest.fixture
def dashboard() -> Iterator[Dashboard]:
    told = Dashboard()

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/api/version":
                return self._answer(200, {"version": "4", "ray_version": "2.60.0", "ray_commit": "x", "session_name": "s"})
            if self.path.startswith("/api/packages/"):
                return self._answer(404, {})
            names = [job["submission_id"] for job in told.submitted]
            name = self.path.removeprefix("/api/jobs/")
            if name in names:
                job = told.submitted[names.index(name)]
                facts = {"type": "SUBMISSION", "submission_id": name, "entrypoint": job["entrypoint"]}
                return self._answer(200, {**facts, "metadata": job["metadata"], **told.ends[names.index(name)]})
            return self._answer(500, {"detail": "the node of the job is gone"})

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._answer(200, {})

        def do_POST(self) -> None:
            told.submitted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self._answer(200, {"job_id": "", "submission_id": told.submitted[-1]["submission_id"]})

        def _answer(self, status: int, body: dict[str, Any]) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    told.url = f"http://127.0.0.1:{server.server_port}"
    yield told
    server.shutdown()


def followed(dashboard: Dashboard, folder: Path, **limits: Any) -> tuple[str, int | None, list[str]]:
    """Submit a run and follow it: name and exit code of its last job, and what was said."""
    (folder / "run.yaml").write_text("storage: /shared\nname: demo\n")
    said: list[str] = []
    jobs = Jobs(dashboard.url)
    files = [str(folder / "run.yaml")]
    with prepare_submission(load_config(files, []), "train", files, [], working_dir=folder, name="demo-job") as submission:
        job = jobs.start(submission)
        job = follow_to_the_end(jobs, job, submission, lambda text: None, said.append, pause_s=0.0, **limits)
    assert not submission.package.exists()
    return job.id, job.exit_code, said


@pytest.mark.parametrize(("end", "code"), [(DONE, 0), (REFUSED, 2), (STOPPED, 143)])
def test_a_job_whose_output_cannot_be_read_ends_as_the_cluster_says(
    dashboard: Dashboard, tmp_path: Path, end: dict[str, Any], code: int
) -> None:
    dashboard.ends = [end]
    name, found, said = followed(dashboard, tmp_path)
    assert (name, found) == ("demo-job", code)
    assert "the end of what job demo-job has written is missing" in said[0]
    assert len(dashboard.submitted) == 1


def test_a_run_whose_driver_was_lost_is_submitted_again_as_it_was(dashboard: Dashboard, tmp_path: Path) -> None:
    dashboard.ends = [LOST, DONE]
    name, code, said = followed(dashboard, tmp_path)
    assert (name, code) == ("demo-job-2", 0)
    assert any("job demo-job lost the node of its process (Job supervisor actor died)" in line for line in said)
    first, second = dashboard.submitted
    same = ("entrypoint", "runtime_env", "metadata")
    assert [first[key] for key in same] == [second[key] for key in same]


def test_a_repeated_job_that_comes_while_the_lost_one_still_holds_the_run_is_repeated_too(
    dashboard: Dashboard, tmp_path: Path
) -> None:
    dashboard.ends = [LOST, HELD, DONE]
    assert followed(dashboard, tmp_path)[:2] == ("demo-job-3", 0)


def test_resubmission_has_an_end_and_what_failed_by_itself_is_not_repeated(dashboard: Dashboard, tmp_path: Path) -> None:
    dashboard.ends = [LOST] * 5
    assert followed(dashboard, tmp_path, most=2)[:2] == ("demo-job-3", 10)
    assert len(dashboard.submitted) == 3
    dashboard.submitted.clear()
    dashboard.ends = [HELD]
    assert followed(dashboard, tmp_path)[:2] == ("demo-job", 10)
    assert len(dashboard.submitted) == 1


def test_logs_that_cannot_be_read_are_an_error_that_names_the_way_to_the_state(dashboard: Dashboard) -> None:
    with pytest.raises(ClusterError, match=r"cannot be read .*raytune status demo"):
        Jobs(dashboard.url).logs("demo")
