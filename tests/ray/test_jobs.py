"""`ray job submit`: logs and exit code come back, for a run that works and for one that cannot."""

import subprocess
import sys
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]


def submit(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Submit this checkout's launch.py, as a user would, and wait for the job."""
    assert cluster.head_node is not None
    dashboard = f"http://{cluster.head_node.webui_url}"
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", dashboard, "--working-dir", str(ROOT)]
    return subprocess.run(
        [*command, "--", "python", "launch.py", *arguments],
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
    )


@pytest.mark.slow  # often by `raytune submit`, which submits the same way: test_job_verbs
def test_a_submitted_run_trains_on_the_cluster_and_brings_its_logs_back(one_node: Cluster, tmp_path: Path) -> None:
    done = submit(
        one_node,
        "train",
        "configs/recipes/quickstart.yaml",
        f"storage={tmp_path}",
        "training.max_steps=2",
        "training.warmup_steps=0",
        "data.train.0.max_rows=40",
        "data.validation.0.max_rows=8",
        "evaluation.generation=null",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 2/2" in done.stdout
    assert str(tmp_path / "quickstart" / "model") in done.stdout
    assert (tmp_path / "quickstart" / "model" / "adapter_model.safetensors").exists()


def test_a_submitted_run_that_is_refused_fails_its_job_with_the_message(one_node: Cluster, tmp_path: Path) -> None:
    done = submit(one_node, "train", "configs/recipes/quickstart.yaml", f"storage={tmp_path}", "training.lr=1")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "training.learning_rate" in done.stdout
