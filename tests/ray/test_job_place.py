"""Where a job's own process runs. In a file of its own: two Ray clusters on one machine get in each other's way."""

import re
from pathlib import Path

import pytest
from ray.job_submission import JobSubmissionClient

from tests.ray.conftest import running_cluster
from tests.ray.test_job_verbs import dashboard, project, raytune

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


@pytest.mark.slow
def test_a_job_runs_off_a_head_without_cpus(tmp_path: Path) -> None:
    folder = project(tmp_path / "e", "off-head", steps=1)
    with running_cluster(cpus_of_nodes=[0, 2]) as cluster:
        done = raytune(cluster, "submit", "run.yaml", "data.train.path=/no/rows.jsonl", "--name", "off", cwd=folder)
        # How it fails is another test's claim: two raylets of one machine unpack a job's files over each other, of which a job
        # may lose the process that looks after it, and is submitted again.
        assert re.search(r"job off(-\d)? failed", done.stderr), done.stdout + done.stderr
        assert cluster.head_node is not None
        details = JobSubmissionClient(dashboard(cluster)).get_job_info("off")
        assert details.driver_node_id is not None
        assert details.driver_node_id != cluster.head_node.node_id
