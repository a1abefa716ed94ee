"""Real runs on two nodes: weights are really divided, what they leave loads without raytune, and nothing of them stays behind."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.state import list_actors, list_placement_groups

from raytune import train
from raytune.launch.state.result import RunResult
from tests.numerics.saved_models import loss_by_plain_transformers
from tests.variants import variants

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

ADAPTERS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora", "rank": 8},
    "qlora": {"method": "qlora", "rank": 8},
}
# What two ranks hold of each method's weights is often measured without a cluster, in numerics/test_plan_bytes.py, and a whole
# model that two of them save in numerics/test_whole_run.py.
OFTEN = ("lora",)
METHODS = variants(OFTEN, [name for name in ADAPTERS if name not in OFTEN])


def config(cluster: Cluster, storage: Path, name: str, **sections: Any) -> dict[str, Any]:
    return {
        "name": name,
        "storage": str(storage),
        "data": {
            "train": {"path": "demo:train", "max_rows": 200},
            "validation": {"path": "demo:validation", "max_rows": 12},
            "max_length": 512,
        },
        "training": {"max_steps": 6, "global_batch_size": 4, "learning_rate": 1e-3, "zero": {"stage": 3}},
        "cluster": {"address": cluster.address, "workers": 2, "placement": "strict_spread"},
        **sections,
    }


@pytest.fixture(scope="module")
def runs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, RunResult]:
    """A finished ZeRO-3 run of each method that is asked for, one worker per node."""
    storage = tmp_path_factory.mktemp("runs")
    names = ADAPTERS if request.config.getoption("--slow") else OFTEN
    return {name: train(config(cluster, storage, name, adapter=ADAPTERS[name]), progress=False) for name in names}


@pytest.mark.parametrize("method", METHODS)
def test_each_rank_holds_half_of_the_weights_under_zero_3(runs: dict[str, RunResult], method: str) -> None:
    result = runs[method]
    bytes_per_weight = {"full": 4, "lora": 4, "qlora": 0.5}[method]
    half_of_the_base = result.plan.num_parameters * bytes_per_weight / 2
    held = [rank["weights"] for rank in result.held_bytes]
    assert len(held) == 2
    # Above the half: norms and other small weights stay whole, adapters come on top, NF4 leaves embeddings in more bits.
    slack = {"full": 1.15, "lora": 1.5, "qlora": 3.0}[method]
    assert all(half_of_the_base <= rank <= slack * half_of_the_base for rank in held), (held, half_of_the_base)


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_validation_loss(runs: dict[str, RunResult], method: str) -> None:
    losses = [loss for _, loss in runs[method].history.series("validation/loss")]
    assert losses[-1] < losses[0]


# Plain PEFT would put the QLoRA adapter on a base that is not quantised.
@pytest.mark.parametrize("method", variants(["lora"], ["full"]))
def test_the_saved_model_has_the_validation_loss_that_two_sharded_ranks_recorded(runs: dict[str, RunResult], method: str) -> None:
    result = runs[method]
    assert loss_by_plain_transformers(result.plan, result.model_path) == pytest.approx(
        result.metrics["validation/loss"], rel=2e-5
    )


LOAD = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
for method, folder in json.loads(sys.argv[1]).items():  # the one without an adapter first, while PEFT is not imported
    if method == "full":
        model = AutoModelForCausalLM.from_pretrained(folder)
    else:
        from peft import AutoPeftModelForCausalLM
        model = AutoPeftModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder).apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
assert not any(name.startswith("raytune") for name in sys.modules)
"""


@pytest.mark.slow  # often by the README's example of an adapter: examples/test_readme.py
def test_the_saved_models_load_in_a_process_without_raytune(runs: dict[str, RunResult], tmp_path: Path) -> None:
    folders = {method: result.model_path for method, result in runs.items()}
    assert list(folders)[:2] == ["full", "lora"]
    command = [sys.executable, "-c", LOAD, json.dumps(folders)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


def test_a_run_leaves_no_placement_group_no_actor_and_all_resources(cluster: Cluster, runs: dict[str, RunResult]) -> None:
    ray.init(address=cluster.address, ignore_reinit_error=True)
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and ray.available_resources().get("CPU") != 2.0:
            time.sleep(0.5)
        assert ray.available_resources()["CPU"] == 2.0
        assert [group for group in list_placement_groups(address=cluster.address) if group.state == "CREATED"] == []
        alive = [actor.class_name for actor in list_actors(address=cluster.address) if actor.state == "ALIVE"]
        assert [name for name in alive if "Worker" in name or "Controller" in name] == []
    finally:
        ray.shutdown()


def test_a_finished_run_is_not_trained_again(cluster: Cluster, runs: dict[str, RunResult]) -> None:
    first = runs["lora"]
    storage = Path(first.folder).parent
    again = train(config(cluster, storage, "lora", adapter=ADAPTERS["lora"]), progress=False)
    assert again.metrics == first.metrics
    assert again.history == first.history
