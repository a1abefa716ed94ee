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

from raytune.model.export import save_adapter, save_model
from raytune.model.layers import layers_of
from tests.numerics.runs import (
    LORA,
    SAME_SUMS,
    Change,
    Material,
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


@dataclass(frozen=True, kw_only=True)
class Way:
    freeze: dict[str, Any]
    is_trained: Callable[[str], bool]
    """Of the name of a parameter."""
    lowest: int
    """Layer that backward passes reach, of 3."""


FEATURES = ("lm_head", "norm")
WAYS = {
    "head": Way(freeze={"train_only": ["head"]}, is_trained=lambda name: "lm_head" in name, lowest=3),
    "head and norms": Way(
        freeze={"train_only": ["head", "norms"]}, is_trained=lambda name: "lm_head" in name or "norm" in name, lowest=0
    ),
    "norms": Way(freeze={"train_only": ["norms"]}, is_trained=lambda name: "norm" in name, lowest=0),
    "embeddings only": Way(freeze={"train_only": ["embeddings"]}, is_trained=lambda name: "embed" in name, lowest=0),
    "no embeddings": Way(freeze={"embeddings": True}, is_trained=lambda name: "embed" not in name, lowest=0),
    "first layers": Way(freeze={"first_layers": 2}, is_trained=lambda name: "layers.0" not in name and "layers.1" not in name, lowest=0),
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
    "names only": Way(freeze={"train_only": ["layers.2", "q_proj"]}, is_trained=lambda name: "layers.2" in name or "q_proj" in name, lowest=0),
}  # fmt: skip


@pytest.fixture(scope="module")
def untied(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Material:
    """Three layers under a head of its own."""
    folder = tmp_path_factory.mktemp("untied")
    return replace(material, model=save_tiny_model(folder, tied=False, num_hidden_layers=3))


@pytest.mark.parametrize("name", WAYS)
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
