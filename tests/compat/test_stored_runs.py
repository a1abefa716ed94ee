"""Run folders that earlier commits wrote are read, and go on, under this one.

`runs_of_COMMIT` holds what `raytune train` left of two runs that were cut off after step 2 of 4, and the metrics of the same runs
unbroken. Each was written by that commit, and nothing of it is ever written anew.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from raytune.config.load import load_config
from raytune.config.sections.run import RunConfig
from raytune.launch.cluster.host import this_machine
from raytune.launch.data.prepare import prepare
from raytune.launch.state.record import RunRecord, write_plan
from raytune.metrics.history import History
from raytune.plan.identity.identity import differences, identity_of
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import RunFolder
from raytune.training.checkpoints.commit import Commit
from raytune.training.run import Worker, train

STORED = Path(__file__).parent / "runs_of_02fb5b9"
RUNS = ("lora", "qlora")


@pytest.mark.parametrize("name", RUNS)
def test_the_plan_of_the_commit_before_is_read_and_means_the_same(name: str) -> None:
    text = (STORED / name / "plan.json").read_text()
    stored, plan = json.loads(text), RunPlan.model_validate_json(text)
    assert plan.adapter.method == "lora"
    assert {key: getattr(plan.adapter, key) for key in ("rank", "alpha", "target_modules")} == {
        key: stored["adapter"][key] for key in ("rank", "alpha", "target_modules")
    }
    if name == "lora":
        assert plan.model.quantization is None
    else:
        assert plan.model.quantization is not None
        assert plan.model.quantization.model_dump() == {
            "format": stored["adapter"]["quantization"],
            "double_quantization": stored["adapter"]["double_quantization"],
            "compute_dtype": stored["adapter"]["compute_dtype"],
            "quant_storage": stored["adapter"]["quant_storage"],
        }
    assert RunPlan.model_validate_json(plan.model_dump_json()) == plan, "written anew, it is read as the same"


@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_run_of_the_commit_before_goes_on_where_it_stopped(name: str, tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), name)
    shutil.copytree(STORED / name, tmp_path / name)
    config = load_config([STORED / f"{name}.yaml"], [f"storage={tmp_path}"])
    record = RunRecord.read(folder)
    assert record is not None
    assert RunConfig.model_validate(record.config).adapter == config.adapter
    plan = prepare(config, this_machine(config.cluster), map).plan
    manifest = next((tmp_path / name).glob("checkpoints/*/MANIFEST.json"))
    commit = Commit.from_manifest(str(manifest.parent), manifest.read_bytes())
    others = differences(commit.fingerprint, identity_of(plan))
    assert all(key.startswith("data.") for key in others), "the store is not there to be compared with, all else is the same"
    manifest.write_bytes(replace(commit, fingerprint=identity_of(plan)).to_manifest())
    write_plan(folder, plan)
    train(plan, Worker(rank=0, world_size=1, device_index=0, attempt=2, report=lambda metrics: None))

    history = History.read(folder.metrics)
    assert [(point.step, point.attempt) for point in history.points if "train/loss" in point.values] == [
        (1, 1),
        (2, 1),
        (3, 2),
        (4, 2),
    ], "it went on behind step 2, and did not begin anew"
    ours = dict(history.series("train/loss"))
    unbroken = dict(History.read(STORED / f"{name}.unbroken.jsonl").series("train/loss"))
    assert ours.keys() == unbroken.keys() == {1, 2, 3, 4}
    assert ours == pytest.approx(unbroken, rel=1e-5), "other kernels of another processor"
