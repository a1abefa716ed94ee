"""Metrics are what their names say."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune.evaluate.compare import Sample, compare_exact_match
from raytune.evaluate.perplexity import bits_per_byte, perplexity
from raytune.evaluate.text_metrics import exact_match


def sample(row: int, base: str, tuned: str) -> Sample:
    return Sample(row=row, prompt="p", expected="yes", base=base, tuned=tuned)


def test_a_uniform_model_over_256_bytes_has_perplexity_256_and_eight_bits_per_byte() -> None:
    loss = math.log(256)
    assert perplexity(loss) == pytest.approx(256)
    assert bits_per_byte(loss, num_targets=100, num_bytes=100) == pytest.approx(8)
    assert bits_per_byte(loss, num_targets=50, num_bytes=100) == pytest.approx(4)


def test_perplexity_of_a_diverged_model_is_infinite_rather_than_an_error() -> None:
    assert perplexity(1e6) == math.inf


@given(st.text())
def test_exact_match_ignores_outer_white_space_only(text: str) -> None:
    assert exact_match(f" {text}\n", text) == 1.0
    assert exact_match(text + "x", text) == 0.0


def test_comparison_counts_each_row_once_for_each_model() -> None:
    answers = [("no", "yes"), ("yes", "yes"), ("no", "no"), ("", "yes ")]
    comparison = compare_exact_match([sample(row, base, tuned) for row, (base, tuned) in enumerate(answers)])
    assert (comparison.base, comparison.tuned, comparison.num_rows, comparison.gain) == (0.25, 0.75, 4, 0.5)
