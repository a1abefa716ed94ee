"""What a user meets when a run goes wrong: a cause, named once, or no interruption at all."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from raytune import train
from raytune.errors import DataError, RaytuneError, UserError
from raytune.launch.cluster import cluster as launch_cluster
from raytune.launch.cluster import scaling
from raytune.launch.run import RunFailedError
from raytune.launch.state.result import RunResult
from raytune.metrics.events import read_events
from raytune.metrics.history import History

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


def config(cluster: Cluster, storage: Path, name: str, **sections: Any) -> dict[str, Any]:
    return {
        "name": name,
        "storage": str(storage),
        "data": {"train": {"path": "demo:train", "max_rows": 100}, "max_length": 256},
        "training": {"max_steps": 20, "global_batch_size": 2, "learning_rate": 1e-3, "zero": {"stage": 2}},
        "checkpoint": {"every_steps": 5},
        "cluster": {"address": cluster.address, "workers": 2},
        **sections,
    }


def kill_a_worker_after(run: Path, step: int) -> None:
    """Wait until a run has made some steps, then end one of its workers the hard way."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if History.read(run / "metrics.jsonl").last_step >= step:
            places = json.loads((run / "places" / "attempt-1.json").read_text())
            os.kill(places["1"]["pid"], signal.SIGKILL)
            return
        time.sleep(0.1)


@pytest.fixture(scope="module")
def unbroken(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A finished run of `config`."""
    return train(config(cluster, tmp_path_factory.mktemp("unbroken"), "unbroken"), progress=False)


def test_a_killed_worker_is_replaced_and_the_run_ends_with_the_losses_of_the_unbroken_one(
    cluster: Cluster, unbroken: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_cluster, "GROUP_END_S", 1.0)  # that of the survivor, which cannot end in order
    killer = threading.Thread(target=kill_a_worker_after, args=(tmp_path / "killed", 7))
    killer.start()
    survived = train(config(cluster, tmp_path, "killed"), progress=False)
    killer.join()
    events = [event["event"] for event in read_events(tmp_path / "killed" / "events.jsonl")]
    assert events.count("attempt_started") == 2, "nothing was killed"
    assert survived.history.series("train/loss") == unbroken.history.series("train/loss")


def test_a_loss_that_is_not_finite_stops_the_run_at_once_and_names_its_step(cluster: Cluster, tmp_path: Path) -> None:
    hopeless = config(cluster, tmp_path, "diverging", adapter={"method": "full"})
    hopeless["training"] |= {"learning_rate": 1e30, "warmup_steps": 0, "max_grad_norm": 0}
    with pytest.raises(RunFailedError, match=r"TrainingError: The (loss|gradient) of step \d+ is not finite") as caught:
        train(hopeless, progress=False)
    record = json.loads((tmp_path / "diverging" / "run.json").read_text())
    assert record["attempts"] == 1, "what would only happen again is not tried again"
    assert record["state"] == "failed"
    assert caught.value.exit_code == 1


def test_continuing_a_run_with_other_settings_is_refused_with_the_difference(cluster: Cluster, unbroken: RunResult) -> None:
    again = config(cluster, Path(unbroken.folder).parent, "unbroken")
    with pytest.raises(UserError, match=r"training\.learning_rate: 0\.001 -> 0\.002"):
        train(again, progress=False, **{"training.learning_rate": 2e-3})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.train": "no-such-file.jsonl"}, "no-such-file.jsonl"),
        ({"model.base": "./no-such-model"}, "no-such-model"),
        ({"cluster.workers": 64}, "CPUs of the cluster"),
        ({"checkpoint.keep_last": 10**9}, r"The checkpoints of this run need 1000000001 x .* are free"),
        ({"evaluation.generation.rows": "no-such-questions.jsonl"}, "no-such-questions.jsonl"),
    ],
)
def test_what_cannot_work_is_refused_before_any_worker_starts(
    cluster: Cluster, tmp_path: Path, change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "UNHEARD_S", 0.0)  # there is no autoscaler to wait for
    with pytest.raises((UserError, DataError), match=message):
        train(config(cluster, tmp_path, "refused"), progress=False, **change)
    assert not (tmp_path / "refused" / "run.json").exists()


def test_an_error_of_a_run_survives_pickling() -> None:
    import pickle

    from raytune.launch.attempts.attempts import Failure

    failure = Failure(attempt=1, rank=0, node="n", kind="WorkerDied", message="gone", traceback="")
    error: RaytuneError = pickle.loads(pickle.dumps(RunFailedError("message", failure)))
    assert isinstance(error, RunFailedError)
    assert (str(error), error.failure, error.exit_code) == ("message", failure, 10)
