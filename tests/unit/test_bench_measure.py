"""What benchmarks measure with: a process for each work, ended at its limit."""

from collections.abc import Callable

import pytest

from tests.bench.growth import powers_of
from tests.bench.measure import Exceeded, Measured, in_own_process, rounds_apart
from tests.bench.rows import made_rows


def _spin(turns: int) -> Callable[[], Callable[[], int]]:
    """A rival that needs CPU time in proportion."""
    return lambda: lambda: sum(number % 7 for number in range(turns))


def test_work_is_measured_and_returns_its_value() -> None:
    outcome = in_own_process(_spin(1000), 20)
    assert isinstance(outcome, Measured)
    assert outcome.value == sum(number % 7 for number in range(1000))


def test_work_beyond_its_limit_is_ended() -> None:
    assert in_own_process(_spin(10**12), 0.3) == Exceeded(0.3)


def test_a_failure_is_told_with_its_cause() -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        in_own_process(lambda: lambda: 1 // 0, 20)


def test_who_cannot_be_the_best_is_not_measured_again() -> None:
    rivals = {"ours": _spin(10**3), "quick": _spin(2 * 10**5), "slow": _spin(4 * 10**6)}
    found = rounds_apart(rivals, 2, limit_s=60, hopeless=5, always={"ours"})
    assert {name: len(series.cpu_s) for name, series in found.items()} == {"ours": 2, "quick": 2, "slow": 1}
    assert "not repeated" in (found["slow"].ended or "")


def test_powers_between_sizes() -> None:
    points = {10: {"bytes": 3.0}, 20: {"bytes": 12.0}, 80: {"bytes": 48.0}}
    assert powers_of(points, "bytes") == {"10 to 20": 2.0, "20 to 80": 1.0}


def test_made_rows_are_as_long_as_those_of_gsm8k() -> None:
    rows = made_rows(3000, seed=0)
    words = {key: sorted(len(row[key].split()) for row in rows) for key in ("question", "answer")}
    assert abs(sum(words["question"]) / 3000 - 45.1) < 2.5
    assert abs(sum(words["answer"]) / 3000 - 51.7) < 2.5
    assert abs(words["question"][1500] - 42) <= 2
    assert made_rows(5, seed=0) == rows[:5]
