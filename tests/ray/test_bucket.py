"""A run and a sweep whose storage is an object store, through Ray."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raytune import storage
from tests.s3_stand_in import bucket

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
CONFIG: dict[str, Any] = {
    "model": {"base": "demo"},
    "data": {
        "train": {"path": "demo:train", "max_rows": 20},
        "validation": {"path": "demo:validation", "max_rows": 4},
        "max_length": 256,
    },
    "adapter": {"method": "lora", "rank": 4, "alpha": 8},
    "training": {"max_steps": 3, "global_batch_size": 2, "learning_rate": 2e-3},
    "cluster": {"workers": 1},
}


@pytest.fixture
def folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="rb", dir="/tmp"))  # a short name: Ray's sockets lie below it
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def s3() -> Iterator[str]:
    with bucket() as url:
        yield url


def told(folder: Path, verb: str, config: dict[str, Any]) -> dict[str, Any]:
    (folder / "run.yaml").write_text(json.dumps(config))
    environment = os.environ | {"RAY_TMPDIR": str(folder), "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, str(ROOT / "launch.py"), verb, "run.yaml", "--json"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_run_and_a_sweep_in_a_bucket_are_those_on_a_disk(folder: Path, s3: str) -> None:
    losses = {}
    for place in (str(folder / "runs"), s3):
        config = CONFIG | {"storage": place, "data": CONFIG["data"] | {"store": str(folder / "store")}}
        losses[place] = told(folder, "train", config | {"name": "run"})["metrics"]["validation/loss"]
    assert len({*losses.values()}) == 1
    assert {"result.json", "metrics.jsonl", "report.html"} < {*storage.list_folder(f"{s3}/run")}
    assert "attempt-1/.validate_storage_marker" in storage.file_sizes(f"{s3}/run/ray")

    space = {"trials": 2, "space": {"training.learning_rate": {"grid": [2e-3, 1e-4]}}, "stopping": {"method": "none"}}
    told(folder, "sweep", config | {"name": "two", "sweep": space})
    assert all(storage.exists(f"{s3}/two/trials/trial-00{number}/result.json") for number in range(2))
    assert storage.exists(f"{s3}/two/report.html")
