"""`model.rope_scaling` = transformers' own model with the same parameters, in packed rows too, from the first loss to files."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from raytune.config.sections.model import ModelSection
from raytune.model.merging.merge import merge_adapter
from raytune.plan.model.base_model import read_model_shape
from raytune.plan.model.rope import resolve_rope
from raytune.plan.run_plan import RunPlan
from tests.numerics.oracles import document_loss, documents
from tests.numerics.runs import LORA, SAME_SUMS, Material, make_plan, relative_difference, run, start, train
from tests.numerics.saved_models import loss_by_plain_transformers
from tests.numerics.strategies import plain_training
from tests.numerics.test_whole_run import finished
from tests.tiny import save_tiny_model
from tests.unit.test_meta_shape import OTHERS
from tests.unit.test_plan_shapes import CONFIGS
from tests.variants import variants

ORIGINAL = 32
"""Positions of the bases here: most documents are longer."""
LLAMA_3 = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"type": "linear", "factor": 8.0},
    "dynamic": {"type": "dynamic", "factor": 8.0},
    "yarn": {"type": "yarn", "factor": 8.0, "beta_fast": 16.0, "attention_factor": 1.5},
    "yarn with its defaults": {"type": "yarn", "factor": 8.0},
    "llama3": LLAMA_3,
}
ROTARY = ["llama", "phi3", "gpt_neox"]
OTHER_ROTARY = ["mistral", "qwen2", "qwen3", "gemma", "gemma2", "mixtral", "phi", "cohere", "glm", "olmo2", "granite"]


@pytest.fixture(scope="module")
def short(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Material:
    """A base with few positions; its documents are those of all tests."""
    return replace(material, model=save_tiny_model(tmp_path_factory.mktemp("short"), max_position_embeddings=ORIGINAL))


def stretched(material: Material, kind: str, **changes: Any) -> RunPlan:
    """A plan whose rotary positions are resolved as the planner does."""
    section = ModelSection.model_validate({"base": str(material.model), "rope_scaling": KINDS[kind]})
    rope = resolve_rope(section, read_model_shape(str(material.model)))
    return make_plan(material, model={"path": str(material.model), "rope": rope}, **changes)


def by_transformers(folder: Path, kind: str) -> Any:
    """The model that transformers makes of the same words, which sees each document as the first one."""
    words = dict(KINDS[kind])
    config: Any = AutoConfig.from_pretrained(folder)
    kept = {name: value for name, value in config.rope_parameters.items() if name in ("rope_theta", "partial_rotary_factor")}
    original = {"original_max_position_embeddings": ORIGINAL} if words["type"] in ("yarn", "llama3") else {}
    config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    config.rope_parameters = kept | {"rope_type": words.pop("type")} | words | original
    model: Any = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    rotary = [module for module in model.modules() if hasattr(module, "rope_type")]
    assert rotary
    for module in rotary:
        module.register_forward_pre_hook(_forget)
    return model


def _forget(module: Any, _: Any) -> None:
    """What `dynamic` keeps of a longer document."""
    module.max_seq_len_cached = module.original_max_seq_len
    module.inv_freq = module.original_inv_freq.clone()


@pytest.mark.parametrize("kind", variants(["dynamic", "yarn", "llama3"], ["linear", "yarn with its defaults"]))
def test_training_equals_plain_transformers_with_the_same_positions(kind: str, short: Material) -> None:
    plan = stretched(short, kind)
    losses, weights = plain_training(plan, lambda name: True, base=by_transformers(short.model, kind))
    ours = train(plan)
    assert relative_difference(ours.losses, losses) <= SAME_SUMS
    assert max((ours.weights[name] - weight).abs().max().item() for name, weight in weights.items()) <= SAME_SUMS
    # More than the rounding: without the scaling it is another model.
    assert relative_difference(ours.losses, train(make_plan(short)).losses) > 100 * SAME_SUMS


def test_factor_1_changes_nothing_bit_for_bit(short: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "linear", {"type": "linear", "factor": 1.0})
    assert train(stretched(short, "linear")).losses == train(make_plan(short)).losses


@pytest.mark.parametrize("stage", variants([3], [1, 2]))
def test_two_workers_equal_one(stage: int, short: Material) -> None:
    alone = train(stretched(short, "dynamic", adapter=LORA))
    first, _ = run(stretched(short, "dynamic", adapter=LORA, workers=2, stage=stage))
    assert relative_difference(first.losses, alone.losses) <= SAME_SUMS


@pytest.mark.parametrize(
    "kind", ["dynamic", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("linear", "yarn", "llama3"))]
)
@pytest.mark.parametrize("name", [*ROTARY, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHER_ROTARY)])
def test_architectures_have_the_positions_that_transformers_gives_them(
    name: str, kind: str, material: Material, tmp_path: Path
) -> None:
    config = copy.deepcopy(({**CONFIGS} | OTHERS)[name])
    if name == "phi":  # of its heads one half is rotated, in pairs: 6 numbers of each are none
        config.num_attention_heads = config.num_key_value_heads = 2
    there = replace(material, model=_saved(config, tmp_path))
    engine, loss_sum, batches_of = start(stretched(there, kind))
    batch = batches_of(0)[0]
    oracle = by_transformers(tmp_path, kind).train()
    expected = sum(document_loss(oracle, *document) for document in documents(batch))
    assert isinstance(expected, torch.Tensor)
    assert relative_difference([loss_sum(engine.module, batch).item()], [expected.item()]) <= SAME_SUMS


def _saved(of: PretrainedConfig, folder: Path) -> Path:
    """A model of an architecture with the tokens of the tests' rows, and few positions."""
    config: Any = copy.deepcopy(of)
    config.vocab_size, config.max_position_embeddings = 259, ORIGINAL
    if hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = ORIGINAL
    for rate in ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop"):
        if hasattr(config, rate):
            setattr(config, rate, 0.0)
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)  # pyright: ignore[reportCallIssue]
    return folder


@pytest.mark.parametrize("kind", ["yarn", pytest.param("linear", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_is_saved_and_merged_has_the_positions(method: str, kind: str, short: Material, tmp_path: Path) -> None:
    adapter = LORA if method == "lora" else {"method": method}
    generation = {"rows": "demo:test", "max_rows": 1, "max_new_tokens": 2}
    changes: dict[str, Any] = {
        "model": {"base": str(short.model), "rope_scaling": KINDS[kind]},
        "data": {"max_length": 8 * ORIGINAL},
        "adapter": adapter,
        "evaluation": {"every_steps": 3, "generation": generation},
    }
    result = finished(tmp_path, changes)
    assert result.plan.data.row_length == 8 * ORIGINAL
    recorded = pytest.approx(result.metrics["validation/loss"], rel=2e-5)  # two orders of fp32 additions
    assert loss_by_plain_transformers(result.plan, result.model_path) == recorded
    whole = Path(result.model_path)
    if method == "lora":
        whole = tmp_path / "merged"
        merge_adapter(Path(result.model_path), whole)
    config = json.loads((whole / "config.json").read_text())
    assert config["max_position_embeddings"] == 8 * ORIGINAL
    assert config["rope_parameters"]["rope_type"] == KINDS[kind]["type"]
    merged = result.plan.model_copy(update={"adapter": result.plan.adapter.model_copy(update={"method": "full"})})
    assert loss_by_plain_transformers(merged, str(whole)) == recorded
    assert read_model_shape(str(whole)).max_positions == 8 * ORIGINAL
