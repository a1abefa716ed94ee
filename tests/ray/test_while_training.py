"""An evaluator on a cluster, beside the worker that trains: killed on the way, that is said once and it begins anew, and the
losses are those of a run that measures nothing."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from raytune import train
from raytune.config.load import config_from
from raytune.launch.cluster.host import this_machine
from raytune.launch.data.prepare import prepare
from raytune.metrics.events import read_events
from raytune.metrics.history import History
from raytune.run_folder import RunFolder
from raytune.training.run import Worker
from raytune.training.run import train as run_here

pytestmark = [pytest.mark.ray, pytest.mark.timeout(500)]

NUM_STEPS = 250


def asked(storage: Path, name: str, cluster: dict[str, Any], while_training: dict[str, Any] | None) -> dict[str, Any]:
    suites = [{"name": "general", "rows": "demo:validation", "kind": "loss", "max_rows": 3}]
    return {
        "name": name,
        "storage": str(storage),
        "data": {"train": {"path": "demo:train", "max_rows": 16}, "max_length": 512},
        "adapter": {"method": "lora", "rank": 4, "alpha": 8},
        "training": {"max_steps": NUM_STEPS, "global_batch_size": 1, "learning_rate": 1e-3},
        "evaluation": {} if while_training is None else {"suites": suites, "while_training": while_training},
        "checkpoint": {"every_steps": NUM_STEPS} | ({} if while_training is None else {"metric": "general/loss"}),
        "cluster": {"workers": 1, "threads_per_worker": 1, "max_failures": 0} | cluster,
    }


def kill_the_first(folder: RunFolder) -> threading.Thread:
    """Kill the evaluator's process, as soon as it has measured something."""

    def wait() -> None:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline:
            events = read_events(folder.events)
            started = [event for event in events if event["event"] == "evaluator_started"]
            if started and any(event["event"] == "suites_measured" for event in events):
                os.kill(started[0]["pid"], signal.SIGKILL)
                return
            time.sleep(0.05)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
def test_an_evaluator_that_is_killed_changes_no_loss_and_begins_anew(cluster: Cluster, tmp_path: Path) -> None:
    config = config_from(asked(tmp_path, "alone", {}, None))
    plan = prepare(config, this_machine(config.cluster), map).plan
    run_here(plan, Worker(rank=0, world_size=1, device_index=0, attempt=1, report=lambda metrics: None))
    alone = History.read(RunFolder(str(tmp_path), "alone").metrics)
    folder = RunFolder(str(tmp_path), "measured")
    killed = kill_the_first(folder)
    result = train(
        asked(tmp_path, "measured", {"address": cluster.address}, {"every_steps": 10, "where": "spare"}), progress=False
    )
    killed.join()
    assert result.history.series("train/loss") == alone.series("train/loss")
    names = [event["event"] for event in read_events(folder.events)]
    assert names.count("evaluator_started") == 2
    assert names.count("evaluator_away") == names.count("evaluator_back") == 1
    found = History.read(folder.metrics).series("general/loss")
    steps = [step for step, _ in found]
    assert steps == sorted(steps), "which of them were left out, clocks decide"
    assert steps[-1] == NUM_STEPS, "it was waited for, since it ranks the checkpoints"
    score = result.comparisons["general"].scores["loss"]
    assert found[-1][1] == score.tuned
    assert not Path(folder.exports).exists()
