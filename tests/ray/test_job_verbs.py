"""`raytune submit`, `status`, `logs`, `stop` as a user types them, against a real cluster."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from ray.cluster_utils import Cluster
from ray.job_submission import JobSubmissionClient

from raytune.cli import cli

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
CANARY = "canary-b7e1f0c2"
CONFIG = """
storage: {storage}
name: {name}
model: {{base: demo}}
data: {{train: {{path: "demo:train", max_rows: 40}}, validation: {{path: "demo:validation", max_rows: 8}}, max_length: 512}}
training: {{max_steps: {steps}, warmup_steps: 0, global_batch_size: 2}}
checkpoint: {{every_steps: 5}}
cluster: {{workers: 1}}
"""


def dashboard(cluster: Cluster) -> str:
    assert cluster.head_node is not None
    return f"http://{cluster.head_node.webui_url}"


def command(cluster: Cluster, verb: str, *arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "launch.py"), verb, *arguments, "--target", dashboard(cluster)]


def raytune(cluster: Cluster, verb: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(cluster, verb, *arguments), capture_output=True, text=True, timeout=300, check=False, cwd=cwd, env=environment()
    )


def told(cluster: Cluster, verb: str, *arguments: str) -> Result:
    """What a verb says that only asks the cluster: in this process, since most of such a command is its imports."""
    return CliRunner().invoke(cli, [verb, *arguments, "--target", dashboard(cluster)], catch_exceptions=False)


def environment() -> dict[str, str]:
    # What a job runs must come with it: its processes are children of a raylet that knows no PYTHONPATH of ours.
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_TOKEN": f"hf_{CANARY}", "WANDB_API_KEY": CANARY}


def project(folder: Path, name: str, steps: int) -> Path:
    """A folder with a config, secrets, an old run, and nothing of raytune."""
    folder.mkdir()
    (folder / "run.yaml").write_text(CONFIG.format(storage=folder / "shared", name=name, steps=steps))
    for file in (".env", ".envrc", "diary.txt"):
        (folder / file).write_text(f"TOKEN={CANARY}")
    (folder / "train.log").write_text(f"login at https://me:{CANARY}@" + "host")
    (folder / "fetch.py").write_text(f"TOKEN = 'hf_{CANARY.replace('-', 'x') * 2}'  # {CANARY}")
    (folder / "link.py").symlink_to(folder / ".env")
    (folder / "old").mkdir()
    for file in ("run.json", "plan.json", "weights.bin"):
        (folder / "old" / file).write_text(f"{CANARY}-run")
    return folder


def wait_for_file(path: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.5)


def one_status(cluster: Cluster, name: str) -> dict[str, Any]:
    done = told(cluster, "status", name, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)["jobs"][0]


@pytest.fixture(scope="module")
def submitted(one_node: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A finished job of a folder that holds a config and no code."""
    folder = project(tmp_path_factory.mktemp("projects") / "a", "first", steps=2)
    return raytune(one_node, "submit", "run.yaml", "training.seed=7", "--name", "first-job", cwd=folder), folder


def test_a_submitted_run_trains_and_brings_its_output_and_exit_code_back(
    submitted: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    done, folder = submitted
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 2/2" in done.stdout
    assert "left out: .env (its name is that of a secret)" in done.stderr
    assert "job first-job succeeded, exit code 0" in done.stderr
    record = json.loads((folder / "shared" / "first" / "run.json").read_text())
    assert (record["state"], record["config"]["training"]["seed"]) == ("finished", 7)


def test_status_shows_the_job_with_the_step_of_its_run(
    one_node: Cluster, submitted: tuple[subprocess.CompletedProcess[str], Path]
) -> None:
    job = one_status(one_node, "first-job")
    assert (job["status"], job["exit_code"], job["run"]) == ("SUCCEEDED", 0, "first")
    assert job["progress"] == {"state": "finished", "step": 2, "num_steps": 2}
    assert one_status(one_node, "first")["id"] == "first-job"  # by the run's name
    assert "2/2 (finished)" in told(one_node, "status").stdout


def test_logs_are_those_that_were_followed(one_node: Cluster, submitted: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, _ = submitted
    whole = raytune(one_node, "logs", "first-job")
    assert whole.stdout == done.stdout
    assert told(one_node, "logs", "first", "--tail", "2").stdout.splitlines() == whole.stdout.splitlines()[-2:]
    followed = told(one_node, "logs", "first-job", "--follow", "--tail", "1")
    assert (followed.exit_code, followed.stdout.splitlines()) == (0, whole.stdout.splitlines()[-1:])
    assert json.loads(told(one_node, "logs", "first-job", "--json").stdout)["logs"] == whole.stdout


def test_no_secret_and_no_old_run_reaches_the_cluster(
    one_node: Cluster, submitted: tuple[subprocess.CompletedProcess[str], Path]
) -> None:
    session = Path(os.environ["RAY_TMPDIR"])
    unpacked = [path for path in session.rglob("run.yaml") if "working_dir_files" in str(path)]
    assert unpacked, "the job's files are looked at"
    holders = [path for path in session.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]
    assert holders == []
    assert CANARY not in str(JobSubmissionClient(dashboard(one_node)).list_jobs())


def test_a_job_name_is_taken_once(one_node: Cluster, submitted: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    again = raytune(one_node, "submit", "run.yaml", "--name", "first-job", cwd=submitted[1])
    assert (again.returncode, "There is a job first-job" in again.stderr) == (2, True)


@pytest.mark.slow  # often by the name with a command in it, below
@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("data.train.path=/no/such/rows.jsonl", 2, "no/such/rows.jsonl"),
        ("cluster.cpus_per_worker=64", 10, "can hold a worker"),
    ],
)
def test_the_exit_code_of_the_command_is_kept(one_node: Cluster, tmp_path: Path, override: str, code: int, message: str) -> None:
    folder = project(tmp_path / "b", "refused", steps=1)
    done = raytune(one_node, "submit", "run.yaml", override, "--json", cwd=folder)
    assert done.returncode == code, done.stdout + done.stderr
    job = json.loads(done.stdout)
    assert (job["status"], job["exit_code"]) == ("FAILED", code)
    assert message in done.stderr, "the output goes to standard error where standard output is JSON"


def test_a_name_with_a_command_in_it_is_a_name(one_node: Cluster, tmp_path: Path) -> None:
    folder = project(tmp_path / "c", "quoted", steps=1)
    touched = tmp_path / "touched"
    done = raytune(one_node, "submit", "run.yaml", f"data.train.path=/no/$(touch {touched});x", cwd=folder)
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"/no/$(touch {touched});x" in done.stdout
    assert not touched.exists()


def test_ctrl_c_leaves_the_job_and_stop_ends_it_in_order(one_node: Cluster, tmp_path: Path) -> None:
    folder = project(tmp_path / "d", "long", steps=5000)
    following = subprocess.Popen(
        command(one_node, "submit", "run.yaml", "--name", "long-job"),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # shells have what they run in the background ignore it
    )
    wait_for_file(folder / "shared" / "long" / "metrics.jsonl")
    following.send_signal(signal.SIGINT)
    _, words = following.communicate(timeout=60)
    assert following.returncode == 130, words
    assert "job long-job goes on. Come back: raytune logs long-job --follow --target" in words
    job = one_status(one_node, "long-job")
    assert (job["status"], job["exit_code"]) == ("RUNNING", None)
    stopped = raytune(one_node, "stop", "long-job", "--json")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert json.loads(stopped.stdout)["exit_code"] == 143
    record = json.loads((folder / "shared" / "long" / "run.json").read_text())
    assert record["state"] == "interrupted", "the run wrote its end itself"
    assert told(one_node, "stop", "long-job").exit_code == 0  # it has ended already
