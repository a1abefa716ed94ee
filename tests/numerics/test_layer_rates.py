"""Rates by layer and pattern, and weight decay of groups = plain torch with an optimizer group per parameter."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from tests.numerics.runs import (
    LORA,
    SAME_SUMS,
    Change,
    Material,
    largest_difference,
    relative_difference,
    run,
    train,
)
from tests.numerics.strategies import FULL, plain_training, strategy_plan
from tests.tiny import save_tiny_model
from tests.variants import variants

NUM_LAYERS = 3


@pytest.fixture(scope="module")
def untied(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Material:
    """Three layers under a head of its own."""
    folder = tmp_path_factory.mktemp("untied")
    return replace(material, model=save_tiny_model(folder, tied=False, num_hidden_layers=NUM_LAYERS))


def by_depth(decay: float, name: str) -> float:
    """decay^(distance from top) of a parameter, by its name."""
    layer = re.search(r"layers\.(\d+)\.", name)
    if layer:
        return decay ** (NUM_LAYERS - int(layer[1]))
    return decay ** (NUM_LAYERS + 1) if "embed_tokens" in name else 1.0


@dataclass(frozen=True, kw_only=True)
class Way:
    strategy: dict[str, Any]
    rate: Callable[[str], float] = lambda name: 1.0
    decay: Callable[[str], float] | None = None
    is_trained: Callable[[str], bool] = lambda name: True
    adapter: dict[str, Any] | None = None


LORA_PLUS = LORA | {"lora_plus_ratio": 8.0}
WAYS = {
    "layers": Way(strategy={"layer_rate_decay": 0.5}, rate=lambda name: by_depth(0.5, name)),
    "layers above frozen ones": Way(
        strategy={"layer_rate_decay": 0.7, "freeze": {"modules": ["layers.0", "embeddings"]}},
        rate=lambda name: by_depth(0.7, name),
        is_trained=lambda name: "layers.0" not in name and "embed" not in name,
    ),
    "layers and patterns": Way(
        strategy={"layer_rate_decay": 0.5, "rate_scales": {"mlp": 3.0, r"layers\.1": 0.1, "head": 0.25}},
        rate=lambda name: by_depth(0.5, name)
        * (3.0 if "mlp" in name else 1.0)
        * (0.1 if "layers.1." in name else 1.0)
        * (0.25 if "lm_head" in name else 1.0),
    ),
    "weight decay": Way(
        strategy={"weight_decay_of": {"self_attn": 0.0, r"layers\.2": 0.5, "norms": 0.3}},
        decay=lambda name: (
            0.3 if "norm" in name else 0.0 if "self_attn" in name else 0.5 if "layers.2." in name else 0.1
        ),
    ),
    "lora": Way(strategy={"layer_rate_decay": 0.5}, rate=lambda name: by_depth(0.5, name), adapter=LORA),
    "lora+": Way(
        strategy={"layer_rate_decay": 0.5, "rate_scales": {"q_proj": 0.1}},
        rate=lambda name: by_depth(0.5, name) * (8.0 if "lora_B" in name else 1.0) * (0.1 if "q_proj" in name else 1.0),
        adapter=LORA_PLUS,
    ),
}  # fmt: skip


OFTEN = ("layers and patterns", "weight decay", "lora+")


@pytest.mark.parametrize("name", variants(OFTEN, [name for name in WAYS if name not in OFTEN]))
def test_each_parameter_learns_as_in_plain_torch(name: str, untied: Material) -> None:
    way = WAYS[name]
    plan = strategy_plan(untied, way.strategy, way.adapter or FULL)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM") if way.adapter else None
    losses, weights = plain_training(plan, way.is_trained, way.rate, way.decay, lora)
    ours = train(plan)
    assert relative_difference(ours.losses, losses) <= SAME_SUMS
    assert ours.weights.keys() == weights.keys()
    assert max((ours.weights[name] - weights[name]).abs().max() for name in weights) <= 2 * SAME_SUMS


def test_the_settings_matter(untied: Material) -> None:
    assert largest_difference(train(strategy_plan(untied, MANY)), train(strategy_plan(untied, {}))) > 1e-4


MANY = {"layer_rate_decay": 0.5, "rate_scales": {"mlp": 3.0}, "weight_decay_of": {"self_attn": 0.0}}


@pytest.mark.parametrize(
    ("adapter", "stage"),
    variants([(LORA_PLUS, 3)], [(FULL, 3), *((section, stage) for section in (FULL, LORA_PLUS) for stage in (1, 2))]),
    ids=str,
)
def test_every_stage_on_two_ranks_equals_one_plain_process(adapter: dict[str, Any], stage: int, untied: Material) -> None:
    alone = train(strategy_plan(untied, MANY, adapter))
    sharded = run(strategy_plan(untied, MANY, adapter, workers=2, stage=stage))
    assert sharded[0].numbers == sharded[1].numbers
    assert relative_difference(sharded[0].losses, alone.losses) <= SAME_SUMS
    # Measured of groups with rates of their own: 2.3e-6.
    assert largest_difference(sharded[0], alone) <= 3 * SAME_SUMS


@pytest.mark.parametrize("stage", variants([3], [0, 2]))
def test_resumed_equals_unbroken(stage: int, untied: Material, tmp_path: Path) -> None:
    plan = strategy_plan(untied, MANY, stage=stage)
    unbroken = run(plan)[0]
    run(plan, Change(stop=3, save=tmp_path))
    resumed = run(plan, Change(start=3, load=tmp_path / "rank-0"))[0]
    assert resumed.losses == unbroken.losses[3:]
    assert largest_difference(resumed, unbroken) == 0
