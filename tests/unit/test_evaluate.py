"""Metrics are what their names say."""

import math

import pytest

from raytune.evaluation.perplexity import bits_per_byte, perplexity


def test_a_uniform_model_over_256_bytes_has_perplexity_256_and_eight_bits_per_byte() -> None:
    loss = math.log(256)
    assert perplexity(loss) == pytest.approx(256)
    assert bits_per_byte(loss, num_targets=100, num_bytes=100) == pytest.approx(8)
    assert bits_per_byte(loss, num_targets=50, num_bytes=100) == pytest.approx(4)


def test_perplexity_of_a_diverged_model_is_infinite_rather_than_an_error() -> None:
    assert perplexity(1e6) == math.inf
