"""Defaults by method, model size and data size."""

from itertools import pairwise

import pytest

from raytune.plan.defaults import (
    default_epochs,
    default_learning_rate,
    default_warmup_ratio,
    default_weight_decay,
)
from raytune.plan.methods import METHODS


@pytest.mark.parametrize(
    ("method", "num_parameters", "rate"),
    [("full", 7e9, 2e-5), ("full", 70e9, 1e-5), ("lora", 7e9, 2e-4), ("qlora", 65e9, 1e-4), ("lora", 600_000, 5e-3)],
)
def test_published_rates(method: str, num_parameters: float, rate: float) -> None:
    assert METHODS[method].learning_rate(int(num_parameters)) == rate


@pytest.mark.parametrize("method", METHODS)
def test_larger_models_have_smaller_rates_and_more_data_fewer_epochs(method: str) -> None:
    sizes = [10**power for power in range(5, 12)]
    rates = [METHODS[method].learning_rate(size) for size in sizes]
    epochs = [METHODS[method].epochs(size) for size in sizes]
    assert all(left >= right for left, right in pairwise(rates))
    assert all(left >= right for left, right in pairwise(epochs))
    assert epochs[-1] == 1


def test_every_default_gives_a_reason_with_its_key_and_value() -> None:
    full, lora = METHODS["full"], METHODS["lora"]
    choices = {
        "training.learning_rate is 2e-05": default_learning_rate("full", full.learning_rate(7 * 10**9), 7 * 10**9),
        "training.num_train_epochs is 5": default_epochs("lora", lora.epochs(1000), 1000),
        "training.warmup_ratio is 0.1": default_warmup_ratio(50),
        "training.warmup_ratio is 0.03": default_warmup_ratio(5000),
        "training.weight_decay is 0.1": default_weight_decay("full", full.weight_decay),
        "training.weight_decay is 0": default_weight_decay("qlora", lora.weight_decay),
    }
    assert all(choice.reason and choice.reason.startswith(start) for start, choice in choices.items())
