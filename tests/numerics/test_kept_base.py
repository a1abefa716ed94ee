"""Runs that follow one another on a base that stays loaded equal runs of their own, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from raytune.config.load import config_from
from raytune.launch.cluster.host import this_machine
from raytune.launch.data.prepare import prepare
from raytune.launch.state.record import write_plan
from raytune.launch.state.result import RunResult
from raytune.model.kept_base import KeptBase
from raytune.run_folder import RunFolder
from raytune.training.run import Worker, train
from tests.tiny import tiny_base
from tests.variants import variants

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 4, "dropout": 0.1},
    "qlora": {"method": "qlora", "rank": 4},
    "dora": {"method": "lora", "rank": 4, "use_dora": True},
    "patterns": {"method": "lora", "rank": 4, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 2}},
    "pissa, which changes its base": {"method": "lora", "rank": 4, "init": "pissa"},
    "trained embeddings": {"method": "lora", "rank": 4, "modules_to_save": ["embed_tokens"]},
    "full": {"method": "full"},
    "layernorm": {"method": "layernorm"},
    "lokr": {"method": "lokr", "rank": 2},
    "loha": {"method": "loha", "rank": 2},
    "vera": {"method": "vera", "rank": 8},
    "oft": {"method": "oft", "block_size": 8},
    "boft": {"method": "boft", "block_size": 8},
    "bottleneck": {"method": "bottleneck", "reduction": 4},
    "adalora": {"method": "adalora", "rank": 2},
}


def trained(storage: Path, name: str, adapter: dict[str, Any], kept: KeptBase | None, **training: Any) -> RunResult:
    config = config_from(
        {
            "name": name,
            "storage": str(storage),
            "model": {"base": str(tiny_base(storage))},
            "data": {
                "train": {"path": "demo:train", "max_rows": 40},
                "validation": {"path": "demo:validation", "max_rows": 8},
                "max_length": 512,
            },
            "adapter": adapter,
            "training": {"max_steps": 4, "global_batch_size": 2, "learning_rate": 5e-3, **training},
            "cluster": {"workers": 1},
        }
    )
    plan = prepare(config, this_machine(config.cluster), map).plan
    write_plan(RunFolder(plan.storage, plan.name), plan)
    train(plan, Worker(rank=0, world_size=1, device_index=0, attempt=1, report=lambda metrics: None, kept=kept))
    return RunResult.read(RunFolder(plan.storage, plan.name))


OFTEN = ("pissa, which changes its base",)
"""Whose base may not stay. What a base that stays comes to is `test_the_base_of_one_run_serves_the_next`; which others do not
stay is the last test."""


@pytest.mark.parametrize("name", variants(OFTEN, [name for name in ADAPTERS if name not in OFTEN]))
def test_a_run_after_another_equals_the_run_alone(name: str, tmp_path: Path) -> None:
    adapter = ADAPTERS[name]
    alone = trained(tmp_path, "alone", adapter, None)
    kept = KeptBase()
    # Whatever came before: another rank, a rate that ruins the adapter, the same method with other layers.
    trained(tmp_path, "before", {"method": "lora", "rank": 8, "alpha": 64}, kept, learning_rate=1.0)
    trained(tmp_path, "then", adapter, kept, learning_rate=0.3)
    after = trained(tmp_path, "after", adapter, kept)
    assert after.history.series("train/loss") == alone.history.series("train/loss")
    assert after.history.series("validation/loss") == alone.history.series("validation/loss")
    file = "model.safetensors" if adapter["method"] == "full" else "adapter_model.safetensors"
    ours, theirs = load_file(Path(after.model_path) / file), load_file(Path(alone.model_path) / file)
    assert ours.keys() == theirs.keys()
    assert all(ours[key].equal(theirs[key]) for key in ours)


def test_the_base_of_one_run_serves_the_next(tmp_path: Path) -> None:
    kept = KeptBase()
    trained(tmp_path, "one", ADAPTERS["lora"], kept)
    assert kept._model is not None
    embedding = kept._model.get_input_embeddings()
    trained(tmp_path, "two", ADAPTERS["patterns"], kept)
    assert kept._model is not None
    assert kept._model.get_input_embeddings() is embedding


@pytest.mark.parametrize("name", ["pissa, which changes its base", "trained embeddings", "full"])
def test_a_base_that_training_changes_is_not_kept(name: str, tmp_path: Path) -> None:
    kept = KeptBase()
    trained(tmp_path, "one", ADAPTERS[name], kept)
    assert kept._model is None
