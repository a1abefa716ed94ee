"""Defaults by method, model size and data size."""

from itertools import pairwise

import pytest

from raytune.plan.defaults import (
    Method,
    default_epochs,
    default_learning_rate,
    default_warmup_ratio,
    default_weight_decay,
)

METHODS: list[Method] = ["full", "lora", "qlora"]


@pytest.mark.parametrize(
    ("method", "num_parameters", "rate"),
    [("full", 7e9, 2e-5), ("full", 70e9, 1e-5), ("lora", 7e9, 2e-4), ("qlora", 65e9, 1e-4), ("lora", 600_000, 5e-3)],
)
def test_published_rates(method: Method, num_parameters: float, rate: float) -> None:
    assert default_learning_rate(method, int(num_parameters)).value == rate


@pytest.mark.parametrize("method", METHODS)
def test_larger_models_have_smaller_rates_and_more_data_fewer_epochs(method: Method) -> None:
    sizes = [10**power for power in range(5, 12)]
    rates = [default_learning_rate(method, size).value for size in sizes]
    epochs = [default_epochs(method, size).value for size in sizes]
    assert all(left >= right for left, right in pairwise(rates))
    assert all(left >= right for left, right in pairwise(epochs))
    assert epochs[-1] == 1


def test_every_default_gives_a_reason_with_its_key_and_value() -> None:
    choices = {
        "training.learning_rate is 2e-05": default_learning_rate("full", 7 * 10**9),
        "training.num_train_epochs is 5": default_epochs("lora", 1000),
        "training.warmup_ratio is 0.1": default_warmup_ratio(50),
        "training.warmup_ratio is 0.03": default_warmup_ratio(5000),
        "training.weight_decay is 0.1": default_weight_decay("full"),
        "training.weight_decay is 0": default_weight_decay("qlora"),
    }
    assert all(choice.reason and choice.reason.startswith(start) for start, choice in choices.items())
