"""`train --folds`: a run per fold on one cluster, what they come to together, and how the same command goes on."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytune.storage import read_json
from tests.ray.forking import forking_environment

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
RUN = {
    "name": "crossed",
    "model": {"base": "demo"},
    "data": {"train": {"path": "demo:train", "max_rows": 24}, "max_length": 256, "packing": "none", "test_fraction": 0.2},
    "training": {"max_steps": 2, "global_batch_size": 2},
    "checkpoint": {"keep_best": 0, "keep_last": 1},
}


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a short name, as Ray's sockets want it."""
    path = Path(tempfile.mkdtemp(prefix="rf", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def trained(folder: Path) -> dict[str, Any]:
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN))
    environment = forking_environment(os.environ | {"RAY_TMPDIR": str(folder), "RAY_AUTH_MODE": "disabled"})
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, str(ROOT / "launch.py"), "train", "run.yaml", "--folds", "3", "--json", f"storage={folder}/runs"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_each_fold_is_a_run_and_one_that_has_finished_is_read(folder: Path) -> None:
    first = trained(folder)
    place = folder / "runs/crossed"
    assert sorted(path.name for path in place.iterdir()) == ["fold-0", "fold-1", "fold-2", "folds.json"]
    assert (folder / "runs/stores").is_dir(), "stores lie beside all runs"
    reports = [fold["data_report"] for fold in first["folds"]]
    held_out = [report["validation"]["validation"]["sources"][0]["used"] for report in reports]
    tested = {report["test"]["test"]["sources"][0]["used"] for report in reports}
    assert len(tested) == 1, "the test is the same in all folds"
    assert sum(held_out) + tested.pop() == 24
    for name, spread in first["metrics"].items():
        values = [read_json(str(place / f"fold-{index}/result.json"))["metrics"][name] for index in range(3)]
        assert spread["values"] == values
        assert spread["mean"] == pytest.approx(statistics.fmean(values), rel=1e-12)
        assert spread["standard_deviation"] == pytest.approx(statistics.stdev(values), rel=1e-9)
    assert {"validation/loss", "test/loss"} <= first["metrics"].keys()
    assert read_json(str(place / "folds.json"))["metrics"] == first["metrics"]

    shutil.rmtree(place / "fold-1")
    (place / "folds.json").unlink()
    again = trained(folder)
    assert [fold["finished_before"] for fold in again["folds"]] == [True, False, True]
    assert again["metrics"] == first["metrics"]
