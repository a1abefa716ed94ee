"""Every recipe that ships trains: two steps of a tiny model of its family, with the rest of it as it is written."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from raytune.config.load import load_config
from raytune.config.sections.run import RunConfig
from raytune.launch.cluster.host import this_machine
from raytune.launch.data.prepare import prepare
from raytune.launch.state.record import write_plan
from raytune.launch.state.result import RunResult
from raytune.plan.model.references import REFERENCES
from raytune.run_folder import RunFolder
from raytune.training.run import Worker, train
from tests.recipes import RECIPES, recipe
from tests.tiny import tiny_tokenizer

NARROW: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "max_position_embeddings": 512,
}


def narrow_model(config: RunConfig, folder: Path) -> Path:
    """The base of a recipe in all but its widths and its number of layers."""
    published = REFERENCES[config.model.base]
    tokenizer = tiny_tokenizer()
    sizes = {key: value for key, value in NARROW.items() if key in published or key == "head_dim"}
    narrow = {**published, **sizes, "num_hidden_layers": 2, "layer_types": None, "vocab_size": len(tokenizer)}
    kept = {key: value for key, value in narrow.items() if not key.endswith("_token_id")}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**kept)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


OF_TWO_LAYERS = {
    "llama-3.1-8b-upper-half-8xh100": "strategy.freeze.first_layers=1",
    "mistral-7b-unfreeze-8xh100": "strategy.unfreeze=[{last_layers: 1}, {from_fraction: 0.5, last_layers: all}]",
    "qwen2.5-1.5b-head-24gb": "strategy.freeze.train_only=[layers.1, norms]",
}
"""What recipes say of layers by their numbers, for a model of two and a run of two steps."""


@pytest.mark.parametrize("name", RECIPES)
def test_two_steps_of_a_recipe_leave_a_model(name: str, tmp_path: Path) -> None:
    base = narrow_model(recipe(name), tmp_path / "base")
    is_text = recipe(name).data.train[0].path.endswith(".txt")
    if is_text:
        (tmp_path / "field.txt").write_text("".join(f"Line {number} of a field's text.\n\n" for number in range(200)))
    config = load_config(
        [Path("configs/recipes") / f"{name}.yaml"],
        [
            f"storage={tmp_path}",
            f"model.base={base}",
            f"data.train.0.path={tmp_path / 'field.txt' if is_text else 'demo:train'}",
            *([] if is_text else ["data.train.0.max_rows=30"]),
            *([OF_TWO_LAYERS[name]] if name in OF_TWO_LAYERS else []),
            "data.validation_fraction=0.1",
            "data.max_length=256",
            "cluster={}",
            "cluster.instance=null",
            "cluster.nodes=1",
            "cluster.workers=1",
            "training.max_steps=2",
            "training.global_batch_size=2",
            "training.warmup_steps=0",
            "training.zero.stage=auto",
            "checkpoint.every_steps=2",
            "evaluation.every_steps=2",
        ],
    )
    plan = prepare(config, this_machine(config.cluster), map).plan
    folder = RunFolder(plan.storage, plan.name)
    write_plan(folder, plan)
    train(plan, Worker(rank=0, world_size=1, device_index=0, attempt=1, report=lambda metrics: None))
    result = RunResult.read(folder)
    assert [step for step, _ in result.history.series("train/loss")] == [1, 2]
    assert Path(result.model_path).is_dir()
    assert {"validation/loss"} <= result.metrics.keys()
