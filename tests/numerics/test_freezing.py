"""Frozen = plain torch with `requires_grad` off, written here without our training code; and what a frozen base costs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from raytune.model.files.export import save_adapter, save_model
from raytune.model.parts.layers import layers_of
from raytune.plan.run_plan import RunPlan
from tests.numerics.processes import run_on_ranks
from tests.numerics.runs import (
    LORA,
    SAME_SUMS,
    Change,
    Material,
    Outcome,
    largest_difference,
    make_plan,
    outcome,
    relative_difference,
    run,
    start,
    steps_of,
    train,
)
from tests.numerics.strategies import FULL, plain_training, strategy_plan
from tests.tiny import save_tiny_model
from tests.variants import variants


@dataclass(frozen=True, kw_only=True)
class Way:
    freeze: dict[str, Any]
    is_trained: Callable[[str], bool]
    """Of the name of a parameter."""
    lowest: int
    """Layer that backward passes reach, of 3."""


WAYS = {
    "head": Way(freeze={"train_only": ["head"]}, is_trained=lambda name: "lm_head" in name, lowest=3),
    "head and norms": Way(
        freeze={"train_only": ["head", "norms"]}, is_trained=lambda name: "lm_head" in name or "norm" in name, lowest=0
    ),
    "norms": Way(freeze={"train_only": ["norms"]}, is_trained=lambda name: "norm" in name, lowest=0),
    "embeddings only": Way(freeze={"train_only": ["embeddings"]}, is_trained=lambda name: "embed" in name, lowest=0),
    "no embeddings": Way(freeze={"embeddings": True}, is_trained=lambda name: "embed" not in name, lowest=0),
    "first layers": Way(
        freeze={"first_layers": 2}, is_trained=lambda name: not ("layers.0" in name or "layers.1" in name), lowest=0
    ),
    "first layers and embeddings": Way(
        freeze={"first_layers": 2, "embeddings": True},
        is_trained=lambda name: not any(part in name for part in ("layers.0", "layers.1", "embed")),
        lowest=2,
    ),
    "names": Way(
        freeze={"embeddings": True, "modules": ["mlp", r"layers\.0\..*", "model.norm"]},
        is_trained=lambda name: not any(part in name for part in ("embed", "mlp", "layers.0", "model.norm")),
        lowest=1,
    ),
    "names only": Way(
        freeze={"train_only": ["layers.2", "q_proj"]},
        is_trained=lambda name: "layers.2" in name or "q_proj" in name,
        lowest=0,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def untied(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Material:
    """Three layers under a head of its own."""
    folder = tmp_path_factory.mktemp("untied")
    return replace(material, model=save_tiny_model(folder, tied=False, num_hidden_layers=3))


OFTEN = ("norms", "first layers and embeddings", "names")


@pytest.mark.parametrize("name", variants(OFTEN, [name for name in WAYS if name not in OFTEN]))
def test_what_is_frozen_stays_and_the_rest_learns_as_in_plain_torch(name: str, untied: Material) -> None:
    way = WAYS[name]
    plan = strategy_plan(untied, {"freeze": way.freeze})
    losses, weights = plain_training(plan, way.is_trained)
    ours = train(plan)
    assert relative_difference(ours.losses, losses) <= SAME_SUMS
    assert ours.weights.keys() == weights.keys()
    assert max((ours.weights[name] - weights[name]).abs().max() for name in weights) <= 2 * SAME_SUMS
    assert plan.num_trainable == sum(value.numel() for value in weights.values())
    assert plan.model.lowest_layer == way.lowest


# --- adapters


def lora_of(targets: list[str], **fields: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **fields)


PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def assert_plain_peft_computes_the_same(model: Any, ours: Outcome, plan: RunPlan, folder: Path) -> None:
    """What is saved of an adapted model, loaded by plain PEFT on the base."""
    save_adapter(model, ours.weights, folder)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, use_cache=False).logits
        base = AutoModelForCausalLM.from_pretrained(plan.model.path, dtype=torch.float32)
        theirs = PeftModel.from_pretrained(base, str(folder)).eval()(input_ids=ids).logits
    assert (logits - theirs).abs().max() <= SAME_SUMS


def test_updates_in_the_last_layers_are_plain_peft_s_with_layers_to_transform(untied: Material, tmp_path: Path) -> None:
    plan = strategy_plan(untied, {"freeze": {"first_layers": 1}}, LORA)
    losses, weights = plain_training(plan, lambda name: True, lora=lora_of(PROJECTIONS, layers_to_transform=[1, 2]))
    engine, loss_sum, batches_of = start(plan)
    ours = outcome(engine, [result.read(engine) for result in steps_of(plan, engine, loss_sum, batches_of)])
    assert relative_difference(ours.losses, losses) <= SAME_SUMS
    assert ours.weights.keys() == weights.keys()
    assert max((ours.weights[name] - weights[name]).abs().max() for name in weights) <= 2 * SAME_SUMS
    assert plan.num_trainable == sum(value.numel() for value in weights.values())
    assert_plain_peft_computes_the_same(engine.model, ours, plan, tmp_path)


def test_factors_in_the_last_layers_are_saved_for_plain_peft(untied: Material, tmp_path: Path) -> None:
    plan = strategy_plan(untied, {"freeze": {"modules": ["layers.0", "v_proj"]}}, {"method": "ia3"})
    engine, loss_sum, batches_of = start(plan)
    ours = outcome(engine, [result.read(engine) for result in steps_of(plan, engine, loss_sum, batches_of)])
    assert {name.split(".")[4] for name in ours.weights} == {"1", "2"}
    assert not any("v_proj" in name for name in ours.weights)
    assert_plain_peft_computes_the_same(engine.model, ours, plan, tmp_path)


# --- what runs, and what is kept


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Of one step, by layer."""

    backward: tuple[int, ...]
    """Layers whose output got a gradient."""
    forward: list[int]
    """How often each layer computed."""
    loss: float


def count_passes(plan: Any) -> Passes:
    """On this rank."""
    engine, loss_sum, batches_of = start(plan)
    found = layers_of(engine.model)
    assert found is not None
    forward, reached = [0] * len(found[1]), set()

    def watch(index: int, layer: nn.Module) -> None:
        def count(*_: Any) -> None:
            forward[index] += 1

        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            stream = output if isinstance(output, torch.Tensor) else output[0]
            if stream.requires_grad:
                stream.register_hook(lambda _gradient: reached.add(index))

        layer.get_submodule("mlp").register_forward_pre_hook(count)
        layer.register_forward_hook(look)

    for index, layer in enumerate(found[1]):
        watch(index, layer)
    batch = batches_of(0)[0].to(engine.device)
    loss = loss_sum(engine.module, batch)
    engine.backward(loss / batch.step_weight)
    engine.step(1e-3)
    return Passes(backward=tuple(sorted(reached)), forward=forward, loss=loss.item())


TO_COUNT = {
    "full": (FULL, {"first_layers": 1, "embeddings": True}, 1),
    "head": (FULL, {"train_only": ["head", "model.norm"]}, 3),
    "lora": (LORA, {"first_layers": 2}, 2),
    "ia3": ({"method": "ia3"}, {"first_layers": 1}, 1),
}


@pytest.mark.parametrize(("stage", "checkpointing"), variants([(0, True), (3, False)], [(0, False), (3, True)]))
@pytest.mark.parametrize("name", TO_COUNT)
def test_no_backward_pass_runs_below_the_lowest_trained_layer(
    name: str, stage: int, checkpointing: bool, untied: Material
) -> None:
    """At stage 3 checkpointing is reentrant, and wants something that enters a recomputed layer to have a gradient."""
    adapter, freeze, lowest = TO_COUNT[name]
    plan = strategy_plan(untied, {"freeze": freeze}, adapter, checkpointing=checkpointing, stage=stage, accumulation=1)
    assert plan.model.lowest_layer == lowest
    passes = run_counted(plan, stage)
    assert passes.backward == tuple(range(lowest, 3))
    again = 1 + checkpointing
    assert passes.forward == [1] * lowest + [again] * (3 - lowest)
    if checkpointing:
        plain = plan.model_copy(update={"model": plan.model.model_copy(update={"gradient_checkpointing": False})})
        assert passes.loss == run_counted(plain, stage).loss


def run_counted(plan: Any, stage: int) -> Passes:
    return run_on_ranks(count_passes, 1, plan)[0] if stage else count_passes(plan)


# --- divided, resumed, saved

DIVIDED = {
    "full": (FULL, {"freeze": {"embeddings": True, "modules": ["layers.0", "mlp"]}}),
    "head": (FULL, {"freeze": {"train_only": ["head", "norms"]}}),
    "lora": (LORA, {"freeze": {"first_layers": 2}}),
}


@pytest.mark.parametrize("stage", variants([3], [0, 1, 2]))
@pytest.mark.parametrize("name", variants(["lora"], ["full", "head"]))
def test_every_stage_on_two_ranks_equals_one_plain_process(name: str, stage: int, untied: Material) -> None:
    adapter, strategy = DIVIDED[name]
    checkpointing = name == "full"
    alone = train(strategy_plan(untied, strategy, adapter))
    sharded = run(strategy_plan(untied, strategy, adapter, checkpointing=checkpointing, workers=2, stage=stage))
    assert sharded[0].numbers == sharded[1].numbers
    assert relative_difference(sharded[0].losses, alone.losses) <= SAME_SUMS
    assert largest_difference(sharded[0], alone) <= 2 * SAME_SUMS


@pytest.mark.parametrize(("name", "stage"), variants([("full", 3)], [("lora", 0), ("full", 0), ("full", 2)]))
def test_resumed_equals_unbroken_and_a_checkpoint_has_what_is_trained_only(
    name: str, stage: int, untied: Material, tmp_path: Path
) -> None:
    adapter, strategy = DIVIDED[name]
    plan = strategy_plan(untied, strategy, adapter, stage=stage)
    unbroken = run(plan)[0]
    run(plan, Change(stop=3, save=tmp_path))
    resumed = run(plan, Change(start=3, load=tmp_path / "rank-0"))[0]
    assert resumed.losses == unbroken.losses[3:]
    assert largest_difference(resumed, unbroken) == 0
    saved = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    of_all = run(make_plan(untied, stage=stage), Change(stop=1, save=tmp_path / "all"))[0]
    whole = sum(file.stat().st_size for file in (tmp_path / "all").rglob("*") if file.is_file())
    share = plan.num_trainable / sum(value.numel() for value in of_all.weights.values())
    assert saved <= share * whole + 40_000, "names and shapes besides"


def test_a_saved_model_has_its_frozen_weights_bit_for_bit(untied: Material, tmp_path: Path) -> None:
    plan = strategy_plan(untied, {"freeze": {"train_only": ["head", "model.norm"]}})
    engine, loss_sum, batches_of = start(plan)
    for _ in steps_of(plan, engine, loss_sum, batches_of, Change(stop=2)):
        pass
    model: Any = engine.model
    save_model(model, ((name, value) for name, value in engine.model_state() if value is not None), tmp_path)
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (plan.model.path, tmp_path))
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"lm_head.weight", "model.norm.weight"}
