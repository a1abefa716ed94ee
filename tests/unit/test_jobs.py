"""Claims about jobs that need no cluster: where a job goes, what is refused, and what its end means."""

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner

from raytune.cli import cli
from raytune.clusters.dashboard import named_target, refuse_open
from raytune.clusters.job import Job, meant
from raytune.clusters.job_progress import progress_of, status_text
from raytune.clusters.jobs import Jobs, entrypoint_place, last_lines
from raytune.clusters.submission import Submission, prepare_submission
from raytune.config.load import load_config
from raytune.errors import ClusterError, UserError
from raytune.launch.state.record import RunRecord
from raytune.run_folder import RunFolder

JOB = Job(
    id="demo-1",
    run="demo",
    storage="/nowhere",
    status="SUCCEEDED",
    message=None,
    error_type=None,
    entrypoint="python launch.py train a.yaml",
    started=1000.0,
    ended=1060.0,
    driver_exit_code=0,
)


def test_a_target_is_the_option_or_else_the_environment_or_else_this_machine():
    both = {"RAY_API_SERVER_ADDRESS": "http://a:8265", "RAY_ADDRESS": "b:6379"}
    assert named_target("http://c:1/", both) == "http://c:1"
    assert named_target("local", both) == "local"
    assert named_target(None, both) == named_target("auto", both) == "http://a:8265"
    assert named_target(None, {"RAY_ADDRESS": "b:6379"}) == "b:6379"
    assert named_target(None, {}) == "local"


def test_a_target_without_a_scheme_is_refused_with_what_was_meant():
    with pytest.raises(UserError, match=r"Did you mean http://head:8265\?"):
        named_target("head:8265", {})
    with pytest.raises(UserError, match="neither local"):
        named_target("ray://head:10001", {})


@pytest.mark.parametrize(
    "url", ["http://10.0.0.1:8265", "http://head:8265", "http://127.0.0.1.example.com", "http://0.0.0.0:8265"]
)
def test_an_open_dashboard_over_a_network_is_refused_and_insecure_says_why(url: str):
    with pytest.raises(UserError, match=r"Nothing was sent.*kubectl port-forward.*RAY_AUTH_MODE=token"):
        refuse_open(url, has_token=False, insecure=False)
    why = refuse_open(url, has_token=False, insecure=True)
    assert why is not None
    assert "CVE-2023-48022" in why
    assert refuse_open(url, has_token=True, insecure=False) is None


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8265", "http://127.9.9.9", "http://localhost:1", "http://[::1]:8265", "https://head"]
)
def test_this_machine_and_https_are_not_refused(url: str):
    assert refuse_open(url, has_token=False, insecure=False) is None


def test_the_verbs_refuse_an_open_dashboard_before_they_connect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = tmp_path / "a.yaml"
    config.write_text("storage: /shared\nmodel: {base: demo}\n")
    # As of a user who has no token: everybody has one for whom Ray has started a cluster.
    for name in [name for name in os.environ if name.startswith("RAY_AUTH")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    for words in (["submit", str(config), "--working-dir", str(tmp_path)], ["status"], ["logs"], ["stop", "x"]):
        # TEST-NET: a connection would take its time-out.
        done = CliRunner().invoke(cli, [*words, "--target", "http://192.0.2.99:8265", "--json"])
        facts = json.loads(done.stdout)
        assert (done.exit_code, facts["error"]) == (2, "UserError"), done.output
        assert "Nothing was sent" in facts["message"]


def test_a_runs_name_means_its_job_that_goes_on_before_a_newer_one_that_was_refused():
    refused = replace(JOB, id="demo-2", run="demo", status="FAILED")
    running, older = (
        replace(JOB, id="demo-1", run="demo", status="RUNNING"),
        replace(JOB, id="demo-0", run="demo", status="STOPPED"),
    )
    jobs = [refused, running, older]
    assert meant(jobs, "demo") is running
    assert meant(jobs, None) is running
    assert meant(jobs, "demo-2") is refused
    assert meant([refused, older], "demo") is refused
    assert meant(jobs, "other") is None


HEAD = {"node_id": "h", "is_head_node": True, "resources_total": {"memory": 1e9}}
WORKER = {"node_id": "w", "is_head_node": False, "resources_total": {"CPU": 8.0}}


def test_a_job_is_pushed_off_a_head_that_has_no_cpus():
    assert entrypoint_place([HEAD, WORKER]) == {"entrypoint_label_selector": {"ray.io/node-id": "!h"}}
    assert entrypoint_place([HEAD]) == {"entrypoint_num_cpus": 0.01}  # makes the autoscaler bring a node
    assert entrypoint_place([HEAD | {"resources_total": {"CPU": 2.0}}, WORKER]) == {}
    assert entrypoint_place([]) == {}


@pytest.mark.parametrize(
    ("status", "driver", "error", "code"),
    [
        ("SUCCEEDED", 0, None, 0),
        ("FAILED", 1, "JOB_ENTRYPOINT_COMMAND_ERROR", 1),
        ("FAILED", 2, "JOB_ENTRYPOINT_COMMAND_ERROR", 2),
        ("FAILED", 10, "JOB_ENTRYPOINT_COMMAND_ERROR", 10),
        ("FAILED", -9, "JOB_ENTRYPOINT_COMMAND_ERROR", 137),
        ("FAILED", None, "JOB_SUPERVISOR_ACTOR_DIED", 10),
        ("FAILED", None, "JOB_SUPERVISOR_ACTOR_START_TIMEOUT", 10),
        ("FAILED", None, "RUNTIME_ENV_SETUP_FAILURE", 1),
        ("STOPPED", None, None, 143),
        ("RUNNING", None, None, None),
        ("PENDING", None, None, None),
    ],
)
def test_the_exit_code_of_a_job_is_that_of_the_command(status: str, driver: int | None, error: str | None, code: int | None):
    assert replace(JOB, status=status, driver_exit_code=driver, error_type=error).exit_code == code


def test_the_end_of_a_log_is_its_last_lines():
    assert last_lines("a\nb\nc\n", 2) == "b\nc\n"
    assert last_lines("a\nb", 5) == "a\nb"
    assert last_lines("a\nb", 0) == ""
    assert last_lines("a\nb", None) == "a\nb"


def test_jobs_are_a_table(tmp_path: Path):
    failed = replace(JOB, id="x", run=None, status="FAILED", driver_exit_code=2)
    assert status_text([JOB, failed], now=2000.0).splitlines() == [
        "job     status      since  run   step",
        "demo-1  succeeded   1m00s  demo  -",
        "x       failed (2)  1m00s  -     -",
    ]
    assert status_text([], now=0.0) == "no jobs of raytune"


def test_a_run_that_cannot_be_read_has_no_progress(tmp_path: Path):
    job = replace(JOB, storage=str(tmp_path))
    assert progress_of(job) is None
    assert progress_of(replace(JOB, run=None)) is None
    assert progress_of(replace(JOB, storage="s4://nowhere")) is None
    RunRecord(name="demo", state="running", attempts=1, created=0.0, config={}, versions={}).write(
        RunFolder(str(tmp_path), "demo")
    )
    assert progress_of(job) is None  # it has no plan yet


@pytest.fixture
def guarded() -> Iterator[str]:
    """A dashboard that wants a token, as Ray's answers."""

    class Guard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(401)
            self.end_headers()
            self.wfile.write(b"Unauthorized: Missing authentication token")

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Guard)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_dashboard_that_wants_a_token_is_refused_with_how_to_give_one(guarded: str):
    with pytest.raises(UserError, match=r"does not let this user in \(Authentication required.*RAY_AUTH_TOKEN_PATH"):
        Jobs(guarded)


def test_a_dashboard_that_is_not_there_can_be_tried_again_later(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:2")  # not preferred to the target
    with pytest.raises(ClusterError, match=r"No dashboard answers at http://127\.0\.0\.1:1 ") as error:
        Jobs("http://127.0.0.1:1")
    assert error.value.exit_code == 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {lr: 1}", "training.learning_rate"),
        ("storage: runs", "relative to a working directory that ends with the job"),
        ("", "storage is 'runs'"),
    ],
)
def test_a_config_that_cannot_work_as_a_job_is_refused_before_anything_is_sent(tmp_path: Path, text: str, message: str):
    config = tmp_path / "a.yaml"
    config.write_text(text)
    with pytest.raises(UserError, match=message):
        prepared(config)


def test_a_config_that_would_stay_here_is_refused(tmp_path: Path):
    (tmp_path / "secrets.yaml").write_text("storage: /shared")
    (tmp_path / ".rayignore").write_text("local.yaml")
    (tmp_path / "local.yaml").write_text("storage: /shared")
    for name in ("secrets.yaml", "local.yaml"):
        with pytest.raises(UserError, match=f"{name} would not be sent"):
            prepared(tmp_path / name)


def prepared(config: Path) -> Submission:
    """What a training job of a config would be started from, beside which it lies."""
    files = [str(config)]
    return prepare_submission(load_config(files, []), "train", files, [], working_dir=config.parent, name=None)


def test_a_sweep_is_not_sent_to_be_trained_as_one_run(tmp_path: Path):
    config = tmp_path / "sweep.yaml"
    config.write_text("storage: /shared\ndata: {validation: demo:validation}\nsweep: {space: {adapter.rank: [4, 8]}}\n")
    with pytest.raises(UserError, match="This is a sweep"):
        prepared(config)
