"""Sizes and durations are read and printed in one way each."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune.units import GIB, format_bytes, format_count, format_dollars, format_seconds, parse_count, parse_duration, parse_size


@pytest.mark.parametrize(("text", "num_bytes"), [("40GiB", 40 * GIB), ("80GB", 80 * 10**9), ("1.5 KiB", 1536), ("0b", 0)])
def test_sizes_are_read_in_both_systems_of_units(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize(("text", "seconds"), [("15m", 900), ("1h30m", 5400), ("90s", 90), ("250ms", 0.25), ("1 d", 86400)])
def test_durations_are_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "40", "GiB", "-1GiB", "40 GiBs", "1e3GiB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="such as 40GiB"):
        parse_size(text)


@pytest.mark.parametrize("text", ["", "15", "m", "-1m", "1h m", "1:30"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="such as 15m"):
        parse_duration(text)


@given(st.integers(0, 2**60))
def test_printed_sizes_read_back_within_their_three_digits(num_bytes: int) -> None:
    assert parse_size(format_bytes(num_bytes)) == pytest.approx(num_bytes, rel=0.01)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.84, "0.8s"), (42, "42s"), (185, "3m05s"), (8040, "2h14m"), (273600, "3d04h"), (59.7, "1m00s")]
)
def test_durations_are_printed_in_two_units(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_counts_are_printed_with_three_digits() -> None:
    assert [format_count(count) for count in (950, 12_500, 7_240_000_000)] == ["950", "12.5k", "7.24B"]


@pytest.mark.parametrize(("text", "count"), [("50M", 50_000_000), ("1.5b", 1_500_000_000), ("20000", 20_000), (" 3 k ", 3000)])
def test_counts_are_read(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "M", "0", "-5M", "5MM", "1e6"])
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="such as 50M"):
        parse_count(text)


def test_dollars_have_cents_below_a_hundred() -> None:
    assert [format_dollars(usd) for usd in (0.421, 37.1, 1284.4)] == ["$0.42", "$37.10", "$1,284"]
