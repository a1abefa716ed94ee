"""`find-rate` on the workers of a cluster: what it leaves, what it leaves alone, and that two workers find what one does."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from raytune.config.load import load_config
from raytune.launch.cluster.host import this_machine
from raytune.launch.data.prepare import prepare
from raytune.launch.rates.find_rate import range_test_plan
from raytune.plan.rates.rate_advice import advise_rate
from raytune.plan.rates.rate_range import RateRange
from raytune.run_folder import RunFolder
from raytune.storage import read_json
from raytune.training.start.start import Worker
from raytune.training.tasks import perform
from tests.ray.forking import forking_environment

pytestmark = [pytest.mark.ray, pytest.mark.timeout(500)]

ROOT = Path(__file__).parents[2]
RUN = {
    "name": "probe",
    "model": {"base": "demo"},
    "data": {"train": {"path": "demo:train", "max_rows": 16}, "max_length": 128, "too_long": "truncate", "limits": {"cut": 1}},
    "training": {"global_batch_size": 2, "learning_rate": 3e-3},
    "cluster": {"workers": 2},
}
TRIED = RateRange(low=1e-4, high=1.0, num_steps=20)
ITS_OWN = {"run.json": "somebody's", "model/adapter_model.safetensors": "weights", "metrics.jsonl": "{}\n"}


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a short name, as Ray's sockets want it."""
    path = Path(tempfile.mkdtemp(prefix="rr", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.mark.slow
def test_two_workers_leave_the_curve_of_one_a_page_and_the_run_as_it_was(folder: Path) -> None:
    storage, file = folder / "runs", folder / "run.yaml"
    file.write_text(yaml.safe_dump(RUN))
    for name, text in ITS_OWN.items():
        (storage / "probe" / name).parent.mkdir(parents=True, exist_ok=True)
        (storage / "probe" / name).write_text(text)
    alone = losses_of_one_worker(file, folder)

    options = ["--low", "1e-4", "--high", "1", "--steps", "20", "--apply", "--json", f"storage={storage}"]
    environment = forking_environment(os.environ | {"RAY_TMPDIR": str(folder), "RAY_AUTH_MODE": "disabled"})
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, str(ROOT / "launch.py"), "find-rate", str(file), *options]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)

    place = storage / "rates/probe"
    assert (found["folder"], found["report"]) == (str(place), str(place / "report.html"))
    assert sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()) == [
        "figures/rate_curve.png", "rates.jsonl", "report.html", "result.json",
    ]  # fmt: skip
    assert (place / "figures/rate_curve.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert "Loss over learning rates" in (place / "report.html").read_text()
    lines = [json.loads(line) for line in (place / "rates.jsonl").read_text().splitlines()]
    # fp32 sums in another order, whose difference an ever higher rate blows up: to the lowest loss, as far as rates may go.
    until = next(step for step, line in enumerate(lines) if line["learning_rate"] > 0.03)
    assert [line["loss"] for line in lines[:until]] == pytest.approx(alone[:until], rel=1e-3)
    assert found["suggestion"] == advise_rate(alone, TRIED).steepest

    assert {name: (storage / "probe" / name).read_text() for name in ITS_OWN} == ITS_OWN
    assert sorted(path.name for path in (storage / "probe").iterdir()) == ["metrics.jsonl", "model", "run.json"]
    assert [path.name for path in (storage / "rates").iterdir()] == ["probe"], "what the workers wrote is gone"
    assert found["suggestion"] is not None
    assert found["applied"]["after"] == load_config([str(file)]).training.learning_rate == found["suggestion"]


def losses_of_one_worker(file: Path, folder: Path) -> list[float]:
    """In this process, without Ray."""
    config = load_config([str(file)], ["cluster.workers=1", f"storage={folder / 'alone'}"])
    plan = range_test_plan(prepare(config, this_machine(config.cluster), map).plan, TRIED)
    worker = Worker(rank=0, world_size=1, device_index=0, attempt=1, report=lambda metrics: None)
    perform("find_rate", plan, worker, {"range": TRIED.model_dump()})
    return [float(loss) for loss in read_json(RunFolder(plan.storage, plan.name).tried_losses)["losses"]]
