"""Models that take one document per pass train on each document as plain transformers does on it alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from raytune.config.sections.adapter import LoraAdapter
from raytune.model.adapters.lora import lora_config
from raytune.model.attention.attention import lone_attention
from raytune.plan.costs.activations import layer_activation_bytes
from raytune.plan.costs.memory import memory_parts
from raytune.plan.costs.workload import Workload
from raytune.plan.methods import trained_by
from raytune.plan.model.base_model import read_model_shape
from tests.hybrids import HYBRIDS
from tests.numerics.measured_bytes import measure
from tests.numerics.oracles import plain_losses
from tests.numerics.runs import LORA, SAME_SUMS, Material, make_plan, relative_difference, run, train
from tests.tiny import store_plan, tiny_store, tiny_tokenizer
from tests.variants import variants

WORK: dict[str, Any] = {
    "engine": "plain",
    "zero_stage": 0,
    "workers": 1,
    "offload_optimizer": "none",
    "offload_parameters": "none",
    "precision": "fp32",
    "optimizer": "adamw",
    "has_checkpointing": False,
    "accumulation": 4,
    "chunk_tokens": None,
    "is_on_gpu": False,
}
OFTEN = ("qwen3_next", "nemotron_h")
SETTINGS = {"num_steps": 2, "warmup_steps": 0}
"""Of two steps the second one shows what the first one left."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return store_plan(tiny_store(tmp_path_factory.mktemp("stores"), max_rows=12, max_length=160, packing="none"))


def material_of(name: str, folder: Path, rows: Any) -> tuple[Material, dict[str, Any], list[str], list[str]]:
    """Saved weights, what a plan says of them, and the targets of PEFT's."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(HYBRIDS[name]())
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    targets = lora_config(model, LoraAdapter(rank=4, alpha=8), revision=None)
    attention = "sdpa" if "sdpa" in lone_attention(type(model)) else "eager"
    material = Material(model=folder, with_dropout=folder, other_with_dropout=folder, store=rows)
    section = {"path": str(folder), "packs": False, "attention": attention}
    return material, section, [*(targets.target_modules or [])], [*(targets.target_parameters or [])]


def batch(workers: int = 1) -> dict[str, int]:
    return {"workers": workers, "micro_batch_size": 1, "accumulation": 4 // workers}


@pytest.mark.parametrize("name", variants(OFTEN, [name for name in HYBRIDS if name not in OFTEN]))
def test_documents_alone_in_their_rows_train_as_in_plain_transformers_and_peft(name: str, rows: Any, tmp_path: Path) -> None:
    material, section, modules, parameters = material_of(name, tmp_path, rows)
    plan = make_plan(material, adapter=LORA, model=section, batch=batch(), optimization=SETTINGS)
    wanted = plain_losses(plan, modules, parameters or None)
    assert relative_difference(train(plan).losses, wanted) <= SAME_SUMS
    again = plan.model_copy(update={"model": plan.model.model_copy(update={"gradient_checkpointing": True})})
    assert relative_difference(train(again).losses, wanted) <= SAME_SUMS


@pytest.mark.slow
@pytest.mark.parametrize("name", [*OFTEN, "lfm2", "jamba", "mamba"])
def test_planned_bytes_are_exact_for_what_lasts_and_near_for_activations(name: str, rows: Any, tmp_path: Path) -> None:
    """Activations within a factor of 5: of a layer with a state they depend on how its scan is computed."""
    material, section, _, _ = material_of(name, tmp_path, rows)
    measured = measure(make_plan(material, adapter=LORA, model=section, batch=batch()))
    shape, adapter = read_model_shape(str(tmp_path)), LoraAdapter(rank=4)
    fields: dict[str, Any] = {"shape": shape, "trained": trained_by(adapter, shape)}
    counts = {"num_tokens": measured.num_tokens, "num_targets": measured.num_targets}
    work = Workload(**WORK | fields | counts | {"attention": section["attention"]})
    parts = {part.name: part.num_bytes for part in memory_parts(work)}
    assert parts["weights"] == measured.weights
    assert parts["optimizer"] == pytest.approx(measured.optimizer, rel=0.01)
    kept = shape.num_layers * layer_activation_bytes(work)
    assert measured.activations / 5 < kept < 5 * measured.activations


@pytest.mark.parametrize("name", variants(["qwen3_next"], ["lfm2", "jamba"]))
def test_a_hybrid_divided_by_stage_3_trains_as_a_whole_one(name: str, rows: Any, tmp_path: Path) -> None:
    material, section, _, _ = material_of(name, tmp_path, rows)
    settings: dict[str, Any] = {"adapter": LORA, "model": section, "optimization": SETTINGS}
    alone = train(make_plan(material, batch=batch(), **settings))
    divided = run(make_plan(material, workers=2, stage=3, batch=batch(2), **settings))[0]
    assert relative_difference(divided.losses, alone.losses) <= SAME_SUMS
