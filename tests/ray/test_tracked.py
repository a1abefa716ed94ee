"""A run on a cluster and the trials of a sweep, told to trackers while they train: what their folders have arrives."""

import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray.cluster_utils import Cluster

from raytune import sweep, train
from raytune.launch.state.callbacks import RunEvent
from raytune.metrics.history import History
from raytune.run_folder import RunFolder, SweepFolder
from raytune.storage import read_json
from tests.trackers import in_mlflow, in_tensorboard, in_trackio

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def asked(cluster: Cluster, storage: Path, **sections: Any) -> dict[str, Any]:
    return {
        "storage": str(storage),
        "data": {
            "train": {"path": "demo:train", "max_rows": 16},
            "validation": {"path": "demo:validation", "max_rows": 4},
            "max_length": 512,
        },
        "training": {"max_steps": 3, "global_batch_size": 2, "warmup_steps": 0, "logging_steps": 1},
        "cluster": {"address": cluster.address, "workers": 1},
        "tracking": ["tensorboard", "trackio"],
        **sections,
    }


def losses(folder: RunFolder) -> list[float]:
    return [value for _, value in History.read(folder.metrics).series("train/loss")]


@pytest.mark.slow
def test_what_a_run_measures_is_at_the_endpoint_of_a_node_while_it_trains(cluster: Cluster, tmp_path: Path) -> None:
    ports: list[int] = []
    read: list[dict[tuple[str, str], float]] = []

    def look(event: RunEvent) -> None:
        ports[:] = [node["MetricsExportPort"] for node in ray.nodes()]
        if event.is_last:  # the command waits for its callbacks
            deadline = time.monotonic() + 50
            while time.monotonic() < deadline and not (read and read[-1].get(("raytune_running", "")) == 0.0):
                read.append(gauges_at(ports))
                time.sleep(1)

    asked_for = asked(cluster, tmp_path, name="seen", tracking={"prometheus": {}, "group": "november"})
    result = train(asked_for, progress=False, callbacks=[look])
    last = read[-1]
    for name in ("train/loss", "validation/loss", "train/wait_s"):
        assert last["raytune_metric", name] == pytest.approx(result.history.as_of(3)[name], rel=1e-9), name
    assert (last["raytune_step", ""], last["raytune_steps", ""], last["raytune_running", ""]) == (3, 3, 0)


def gauges_at(ports: list[int]) -> dict[tuple[str, str], float]:
    """Value by gauge and metric, of the run `seen`, as the endpoints of the nodes say in Prometheus' format."""
    found = {}
    for port in ports:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            for family in text_string_to_metric_families(answer.read().decode()):
                for sample in family.samples:
                    if sample.labels.get("run") == "seen" and sample.labels.get("group") == "november":
                        found[sample.name.removeprefix("ray_"), sample.labels.get("metric", "")] = sample.value
    return found


@pytest.mark.slow
def test_a_run_and_the_trials_of_a_sweep_are_known_to_their_trackers(cluster: Cluster, tmp_path: Path) -> None:
    result = train(asked(cluster, tmp_path, name="alone", tracking=["tensorboard", "trackio", "mlflow"]), progress=False)
    (page,) = tmp_path.rglob("artifacts/report.html")
    assert page.read_bytes() == Path(RunFolder(str(tmp_path), "alone").report).read_bytes(), (
        "the page is written before they close"
    )
    took = in_mlflow(tmp_path)[0].points["result/training_s", 3]
    assert took == [read_json(RunFolder(str(tmp_path), "alone").result)["outcome"]["training_s"]] == [result.spent.training_s]
    space = {"trials": 2, "space": {"training.learning_rate": {"grid": [1e-3, 1e-4]}}, "stopping": {"method": "none"}}
    sweep(asked(cluster, tmp_path, name="two", sweep=space), progress=False)

    names = ["alone", "two/trials/trial-000", "two/trials/trial-001"]
    folders = [RunFolder(str(tmp_path), "alone"), *(SweepFolder(str(tmp_path), "two").trial(name[-9:]) for name in names[1:])]
    shown = {str(Path(kept.run_id).parent.relative_to(tmp_path)): kept for kept in in_tensorboard(tmp_path)}
    assert set(shown) == set(names)
    for name, folder in zip(names, folders):
        assert len(losses(folder)) == 3
        found = [shown[name].points["train/loss", step][0] for step in (1, 2, 3)]
        assert found == pytest.approx(losses(folder), rel=1e-6)  # held in 32 bits
    assert sorted(run.settings["_Group"] for run in in_trackio(tmp_path)) == ["None", "two", "two"]
