"""Which attention a device has follows from its compute capability and its packages."""

import pytest

from raytune.plan.choosing.attention_kinds import FLASH_2, FLASH_3, attention_kinds

BOTH = frozenset({FLASH_2, FLASH_3})


@pytest.mark.parametrize(
    ("capability", "packages", "is_16_bit", "first"),
    [
        ((9, 0), BOTH, True, ["flash_attention_3", "flash_attention_2", "varlen"]),
        ((9, 0), frozenset({FLASH_2}), True, ["flash_attention_2", "varlen", "flex_attention"]),
        ((9, 0), frozenset(), True, ["varlen", "flex_attention", "sdpa"]),
        ((9, 0), BOTH, False, ["varlen", "flex_attention", "sdpa"]),
        ((8, 6), BOTH, True, ["flash_attention_2", "varlen", "flex_attention"]),
        ((10, 0), BOTH, True, ["flash_attention_2", "varlen", "flex_attention"]),
        ((7, 5), BOTH, True, ["varlen", "flex_attention", "sdpa"]),
        (None, BOTH, True, ["varlen", "sdpa", "eager"]),
    ],
)
def test_the_best_kind_that_works_comes_first(
    capability: tuple[int, int] | None, packages: frozenset[str], is_16_bit: bool, first: list[str]
) -> None:
    options = attention_kinds(capability, packages, is_16_bit=is_16_bit)
    assert [option.name for option in options if option.available][:3] == first
    assert len(options) == 6
    assert all(option.reason for option in options)


def test_it_is_said_why_a_kind_does_not_work() -> None:
    reasons = {option.name: option.reason for option in attention_kinds((10, 0), frozenset(), is_16_bit=True)}
    assert reasons["flash_attention_3"] == "its kernels are for compute capability 9.x, this GPU has 10.0"
    assert reasons["flash_attention_2"] == "the package flash-attn is not installed"
